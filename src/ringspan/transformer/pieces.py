"""Tokens in pieces over the ranks of a tensor axis: gathered before heads and columns are split, summed and cut up again after.

Korthikanti et al. (2205.05198) call the two g and ḡ: an all-gather whose backward is a reduce-scatter, and the reverse.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ringspan.transformer.accumulate import wide_dtype

# Torch 2.13 renamed them.
_ALL_GATHER: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_REDUCE_SCATTER: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_BLOCK_ELEMENTS = 1 << 25
"""Of a weight that is gathered or summed at a time."""


@dataclass(frozen=True, eq=False)
class TensorGroup:
    """The ranks that share heads and feed-forward columns, and each hold a piece of the tokens elsewhere.

    `length` tokens make `size` pieces of ⌈length / size⌉; what the last ones lack is filled up. 5 tokens on two ranks, `·` the filling:

        rank 0   a b c
        rank 1   d e ·

    Nothing is computed from the filling that anyone reads: it is cut off before attention, its labels do not count, and its gradient is 0.

    Attributes:
        group: the process group.
        rank: this rank in it.
        size: how many ranks.
    """

    group: dist.ProcessGroup
    rank: int
    size: int

    def __deepcopy__(self, memo: dict) -> TensorGroup:
        """Itself: a copied model talks to the same ranks."""
        return self

    def piece_length(self, length: int) -> int:
        """Tokens of every rank, filling included."""
        return -(-length // self.size)

    def take(self, x: Tensor, fill: float = 0) -> Tensor:
        """This rank's piece of `x [batch, length, …]`, the same on every rank: `[batch, piece, …]`. The gradient is of this piece alone."""
        piece = self.piece_length(x.shape[1])
        start = min(self.rank * piece, x.shape[1])
        own = x[:, start : start + piece]
        missing = piece - own.shape[1]
        return F.pad(own, [0, 0] * (x.ndim - 2) + [0, missing], value=fill) if missing else own

    def gather(self, piece: Tensor, length: int) -> Tensor:
        """All tokens `[batch, length, …]` of the pieces `[batch, piece, …]`; the gradient of a piece sums what all ranks ask of it (g)."""
        return _joined(self.gather_rows(piece), self.size, length)

    def show(self, piece: Tensor, length: int) -> Tensor:
        """As `gather`, for what every rank then does alike: the gradient of a piece is what its own rank asks of it."""
        return _joined(_Moved.apply(piece, self, _gather, _own_rows), self.size, length)

    def sum_pieces(self, x: Tensor) -> Tensor:
        """This rank's piece of the sum over the ranks of `x [batch, length, …]` (ḡ)."""
        batch, length = x.shape[:2]
        piece = self.piece_length(length)
        missing = piece * self.size - length
        full = F.pad(x, [0, 0] * (x.ndim - 2) + [0, missing]) if missing else x
        return self.sum_rows(full.unflatten(1, (self.size, piece)).transpose(0, 1).reshape(self.size * batch, piece, *x.shape[2:]))

    def gather_rows(self, x: Tensor) -> Tensor:
        """`[rows, …]` of every rank under one another; the gradient is summed over the ranks."""
        return _Moved.apply(x, self, _gather, _sum)

    def sum_rows(self, x: Tensor) -> Tensor:
        """This rank's share of the rows of the sum over the ranks of `x [size · rows, …]`."""
        return _Moved.apply(x, self, _sum, _gather)


def _joined(rows: Tensor, size: int, length: int) -> Tensor:
    """`[size · batch, piece, …]` to `[batch, length, …]`."""
    return rows.unflatten(0, (size, -1)).transpose(0, 1).flatten(1, 2)[:, :length]


def _gather(x: Tensor, group: TensorGroup) -> Tensor:
    out = x.new_empty(group.size * x.shape[0], *x.shape[1:])
    _ALL_GATHER(out, x.contiguous(), group=group.group)
    return out


def _sum(x: Tensor, group: TensorGroup) -> Tensor:
    out = x.new_empty(x.shape[0] // group.size, *x.shape[1:])
    _REDUCE_SCATTER(out, x.contiguous(), group=group.group)
    return out


def _own_rows(x: Tensor, group: TensorGroup) -> Tensor:
    return x.chunk(group.size)[group.rank]


_Move = Callable[[Tensor, TensorGroup], Tensor]


class _Moved(torch.autograd.Function):
    """One way forward, another for the gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, group: TensorGroup, there: _Move, back: _Move) -> Tensor:
        ctx.group, ctx.back = group, back
        return there(x, group)

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        return ctx.back(gradients[0], ctx.group), None, None, None


class SumGradient(torch.autograd.Function):
    """A parameter that every rank holds whole and uses for its own tokens or heads: its gradient is summed over the ranks, in float32."""

    @staticmethod
    def forward(ctx, x: Tensor, group: TensorGroup) -> Tensor:
        """The same values."""
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        """One sum over the ranks."""
        total = gradients[0].to(wide_dtype(gradients[0].dtype), copy=True, memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group.group)
        return total.to(gradients[0].dtype), None


class GatherColumns(torch.autograd.Function):
    """A weight of which every rank holds some columns, whole: what FSDP does with rows, for a weight that is read once or twice a pass.

    Some rows at a time, so that beside the weight nothing of its size exists. The gradient is summed over the ranks in float32.
    """

    @staticmethod
    def forward(ctx, columns: Tensor, group: TensorGroup) -> Tensor:
        """`[rows, columns / size]` to `[rows, columns]`."""
        ctx.group = group
        whole = columns.new_empty(columns.shape[0], group.size * columns.shape[1])
        for rows in _row_blocks(whole):
            part = _gather(columns[rows], group).unflatten(0, (group.size, -1))
            whole[rows].unflatten(1, (group.size, -1)).copy_(part.transpose(0, 1))
        return whole

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        """This rank's columns of the sum."""
        group: TensorGroup = ctx.group
        (gradient,) = gradients
        own = gradient.new_empty(gradient.shape[0], gradient.shape[1] // group.size)
        for rows in _row_blocks(gradient):
            part = gradient[rows].unflatten(1, (group.size, -1)).transpose(0, 1).to(wide_dtype(gradient.dtype))
            own[rows] = _sum(part.flatten(0, 1), group)
        return own, None


def _row_blocks(x: Tensor) -> list[slice]:
    rows = max(1, _BLOCK_ELEMENTS // x.shape[1])
    return [slice(start, start + rows) for start in range(0, x.shape[0], rows)]
