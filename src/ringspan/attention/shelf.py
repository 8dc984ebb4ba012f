"""Where a rank keeps its own and visiting pieces during one pass. Everything is rows first."""

from __future__ import annotations

from collections import defaultdict

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
