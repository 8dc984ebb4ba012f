"""Checkpoints: whole or not there, checked before they are trusted, and readable on any number of ranks.

    checkpoints/
      step-00000200/
        model/          a Hugging Face folder: config.json and float32 safetensors; `--model` and transformers read it
        optimizer/      both moments of every parameter, safetensors
        training.json   the step, and what the run must agree with to go on
        manifest.json   size and SHA-256 of every file above
      latest -> step-00000200

Tensors go through `torch.distributed.checkpoint`'s safetensors reader and writer; nothing is pickled. The ranks of a context-parallel
group hold equal weights, so rank 0 writes alone and every rank reads.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed.checkpoint as dcp
from torch import Tensor

from ringspan.errors import RingspanError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODEL, OPTIMIZER, STATE, MANIFEST, LATEST = "model", "optimizer", "training.json", "manifest.json", "latest"


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """What a run must know beside its tensors. Every random choice is a function of the seed and the step, so no generator is kept.

    `step` is the number of steps taken, and with it the place in the data; `tokens_digest` is the token file's.
    """

    step: int
    tokens_digest: str


def step_folder(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies."""
    return checkpoints / f"step-{step:08d}"


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """The checkpoints, oldest first. Only finished ones carry such a name."""
    return sorted(path for path in checkpoints.glob("step-*") if path.is_dir())


def save_checkpoint(
    checkpoints: Path,
    state: TrainingState,
    *,
    model: PreTrainedModel,
    weights: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    extra_files: Mapping[str, Path],
    keep: int,
) -> Path:
    """Writes a checkpoint beside the others, gives it its name once it is whole, and deletes all but the newest `keep`.

    Args:
        weights: every parameter in float32, by its name in `model`.
        extra_files: files to copy into the model's folder, by their names there (a tokenizer's).

    Raises:
        RingspanError: where the disk would not take it; the checkpoints before are untouched.
    """
    final = step_folder(checkpoints, state.step)
    partial = checkpoints / f".{final.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write_tensors(weights, partial / MODEL)
        _write_tensors(moments, partial / OPTIMIZER)
        model.config.save_pretrained(partial / MODEL)
        for name, source in extra_files.items():
            shutil.copyfile(source, partial / MODEL / name)
        (partial / STATE).write_text(json.dumps(asdict(state), indent=2) + "\n")
        _write_manifest(partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _point_latest(checkpoints, final)
        for old in list_checkpoints(checkpoints)[:-keep]:
            shutil.rmtree(old)
    except (Exception, dcp.CheckpointException) as error:  # the latter is a BaseException
        # torch wraps what its writer threads meet, so a full disk may come as any of several errors; what is not about files is a bug.
        cause = _os_error(error)
        if cause is None:
            raise
        shutil.rmtree(partial, ignore_errors=True)
        whole = list_checkpoints(checkpoints)
        last = f"the checkpoint before it, {whole[-1]}, is intact" if whole else "no checkpoint was written before it"
        raise RingspanError(
            f"checkpoint of step {state.step} in {checkpoints}",
            f"{cause}, and {last}",
            "A checkpoint needs room for the weights and two moments in float32, beside the ones that are kept",
            "making room and `--resume`" if whole else "another --out",
        ) from None
    return final


def verify_checkpoint(folder: Path) -> TrainingState:
    """Reads every file of a checkpoint and compares it with the manifest.

    Raises:
        RingspanError: naming the file that is missing, cut short or changed, and the newest checkpoint that is whole.
    """
    found = _first_damage(folder)
    if found is None:
        return TrainingState(**json.loads((folder / STATE).read_text()))
    others = [other for other in reversed(list_checkpoints(folder.parent)) if other.name < folder.name]
    whole = next((other for other in others if _first_damage(other) is None), None)
    raise RingspanError(
        f"--resume from {folder}",
        found,
        "A checkpoint is used only if every file in it is as it was written",
        f"rm -r {folder}; --resume then goes on from {whole.name}, which is whole" if whole else "starting a new run with another --out",
    )


def load_tensors(folder: Path, into: dict[str, Tensor]) -> None:
    """Reads safetensors written by `save_checkpoint` into the tensors given, in place, by name."""
    with _alone():
        dcp.load(into, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=True)


def _write_tensors(tensors: Mapping[str, Tensor], folder: Path) -> None:
    folder.mkdir()
    detached = {name: tensor.detach() for name, tensor in tensors.items()}
    with _alone():
        dcp.save(detached, storage_writer=dcp.HuggingFaceStorageWriter(str(folder)), no_dist=True)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Without torch's warning that no_dist=True means a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is .*, assuming the intent is to")
        yield


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)


def _describe(file: Path) -> dict[str, int | str]:
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _write_manifest(folder: Path) -> None:
    manifest = {file.relative_to(folder).as_posix(): _describe(file) for file in _files(folder)}
    with (folder / MANIFEST).open("w") as stream:
        json.dump(manifest, stream, indent=2)
        stream.flush()
        os.fsync(stream.fileno())


def _first_damage(folder: Path) -> str | None:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError):
        return f"{MANIFEST} cannot be read"
    for name, written in manifest.items():
        try:
            present = _describe(folder / name)
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if present["bytes"] != written["bytes"]:
            return f"{name} has {present['bytes']} bytes of the {written['bytes']} that were written"
        if present != written:
            return f"{name} is not as it was written (another SHA-256)"
    return None


def _point_latest(checkpoints: Path, final: Path) -> None:
    pointer = checkpoints / f".{LATEST}.partial"
    pointer.unlink(missing_ok=True)
    pointer.symlink_to(final.name)
    pointer.replace(checkpoints / LATEST)


def _os_error(error: BaseException | None) -> str | None:
    """What the operating system said, wherever in the chain of causes it stands."""
    seen: set[int] = set()
    pending = [error]
    while pending:
        current = pending.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, OSError):
            return current.strerror or str(current)
        if type(current).__name__ == "SafetensorError":
            return str(current)
        failures = getattr(current, "failures", {})
        pending += [current.__cause__, current.__context__]
        pending += [failure[0] for failure in failures.values() if isinstance(failure, tuple)] if isinstance(failures, dict) else []
    return None
