"""Checkpoints: whole or not there, checked before they are trusted, and readable on any mesh.

    checkpoints/
      step-00000200/
        tensors/        weights and both moments in float32, each rank's part, by torch.distributed.checkpoint
        model/          config.json and the tokenizer's files
        adapter/        with adapters: theirs as peft reads them
        training.json   the step, and what the run must agree with to go on
        manifest.json   size and SHA-256 of every file above
      latest -> step-00000200

`ringspan export` makes a Hugging Face folder of one. A checkpoint is written under a hidden name, every file and folder of it is on the
disk (fsync) before it is renamed, and one that goes is renamed away before it is deleted: whenever a process is killed, a folder named
`step-…` is a whole one. All ranks write tensors, on a disk that all of them see; the rest is rank 0's.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ringspan.errors import RingspanError
from ringspan.training.lora import ADAPTER, ADAPTER_TENSORS, by_peft_name
from ringspan.training.manifest import first_damage, sync, write_manifest
from ringspan.training.ranks import on_first
from ringspan.training.tensors import host_copy, load_tensors, missing_files, stored_sizes, write_parts

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MODEL, TENSORS, STATE, LATEST = "model", "tensors", "training.json", "latest"
GENERATION_CONFIG = "generation_config.json"
WEIGHTS = "weights."
"""What stands before a parameter's name in `tensors`."""


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


def generation_config(folders: Iterable[Path]) -> str | None:
    """What the first of `folders` that has a generation_config.json says in it: how text is drawn, and which tokens end it."""
    files = (folder / GENERATION_CONFIG for folder in folders)
    return next((file.read_text(encoding="utf-8") for file in files if file.is_file()), None)


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
        weights: every parameter in float32, by its name in the model; whole or sharded.
        moments: both of every parameter, like it.
        extra_files: files to copy into the model's folder, by their names there (a tokenizer's).
        generation: what generation_config.json says, where the model has one.
        adapter: peft's configuration, where `weights` are those of adapters.
    """

    state: TrainingState
    config: PretrainedConfig
    weights: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
    extra_files: Mapping[str, Path]
    generation: str | None = None
    adapter: Any = None

    def in_host_memory(self) -> Snapshot:
        """A copy on the CPU that later steps do not touch; of sharded tensors, this rank's part."""
        return Snapshot(
            state=self.state,
            config=copy.deepcopy(self.config),
            weights={name: host_copy(tensor) for name, tensor in self.weights.items()},
            moments={name: host_copy(tensor) for name, tensor in self.moments.items()},
            extra_files=self.extra_files,
            generation=self.generation,
            adapter=copy.deepcopy(self.adapter),
        )


def save_checkpoint(checkpoints: Path, snapshot: Snapshot, *, keep: int, group: dist.ProcessGroup | None = None) -> Path:
    """Writes a checkpoint beside the others, gives it its name once it is whole, and deletes all but the newest `keep`.

    Collective over `group`, and on rank 0 done when the checkpoint is whole; the others are when they have written their part. A whole
    checkpoint of the same step stays as it is.

    Args:
        snapshot: in host memory.
        group: of all ranks, for messages of the CPU; None for a process alone.

    Raises:
        RingspanError: where the disk would not take it; the checkpoints before are untouched.
    """
    final = step_folder(checkpoints, snapshot.state.step)
    partial = checkpoints / f".{final.name}.partial"
    is_first = group is None or dist.get_rank(group) == 0

    def begin() -> bool:
        _sweep(checkpoints)
        if final.exists() and first_damage(final) is None:
            return False
        partial.mkdir()
        return True

    try:
        if on_first(begin, group):
            weights = {WEIGHTS + name: tensor for name, tensor in snapshot.weights.items()}
            write_parts({**weights, **snapshot.moments}, partial / TENSORS, group)
            if is_first:
                _write_rest(partial, snapshot)
                _delete(final)
                partial.rename(final)
                sync(checkpoints)
        if is_first:
            _point_latest(checkpoints, final)
            for old in list_checkpoints(checkpoints)[:-keep]:
                _delete(old)
    except Exception as error:
        # A full disk may come as any of several errors; what is not about files is a bug.
        cause = _os_error(error)
        if cause is None:
            raise
        if is_first:
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


def _write_rest(folder: Path, snapshot: Snapshot) -> None:
    """All but the tensors, which are there.

    Raises:
        RingspanError: where not all of them are: the manifest would call whole what nobody can read.
    """
    if missing := missing_files(folder / TENSORS):
        raise RingspanError(
            f"checkpoint of step {snapshot.state.step} in {folder.parent}",
            f"{', '.join(missing)}, which another rank has written, cannot be seen from rank 0",
            "All ranks write their parts on a disk that all of them see",
            "an --out on such a disk",
        )
    (folder / MODEL).mkdir()
    snapshot.config.save_pretrained(folder / MODEL)
    for name, source in snapshot.extra_files.items():
        shutil.copyfile(source, folder / MODEL / name)
    if snapshot.generation is not None:
        (folder / MODEL / GENERATION_CONFIG).write_text(snapshot.generation, encoding="utf-8")
    if snapshot.adapter is not None:
        (folder / ADAPTER).mkdir()
        write_tensors(by_peft_name(read_weights(folder)), folder / ADAPTER, ADAPTER_TENSORS)
        snapshot.adapter.save_pretrained(str(folder / ADAPTER))
    (folder / STATE).write_text(json.dumps(asdict(snapshot.state), indent=2) + "\n")
    write_manifest(folder)
    for inner in (*(path for path in folder.iterdir() if path.is_dir()), folder):
        sync(inner)


def weight_sizes(checkpoint: Path) -> dict[str, torch.Size]:
    """The parameters of a checkpoint, by their names in the model, and their sizes."""
    sizes = stored_sizes(checkpoint / TENSORS)
    return {name.removeprefix(WEIGHTS): size for name, size in sizes.items() if name.startswith(WEIGHTS)}


def read_weights(checkpoint: Path, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """Parameters of a checkpoint, whole, in host memory and float32; all of them if not given."""
    weights = {name: torch.empty(size) for name, size in weight_sizes(checkpoint).items() if names is None or name in names}
    load_weights(checkpoint, weights)
    return weights


def load_weights(checkpoint: Path, into: Mapping[str, Tensor]) -> None:
    """Reads parameters into the tensors given, in place, by their names in the model.

    Raises:
        RingspanError: where one is not there.
    """
    load_tensors(checkpoint / TENSORS, {WEIGHTS + name: tensor for name, tensor in into.items()})


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
    if found is None and (folder / TENSORS).is_dir():
        return read_state(folder / STATE)
    if found is None:
        raise RingspanError(
            f"checkpoint {folder}",
            f"it has no {TENSORS}: an earlier version of ringspan wrote it",
            "A checkpoint holds the weights and moments of the run that goes on",
            f"that version, or a new run with --model {folder / MODEL}",
        )
    others = [other for other in reversed(list_checkpoints(folder.parent)) if other.name < folder.name]
    whole = next((other for other in others if first_damage(other) is None), None)
    raise RingspanError(
        f"checkpoint {folder}",
        found,
        "A checkpoint is used only if every file in it is as it was written",
        f"rm -r {folder}; --resume then goes on from {whole.name}, which is whole" if whole else "starting a new run with another --out",
    )


def write_tensors(tensors: Mapping[str, Tensor], folder: Path, file: str = "model.safetensors") -> None:
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
