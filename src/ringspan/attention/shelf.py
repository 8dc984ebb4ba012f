"""Where a rank keeps its own and visiting pieces during one pass. Everything is rows first."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from ringspan.schedule import Piece


class Shelf:
    """Pieces at hand. A piece is a list of tensors `[rows, …]`, one for each of its components, covering `[start, stop)` of a shard."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, int], list[tuple[Piece, list[Tensor]]]] = defaultdict(list)

    def put(self, piece: Piece, tensors: list[Tensor]) -> None:
        """Keeps `tensors` as `piece`."""
        self._held[(piece.kind, piece.owner)].append((piece, tensors))

    def view(self, piece: Piece) -> list[Tensor]:
        """The rows of `piece`, as views."""
        for held, tensors in self._held[(piece.kind, piece.owner)]:
            if held.holds(piece):
                if (held.start, held.stop) == (piece.start, piece.stop):
                    return tensors
                return [tensor[piece.start - held.start : piece.stop - held.start] for tensor in tensors]
        raise AssertionError(f"{piece} is not on the shelf; the validator lets no such schedule pass")

    def drop(self, piece: Piece) -> None:
        """Lets go of exactly `piece`."""
        entries = self._held[(piece.kind, piece.owner)]
        self._held[(piece.kind, piece.owner)] = [entry for entry in entries if entry[0] != piece]


def adjacent(tensors: Sequence[Tensor]) -> Tensor | None:
    """`tensors`, `[rows, …]` each, one after the other as one view, where that is how they lie in memory; else None."""
    first = tensors[0]
    if len(tensors) == 1:
        return first
    end, storage = first.data_ptr(), first.untyped_storage().data_ptr()
    for tensor in tensors:
        is_next = tensor.data_ptr() == end and tensor.is_contiguous() and tensor.untyped_storage().data_ptr() == storage
        if not is_next or tensor.dtype != first.dtype or tensor.shape[1:] != first.shape[1:]:
            return None
        end += tensor.numel() * tensor.element_size()
    # A single row counts as contiguous whatever its stride: that of a row among others is its size.
    row = math.prod(first.shape[1:])
    return first.as_strided((sum(len(tensor) for tensor in tensors), *first.shape[1:]), (row, *first.stride()[1:]))


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """`tensors`, `[rows, …]` each, one after the other: a view where that is how they lie in memory, else a copy."""
    view = adjacent(tensors)
    return torch.cat(list(tensors)) if view is None else view
