"""Checkpoints: whole or not there, checked before they are trusted, and readable on any number of ranks.

    checkpoints/
      step-00000200/
        model/          a Hugging Face folder: config.json and float32 safetensors; `--model` and transformers read it
        adapter/        with adapters: theirs as peft reads them, and no weights in model/
        optimizer/      both moments of every parameter, safetensors
        training.json   the step, and what the run must agree with to go on
        manifest.json   size and SHA-256 of every file above
      latest -> step-00000200

A checkpoint is written under a hidden name, every file and folder of it is on the disk (fsync) before it is renamed, and one that goes is
renamed away before it is deleted: whenever the process is killed, a folder named `step-…` is a whole one. Nothing is pickled. The ranks of
a context-parallel group hold equal weights, so rank 0 writes alone and every rank reads.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ringspan.errors import RingspanError
from ringspan.training.lora import ADAPTER, ADAPTER_TENSORS, by_peft_name
from ringspan.training.manifest import first_damage, sync, write_manifest

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MODEL, OPTIMIZER, STATE, LATEST = "model", "optimizer", "training.json", "latest"
TENSORS = "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """What a run must know beside its tensors. Every random choice is a function of the seed and the step, so no generator is kept.

    Attributes:
        step: steps taken, and with them the place in the data.
        tokens_digest: the token file's.
        updates: steps whose update was made; None means all.
        recent_losses, skips_in_a_row: what `ringspan.training.guard` judges by.
        base_digest: of the weights that adapters belong to.
    """

    step: int
    tokens_digest: str
    updates: int | None = None
    recent_losses: tuple[float, ...] = ()
    skips_in_a_row: int = 0
    base_digest: str | None = None


def read_state(path: Path) -> TrainingState:
    """What a checkpoint's `training.json` says."""
    fields = json.loads(path.read_text())
    return TrainingState(**fields | {"recent_losses": tuple(fields.get("recent_losses", ()))})


def step_folder(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies."""
    return checkpoints / f"step-{step:08d}"


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """The checkpoints, oldest first. Only finished ones carry such a name."""
    return sorted(path for path in checkpoints.glob("step-*") if path.is_dir())


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """All that a checkpoint is made of, apart from what goes on being trained.

    Attributes:
        config: the model's, for its `config.json`.
        weights: every parameter in float32, by its name in the model.
        moments: both of every parameter.
        extra_files: files to copy into the model's folder, by their names there (a tokenizer's).
        adapter: peft's configuration, where `weights` are those of adapters.
    """

    state: TrainingState
    config: PretrainedConfig
    weights: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
    extra_files: Mapping[str, Path]
    adapter: Any = None

    def in_host_memory(self) -> Snapshot:
        """A copy on the CPU that later steps do not touch."""
        return Snapshot(
            state=self.state,
            config=copy.deepcopy(self.config),
            weights=_copies(self.weights),
            moments=_copies(self.moments),
            extra_files=self.extra_files,
            adapter=copy.deepcopy(self.adapter),
        )


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach()) for name, tensor in tensors.items()}


def save_checkpoint(checkpoints: Path, snapshot: Snapshot, *, keep: int) -> Path:
    """Writes a checkpoint beside the others, gives it its name once it is whole, and deletes all but the newest `keep`.

    A whole checkpoint of the same step stays as it is.

    Raises:
        RingspanError: where the disk would not take it; the checkpoints before are untouched.
    """
    final = step_folder(checkpoints, snapshot.state.step)
    partial = checkpoints / f".{final.name}.partial"
    try:
        _sweep(checkpoints)
        if not final.exists() or first_damage(final) is not None:
            _write(partial, snapshot)
            _delete(final)
            partial.rename(final)
            sync(checkpoints)
        _point_latest(checkpoints, final)
        for old in list_checkpoints(checkpoints)[:-keep]:
            _delete(old)
    except Exception as error:
        # A full disk may come as any of several errors; what is not about files is a bug.
        cause = _os_error(error)
        if cause is None:
            raise
        shutil.rmtree(partial, ignore_errors=True)
        whole = list_checkpoints(checkpoints)
        last = f"the checkpoint before it, {whole[-1]}, is intact" if whole else "no checkpoint was written before it"
        raise RingspanError(
            f"checkpoint of step {snapshot.state.step} in {checkpoints}",
            f"{cause}, and {last}",
            "A checkpoint needs room for the weights and two moments in float32, beside the ones that are kept",
            "making room and `--resume`" if whole else "another --out",
        ) from None
    return final


def _write(folder: Path, snapshot: Snapshot) -> None:
    (folder / MODEL).mkdir(parents=True)
    (folder / OPTIMIZER).mkdir()
    if snapshot.adapter is None:
        write_model(folder / MODEL, snapshot.config, snapshot.weights, snapshot.extra_files)
    else:
        write_model(folder / MODEL, snapshot.config, {}, snapshot.extra_files)
        (folder / ADAPTER).mkdir()
        write_tensors(by_peft_name(snapshot.weights), folder / ADAPTER, ADAPTER_TENSORS)
        snapshot.adapter.save_pretrained(str(folder / ADAPTER))
    write_tensors(snapshot.moments, folder / OPTIMIZER)
    (folder / STATE).write_text(json.dumps(asdict(snapshot.state), indent=2) + "\n")
    write_manifest(folder)
    for inner in (*(path for path in folder.iterdir() if path.is_dir()), folder):
        sync(inner)


def write_model(folder: Path, config: PretrainedConfig, weights: Mapping[str, Tensor], extra_files: Mapping[str, Path]) -> None:
    """Writes a Hugging Face folder: configuration, safetensors, and whatever files belong to it."""
    if weights:
        write_tensors(weights, folder)
    config.save_pretrained(folder)
    for name, source in extra_files.items():
        shutil.copyfile(source, folder / name)


def _delete(folder: Path) -> None:
    """Takes a checkpoint's name away before its files, so that no half of it is ever found under that name."""
    if folder.exists():
        gone = folder.with_name(f".{folder.name}.deleted")
        shutil.rmtree(gone, ignore_errors=True)
        folder.rename(gone)
        shutil.rmtree(gone)


def _sweep(checkpoints: Path) -> None:
    """Deletes what a killed process left half written or half deleted."""
    checkpoints.mkdir(parents=True, exist_ok=True)
    for left in (*checkpoints.glob(".step-*.partial"), *checkpoints.glob(".step-*.deleted")):
        shutil.rmtree(left)


def verify_checkpoint(folder: Path) -> TrainingState:
    """Reads every file of a checkpoint and compares it with the manifest.

    Raises:
        RingspanError: naming the file that is missing, cut short or changed, and the newest checkpoint that is whole.
    """
    found = first_damage(folder)
    if found is None:
        return read_state(folder / STATE)
    others = [other for other in reversed(list_checkpoints(folder.parent)) if other.name < folder.name]
    whole = next((other for other in others if first_damage(other) is None), None)
    raise RingspanError(
        f"checkpoint {folder}",
        found,
        "A checkpoint is used only if every file in it is as it was written",
        f"rm -r {folder}; --resume then goes on from {whole.name}, which is whole" if whole else "starting a new run with another --out",
    )


@torch.no_grad()
def load_tensors(folder: Path, into: Mapping[str, Tensor]) -> None:
    """Reads the safetensors in `folder` into the tensors given, in place, by name.

    Raises:
        RingspanError: where one of the names is not there.
    """
    from safetensors import safe_open

    missing = set(into)
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            for name in missing & set(stored.keys()):
                into[name].copy_(stored.get_tensor(name))
            missing -= set(stored.keys())
    if missing:
        raise RingspanError(
            f"checkpoint {folder}",
            f"it has no {min(missing)}",
            "A checkpoint holds every tensor of the run that goes on",
            "the run's own --out",
        )


def write_tensors(tensors: Mapping[str, Tensor], folder: Path, file: str = TENSORS) -> None:
    """Writes safetensors."""
    from safetensors.torch import save_file

    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, folder / file, metadata={"format": "pt"})


def _point_latest(checkpoints: Path, final: Path) -> None:
    pointer = checkpoints / f".{LATEST}.partial"
    pointer.unlink(missing_ok=True)
    pointer.symlink_to(final.name)
    pointer.replace(checkpoints / LATEST)
    sync(checkpoints)


def _os_error(error: BaseException | None) -> str | None:
    """What the operating system said, wherever in the chain of causes it stands."""
    while error is not None:
        if isinstance(error, OSError):
            return error.strerror or str(error)
        if type(error).__name__ == "SafetensorError":
            return str(error)
        error = error.__cause__ or error.__context__
    return None
