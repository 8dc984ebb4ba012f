"""Where a rank keeps its own and visiting pieces during one pass, and its accumulators. Everything is rows first."""

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
                return [tensor[piece.start - held.start : piece.stop - held.start] for tensor in tensors]
        raise AssertionError(f"{piece} is not on the shelf; the validator lets no such schedule pass")

    def drop(self, piece: Piece) -> None:
        """Lets go of exactly `piece`."""
        entries = self._held[(piece.kind, piece.owner)]
        self._held[(piece.kind, piece.owner)] = [entry for entry in entries if entry[0] != piece]


class Accumulator:
    """Sums of rows `[start, stop)` of a shard, which begin as zero without being zeroed where the first addition covers them all."""

    def __init__(self, piece: Piece, tensor: Tensor) -> None:
        self.piece, self.tensor, self._fresh = piece, tensor, True

    def rows(self, start: int, stop: int) -> Tensor:
        """The rows as they stand, a view."""
        self._settle()
        return self.tensor[start - self.piece.start : stop - self.piece.start]

    def add(self, start: int, stop: int, *parts: Tensor) -> None:
        """Adds to rows `[start, stop)`: one part `[rows, …]`, or one for each index of the second axis (dk and dv)."""
        first = self._fresh and (start, stop) == (self.piece.start, self.piece.stop)
        rows = self.tensor if first else self.rows(start, stop)
        for index, part in enumerate(parts):
            target = rows if len(parts) == 1 else rows[:, index]
            if first:
                target.copy_(part)
            else:
                target.add_(part)
        self._fresh = False

    def _settle(self) -> None:
        if self._fresh:
            self.tensor.zero_()
            self._fresh = False
