"""What a rank adds up during one pass: partial outputs, and gradients. Few passes over memory, one rounding at the end.

A kernel gives its result in the inputs' dtype. The first that covers an accumulator is taken as it is. Where a few more come (`TOGETHER`),
narrower than their sum, they are put off, and then all are added in registers, in float32, and rounded once, into the first: one pass over
memory, and no float32 copy. What has more to come, or must be added before because its memory was lent or its sum travels, is kept in
float32 (float64 for float64), of a partial output only those rows to which more comes, and the last addition rounds it while it passes
through anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

from ringspan.attention.shelf import adjacent
from ringspan.kernels import accumulator_dtype, add_, merge_
from ringspan.schedule import Piece

TOGETHER, TOGETHER_MADE = 3, 2
"""How many additions are put off, where no more are to come, and how many of them where they are gradients that are made here: in half
precision they take the memory that their float32 sum would, and the next one beside it, which the last call of a backward would find there
beside all that it works in. What has come from another rank lies where it came. Of more none is put off."""

Parts = TypeVar("Parts", bound=tuple[Tensor, ...])


def _nothing() -> None:
    pass


class Partial:
    """The partial attention of the rows of `piece`: `out [rows, batch, heads, head_dim]`, `lse [rows, batch, heads]`.

    Args:
        piece: the rows.
        like: q, `[batch, shard, heads, head_dim]`: batch, heads, dtype and device.
        additions: how many additions there will be.
        again: the rows to which all but the first are made.
        rounds: whether the last addition rounds to the dtype of `like`: not what still travels or is scaled.
        before: called before anything that was added is read.
        after: called when it has been, before it is freed.
    """

    def __init__(
        self, piece: Piece, like: Tensor, additions: int, again: tuple[int, int], rounds: bool = True,
        before: Callable[[], None] = _nothing, after: Callable[[], None] = _nothing,
    ) -> None:  # fmt: skip
        self.piece, self._like, self._ahead, self._rounds, self._before, self._after = piece, like, additions, rounds, before, after
        self._again = slice(again[0] - piece.start, again[1] - piece.start) if rounds else slice(0, len(piece))
        self._held: tuple[Tensor, Tensor] | None = None
        self._wide: tuple[Tensor, Tensor] | None = None
        self._late = _Late[tuple[Tensor, Tensor]](rounds)

    def add(self, start: int, stop: int, out: Tensor, lse: Tensor, lent: bool = False) -> None:
        """Merges rows `[start, stop)` of another partial; may keep and overwrite `out` and `lse`, unless they are `lent` until `settle`."""
        self._ahead -= 1
        if self._held is None and (start, stop) == (self.piece.start, self.piece.stop):
            self._held = (out.clone(), lse.clone()) if lent else (out, lse)
            return
        if self._held is None:
            self._again = slice(0, len(self.piece))
        self._late.put(start - self.piece.start, (out, lse), lent, self._ahead)
        if self._late.is_due:
            self.settle()

    def settle(self, lent: bool = False) -> None:
        """Merges what was put off; with `lent`, where some of it was lent."""
        if not self._late.others or (lent and not self._late.lent):
            return
        self._before()
        held = self._hold()
        kept = held[0][self._again], held[1][self._again]
        mine, into, wide = self._wide or kept, None, accumulator_dtype(self._like.dtype)
        if not self._ahead and self._rounds:
            into, self._wide = (None if self._wide is None else kept), None
        elif mine[0].dtype != wide:
            self._wide = into = self._empty(mine[0].shape[0], wide)
        others = self._late.take()
        merge_(*mine, [(start - self._again.start, *other) for start, other in others], into=into)
        self._after()

    def rows(self, start: int, stop: int) -> list[Tensor]:
        """`out` and `lse` of the rows, views, as wide as they need to be."""
        return [tensor[start - self.piece.start : stop - self.piece.start] for tensor in self._whole()]

    def result(self) -> tuple[Tensor, Tensor]:
        """`out [batch, rows, heads, head_dim]`, in the dtype of q where it rounds, and `lse [batch, heads, rows]`."""
        out, lse = self._whole()
        out = out.to(self._like.dtype) if self._rounds else out
        return out.movedim(0, 1).contiguous(), lse.permute(1, 2, 0).contiguous()

    def _whole(self) -> tuple[Tensor, Tensor]:
        """What there is of all rows."""
        self.settle()
        self._before()
        assert self._wide is None or not self._rounds, "what is rounded at the end is asked for at the end"
        return self._wide or self._hold()

    def _hold(self) -> tuple[Tensor, Tensor]:
        """What was first there of all rows, or the identity."""
        if self._held is None:
            self._held = self._empty(len(self.piece), self._like.dtype if self._rounds else accumulator_dtype(self._like.dtype))
            self._held[0].zero_()
            self._held[1].fill_(float("-inf"))
        return self._held

    def _empty(self, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        # As kernels lay them out: rows before heads in out, after them in lse.
        batch, _, heads, head_dim = self._like.shape
        out = self._like.new_empty((batch, rows, heads, head_dim), dtype=dtype)
        lse = self._like.new_empty((batch, heads, rows), dtype=accumulator_dtype(dtype))
        return out.movedim(1, 0), lse.permute(2, 0, 1)


class Accumulator:
    """Gradients of the rows of `piece`: one tensor `[rows, batch, heads, head_dim]`, or two of that shape (dk and dv).

    Args:
        piece: the rows.
        like: q or k, `[batch, shard, heads, head_dim]`: batch, heads, dtype and device.
        additions: how many additions there will be.
        rounds: whether the last addition rounds to the dtype of `like`: not what still travels or is scaled.
        parts: 1, or 2 for dk and dv.
        before: called before anything that was added is read.
        after: called when it has been, before it is freed.
    """

    def __init__(
        self, piece: Piece, like: Tensor, additions: int, rounds: bool = True, parts: int = 1,
        before: Callable[[], None] = _nothing, after: Callable[[], None] = _nothing,
    ) -> None:  # fmt: skip
        self.piece, self._like, self._ahead, self._rounds, self._parts, self._before = piece, like, additions, rounds, parts, before
        self._after = after
        self._held: list[Tensor] | None = None
        self._late = _Late[tuple[Tensor, ...]](rounds, TOGETHER_MADE)

    def add(self, start: int, stop: int, *parts: Tensor, lent: bool = False) -> None:
        """Adds to rows `[start, stop)`; may keep and overwrite `parts`, unless they are `lent` until `settle`."""
        self._ahead -= 1
        if self._held is None and (start, stop) == (self.piece.start, self.piece.stop):
            self._held = [part.clone() if lent else part for part in parts]
            return
        self._late.put(start - self.piece.start, parts, lent, self._ahead)
        if self._late.is_due:
            self.settle()

    def settle(self, lent: bool = False) -> None:
        """Adds what was put off; with `lent`, where some of it was lent."""
        if not self._late.others or (lent and not self._late.lent):
            return
        self._before()
        result = accumulator_dtype(self._like.dtype) if self._ahead or not self._rounds else self._like.dtype
        held, others = self._hold(result), self._late.take()
        if held[0].dtype != result:
            self._held = self._empty(result)
        assert self._held is not None
        # dk and dv that lie side by side are one launch.
        whole, into, added = adjacent(held), adjacent(self._held), [adjacent(parts) for _, parts in others]
        if whole is not None and into is not None and all(other is not None and len(other) == len(whole) for other in added):
            add_(whole, [(0, other) for other in added if other is not None], into=None if into is whole else into)
        else:
            for i, (part, target) in enumerate(zip(held, self._held, strict=True)):
                add_(part, [(start, parts[i]) for start, parts in others], into=None if target is part else target)
        self._after()

    def rows(self, start: int, stop: int) -> list[Tensor]:
        """The rows as they stand, views, in the dtype of the last addition: as wide as they need to be."""
        self.settle()
        self._before()
        held = self._hold(accumulator_dtype(self._like.dtype))
        return [part[start - self.piece.start : stop - self.piece.start] for part in held]

    def result(self) -> list[Tensor]:
        """The parts as `[batch, rows, heads, head_dim]`, contiguous, in the dtype of `like` where it rounds."""
        held = self.rows(self.piece.start, self.piece.stop)
        return [part.movedim(0, 1).contiguous() for part in (_cast(held, self._like.dtype) if self._rounds else held)]

    def _hold(self, dtype: torch.dtype) -> list[Tensor]:
        """What was first there of all rows, or zeros of `dtype`."""
        if self._held is None:
            self._held = self._zeros(dtype)
        return self._held

    def _zeros(self, dtype: torch.dtype) -> list[Tensor]:
        return [part.zero_() for part in self._empty(dtype)]

    def _empty(self, dtype: torch.dtype) -> list[Tensor]:
        batch, _, heads, head_dim = self._like.shape
        both = self._like.new_empty((self._parts, batch, len(self.piece), heads, head_dim), dtype=dtype)
        return [part.movedim(1, 0) for part in both]


class _Late(Generic[Parts]):
    """Additions that are put off: for each its first row and its tensors.

    Args:
        waits: whether any may be: not those of a sum that stays wide.
        most: how many, if their memory was not lent.

    Attributes:
        others: in the order in which they came.
        lent: whether some of it is in memory that will be overwritten.
        is_due: whether all of it is to be added now: to wait for what is to come would take more memory than their sum does.
    """

    def __init__(self, waits: bool, most: int = TOGETHER) -> None:
        self._waits, self._most = waits, most
        self.others: list[tuple[int, Parts]] = []
        self.lent = self.is_due = False

    def put(self, start: int, parts: Parts, lent: bool, ahead: int) -> None:
        """One more; `ahead`: how many are to come."""
        self.others.append((start, parts))
        self.lent |= lent
        narrow = parts[0].dtype != accumulator_dtype(parts[0].dtype)
        self.is_due = not (self._waits and narrow and len(self.others) + ahead <= (TOGETHER if lent else self._most))

    def take(self) -> list[tuple[int, Parts]]:
        """All of it, which then is none. What comes after it is not put off: their sum is there already."""
        others, self.others, self.lent, self._waits = self.others, [], False, False
        return others


def _cast(parts: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """All in `dtype`, in one launch where they lie side by side."""
    if parts[0].dtype == dtype:
        return parts
    whole = adjacent(parts)
    return [part.to(dtype) for part in parts] if whole is None else list(whole.to(dtype).split([len(part) for part in parts]))
