"""What a kernel is: partial attention of one tile, its backward, and what it can do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ringspan.geometry import Tile


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What a kernel is asked to compute, without the lengths.

    Args:
        device: `cpu` or `cuda`.
        dtype: of q, k and v.
        heads: query heads.
        kv_heads: key and value heads, a divisor of `heads`.
        head_dim: width of a head.
    """

    device: str
    dtype: torch.dtype
    heads: int
    kv_heads: int
    head_dim: int


class Kernel(Protocol):
    """Partial attention of one tile.

    Attributes:
        name: what the user calls it.
        shapes: the tiles that it computes in one launch, beyond full ones: `causal` (low = 0, aligned top-left, any rectangle),
            `square` (low = 0 on squares only), `band` (anything). Other tiles are lowered to these, see `lowered`.
        lse_gradient: whether the backward takes a gradient of lse.
    """

    name: str
    shapes: frozenset[str]
    lse_gradient: bool

    def refusal(self, problem: Problem) -> str | None:
        """Why this kernel does not compute `problem` here, or None where it does."""
        ...

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tile: Tile, scale: float) -> tuple[Tensor, Tensor]:
        """`q [batch, queries, heads, head_dim]`, `k, v [batch, keys, kv_heads, head_dim]`, the rows of the tile alone, any strides.

        Returns `out [batch, queries, heads, head_dim]` and `lse [batch, heads, queries]` (natural log, float32 or wider).
        """
        ...

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None, tile: Tile, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv of one tile, given the *merged* `out` and `lse` of its rows, which make each tile's share exact."""
        ...


def lowered(tile: Tile, shapes: frozenset[str]) -> tuple[Tile, ...]:
    """`tile` as tiles that a kernel with `shapes` computes, covering the same pairs once.

    A causal rectangle with keys before its diagonal is a full tile and a triangle; a triangle with rows below it is a square triangle and
    a full tile.
    """
    if tile.kind == "full" or "band" in shapes:
        return (tile,)
    if tile.high is not None:
        raise NotImplementedError(f"a kernel with {set(shapes)} computes no window")
    assert tile.low is not None and tile.low <= 0, "a trimmed tile has no empty first row"
    if tile.low < 0:
        before = Tile(tile.q_start, tile.q_stop, tile.k_start, tile.k_start - tile.low)
        return (before, *lowered(Tile(tile.q_start, tile.q_stop, before.k_stop, tile.k_stop, 0), shapes))
    if "causal" in shapes or tile.num_queries == tile.num_keys:
        return (tile,)
    corner = tile.q_start + tile.num_keys
    return Tile(tile.q_start, corner, tile.k_start, tile.k_stop, 0), Tile(corner, tile.q_stop, tile.k_start, tile.k_stop)
