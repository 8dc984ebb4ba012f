"""Whether a model was told where a shard's tokens stand: one that is not counts them from 0 on every rank, and rotates q and k by that."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ringspan.errors import RingspanError
from ringspan.geometry import Mask, document_borders
from ringspan.kernels import is_captured

if TYPE_CHECKING:
    from ringspan.attention.sequence import Sequence


class KnownTensors:
    """Tensors that need not be read again: known as long as they live and hold what they held, also where another tensor is a view of all.

    A tensor that is looked up is not read, so that nobody waits for a device.
    """

    def __init__(self) -> None:
        self._versions = WeakTensorKeyDictionary()

    def add(self, tensor: Tensor) -> None:
        """Knows `tensor` from now on."""
        self._versions[tensor] = _version(tensor)

    def __contains__(self, tensor: Tensor) -> bool:
        version = self._versions.get(tensor)
        if version is None:
            version = next((held for other, held in self._versions.items() if _is_same_memory(other, tensor)), None)
        return version is not None and version == _version(tensor)


def _version(tensor: Tensor) -> int:
    """How often it was written to in place, as far as torch counts."""
    return 0 if tensor.is_inference() else tensor._version


def _is_same_memory(one: Tensor, other: Tensor) -> bool:
    about = (one.device, one.dtype, one.shape, one.stride()) == (other.device, other.dtype, other.shape, other.stride())
    return about and not one.is_meta and one.data_ptr() == other.data_ptr()


def position_problem(sequence: Sequence, position_ids: object, asked: str) -> RingspanError | None:
    """The error where a model's `position_ids` are 0, 1, 2 … and this rank's tokens do not stand there; else None, on each rank by itself.

    That is what transformers makes of a shard when it is given none. Everything else is the user's choice, and so are documents that begin
    where they would have to for that, by the sequence's mask. A rank that owns the first positions, as rank 0 under `contiguous` does,
    cannot tell them from its own.

    What `shard_batch` made is known without being read. Another tensor is read once as long as it lives, at which the host waits for its
    device; not while a CUDA graph is captured, which nobody can wait in.

    Args:
        sequence: of the attention.
        position_ids: `[…, shard]`, or whatever a model gives.
        asked: what the error says was asked for.
    """
    if sequence.num_ranks == 1 or not isinstance(position_ids, Tensor) or position_ids in sequence.known_positions:
        return None
    length = sequence.shard_length
    if position_ids.shape[-1:] != (length,) or sequence.may_count_from_0 or position_ids.is_meta or is_captured(position_ids.device):
        return None
    if not bool((position_ids == torch.arange(length, device=position_ids.device)).all()):
        sequence.known_positions.add(position_ids)
        return None
    return RingspanError(
        f"{asked} with position_ids 0 to {length - 1}",
        f"the tokens of rank {sequence.rank} stand at {_places(sequence)} of {sequence.length}",
        "A model that is given no position_ids counts each rank's tokens from 0, and rotates queries and keys by that",
        "model(**seq.shard_batch(batch)), or position_ids=seq.positions[None]; where documents begin there, a mask with ringspan.documents",
    )


def may_count_from_0(mask: Mask, positions: Tensor) -> bool:
    """Whether 0, 1, 2 … may be right for tokens at `positions`: they stand there, or documents of `mask` begin where they would have to."""
    begins = positions - torch.arange(len(positions), device=positions.device)
    borders = torch.tensor([0, *sorted(document_borders(mask))], device=positions.device)
    return bool(torch.isin(begins, borders).all())


def _places(sequence: Sequence) -> str:
    """The first few of this rank's positions."""
    spans = sequence.layout.shards[sequence.rank]
    shown = [f"{span.start} to {span.last}" + (f" by {span.step}" if span.step > 1 else "") for span in spans[:3]]
    return ", ".join(shown) + (", …" if len(spans) > 3 else "")
