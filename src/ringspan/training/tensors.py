"""The tensors of a checkpoint, through `torch.distributed.checkpoint`: each rank writes its part, and any other mesh reads it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from ringspan.errors import RingspanError


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, sharing its memory; another tensor as it is."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def host_copy(tensor: Tensor) -> Tensor:
    """A copy in host memory, sharded as `tensor` is, that later steps do not touch."""
    return tensor.detach().to("cpu", copy=True)


def bits_sum(tensors: Mapping[str, Tensor]) -> float:
    """A number that tells these float32 tensors, or this rank's parts of them, from others: the sum of their bits, in any order."""
    total = sum(int(local_part(tensor).contiguous().view(torch.int32).sum(dtype=torch.int64)) for tensor in tensors.values())
    return float(total % (1 << 52))


@torch.no_grad()
def share_tensors(whole: Mapping[str, Tensor], into: Mapping[str, Tensor], device: torch.device) -> None:
    """Copies whole tensors of rank 0 into those of every rank, one at a time, in place. Collective over all ranks.

    Args:
        whole: by name; of rank 0 alone.
        into: the same names on every rank, whole or sharded, on any device.
        device: of this rank; one whole tensor at a time passes through its memory.
    """
    for name, target in into.items():
        passing = torch.empty(target.shape, dtype=target.dtype, device=device)
        if dist.get_rank() == 0:
            passing.copy_(whole[name])
        dist.broadcast(passing, 0)
        if isinstance(target, DTensor):
            (chunk,) = target.__create_chunk_list__()
            passing = passing[tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))]
        local_part(target).copy_(passing)


def write_parts(tensors: Mapping[str, Tensor], folder: Path, group: dist.ProcessGroup | None) -> None:
    """Writes every rank's part of `tensors` into `folder`, which is on a disk that all ranks see. Collective over `group`.

    Args:
        tensors: by name, in host memory; those that are not sharded are the same on every rank, and one of them writes each.
        folder: new.
        group: one that carries tensors in host memory; None for a process alone.

    Raises:
        Exception: on every rank, what kept the first of them from writing.
    """
    try:
        with _quiet():
            dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(folder), process_group=group, no_dist=group is None)
    except CheckpointException as error:
        raise _cause(error) from error


def stored_sizes(folder: Path) -> dict[str, torch.Size]:
    """The names and whole sizes of what was written."""
    entries = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    return {name: entry.size for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


def missing_files(folder: Path) -> list[str]:
    """Files that hold a part of what was written and are not in `folder`, by their names."""
    written = {info.relative_path for info in (dcp.FileSystemReader(folder).read_metadata().storage_data or {}).values()}
    return sorted(name for name in written if not (folder / name).is_file())


@torch.no_grad()
def load_tensors(folder: Path, into: Mapping[str, Tensor]) -> None:
    """Reads what was written into the tensors given, in place, by name. Each process for itself, whatever mesh wrote it.

    Args:
        folder: what `write_parts` was given.
        into: whole tensors, or sharded ones, of which the part is read that is this rank's.

    Raises:
        RingspanError: where one of the names is not there, or is of another size.
    """
    sizes = stored_sizes(folder)
    for name, tensor in into.items():
        if sizes.get(name) != tensor.shape:
            found = f"its {name} is {tuple(sizes[name])} and not {tuple(tensor.shape)}" if name in sizes else f"it has no {name}"
            raise RingspanError(
                f"checkpoint {folder}", found, "A checkpoint holds every tensor of the run that goes on", "the run's own --out"
            )
    try:
        with _quiet():
            dcp.load({name: tensor.detach() for name, tensor in into.items()}, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    except CheckpointException as error:
        raise _cause(error) from error


def _cause(error: CheckpointException) -> BaseException:
    """What the first rank that failed met: an error of its own, since this one is no Exception."""
    return error.failures[min(error.failures)][0]


@contextmanager
def _quiet() -> Iterator[None]:
    # That one process reads or writes for itself is what is meant.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield
