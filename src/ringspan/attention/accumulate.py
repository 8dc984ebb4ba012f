"""What a rank adds up during one pass: partial outputs, and gradients. Few passes over memory, one rounding at the end.

A kernel gives its result in the inputs' dtype. The first that covers an accumulator is taken as it is; if the next is also the last, both
are added in registers, in float32, and rounded once, into the first. With more to come the sum is kept in float32 (float64 for float64),
and the last addition of a partial output rounds it while it passes through anyway.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ringspan.kernels import accumulator_dtype, merge_
from ringspan.schedule import Piece


class Partial:
    """The partial attention of the rows of `piece`: `out [rows, batch, heads, head_dim]`, `lse [rows, batch, heads]`.

    Args:
        piece: the rows.
        like: q, `[batch, shard, heads, head_dim]`: batch, heads, dtype and device.
        additions: how many additions there will be.
        rounds: whether the last addition rounds to the dtype of `like`: not what still travels or is scaled.
    """

    def __init__(self, piece: Piece, like: Tensor, additions: int, rounds: bool = True) -> None:
        self.piece, self._like, self._ahead, self._rounds = piece, like, additions, rounds
        self._held: tuple[Tensor, Tensor] | None = None
        self._settled = False

    def add(self, start: int, stop: int, out: Tensor, lse: Tensor, lent: bool = False) -> None:
        """Merges rows `[start, stop)` of another partial; may keep and overwrite `out` and `lse` unless they are `lent`."""
        self._ahead -= 1
        if self._held is None and (start, stop) == (self.piece.start, self.piece.stop):
            self._held = (out.clone(), lse.clone()) if lent else (out, lse)
            return
        if self._held is None:
            self._settle()
        assert self._held is not None
        into, goes_on = None, bool(self._ahead) or not self._rounds
        if goes_on and not self._settled:
            into, self._settled = self._empty(accumulator_dtype(self._like.dtype)), True
        elif self._settled and not goes_on:
            into, self._settled = self._empty(self._like.dtype), False
        merge_(*self._held, out, lse, start=start - self.piece.start, into=into)
        self._held = into or self._held

    def rows(self, start: int, stop: int) -> list[Tensor]:
        """`out` and `lse` of the rows, views, as wide as they need to be."""
        if self._held is None:
            self._settle()
        assert self._held is not None
        return [tensor[start - self.piece.start : stop - self.piece.start] for tensor in self._held]

    def result(self) -> tuple[Tensor, Tensor]:
        """`out [batch, rows, heads, head_dim]`, in the dtype of q where it rounds, and `lse [batch, heads, rows]`."""
        if self._held is None:
            self._settle()
        assert self._held is not None
        out, lse = self._held
        out = out.to(self._like.dtype) if self._rounds else out
        return out.movedim(0, 1).contiguous(), lse.permute(1, 2, 0).contiguous()

    def _settle(self) -> None:
        """From nothing, or from what a kernel gave, to the accumulator's own dtype."""
        if self._settled:
            return
        held, self._held, self._settled = self._held, self._empty(accumulator_dtype(self._like.dtype)), True
        if held is None:
            self._held[0].zero_()
            self._held[1].fill_(float("-inf"))
        else:
            for into, tensor in zip(self._held, held, strict=True):
                into.copy_(tensor)

    def _empty(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        # As kernels lay them out: rows before heads in out, after them in lse.
        batch, _, heads, head_dim = self._like.shape
        out = self._like.new_empty((batch, len(self.piece), heads, head_dim), dtype=dtype)
        lse = self._like.new_empty((batch, heads, len(self.piece)), dtype=accumulator_dtype(dtype))
        return out.movedim(1, 0), lse.permute(2, 0, 1)


class Accumulator:
    """Gradients of the rows of `piece`: one tensor `[rows, batch, heads, head_dim]`, or two of that shape (dk and dv).

    Args:
        piece: the rows.
        like: q or k, `[batch, shard, heads, head_dim]`: batch, heads, dtype and device.
        additions: how many additions there will be.
        rounds: whether the last addition rounds to the dtype of `like`: not what still travels or is scaled.
        parts: 1, or 2 for dk and dv.
    """

    def __init__(self, piece: Piece, like: Tensor, additions: int, rounds: bool = True, parts: int = 1) -> None:
        self.piece, self._like, self._ahead, self._rounds, self._parts = piece, like, additions, rounds, parts
        self._held: list[Tensor] | None = None
        self._fresh = True

    def add(self, start: int, stop: int, *parts: Tensor, lent: bool = False) -> None:
        """Adds to rows `[start, stop)`; may keep and overwrite `parts` unless they are `lent`."""
        self._ahead -= 1
        if self._fresh and (start, stop) == (self.piece.start, self.piece.stop):
            self._held, self._fresh = [part.clone() if lent else part for part in parts], False
            return
        self._settle()
        assert self._held is not None
        wide = accumulator_dtype(self._like.dtype)
        if (self._ahead or not self._rounds) and self._held[0].dtype != wide:
            self._held = [held.to(wide) for held in self._held]
        for held, part in zip(self._held, parts, strict=True):
            # Added in float32 whatever the dtypes, and rounded to that of what is held.
            held[start - self.piece.start : stop - self.piece.start].add_(part)

    def rows(self, start: int, stop: int) -> list[Tensor]:
        """The rows as they stand, views, in the dtype of the last addition: as wide as they need to be."""
        self._settle()
        assert self._held is not None
        return [held[start - self.piece.start : stop - self.piece.start] for held in self._held]

    def result(self) -> list[Tensor]:
        """The parts as `[batch, rows, heads, head_dim]`, contiguous, in the dtype of `like` where it rounds."""
        held = self.rows(self.piece.start, self.piece.stop)
        return [(part.to(self._like.dtype) if self._rounds else part).movedim(0, 1).contiguous() for part in held]

    def _settle(self) -> None:
        if self._fresh:
            self._held, self._fresh = self._zeros(), False

    def _zeros(self) -> list[Tensor]:
        batch, _, heads, head_dim = self._like.shape
        shape, wide = (batch, len(self.piece), heads, head_dim), accumulator_dtype(self._like.dtype)
        return [self._like.new_zeros(shape, dtype=wide).movedim(1, 0) for _ in range(self._parts)]
