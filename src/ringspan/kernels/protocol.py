"""What a kernel is: partial attention of one tile, its backward, and what it can do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ringspan.geometry import MaskMod, Tile
from ringspan.geometry.tile import trimmed
from ringspan.kernels.capabilities import Capabilities, Problem


@dataclass(frozen=True)
class Scores:
    """How the scores of one tile come about: `softcap · tanh(q kᵀ · scale / softcap)`, −inf where the tile or `mask_mod` forbids.

    Args:
        tile: the rectangle and its band; of several tiles in one launch, the rectangle that holds them.
        scale: of q kᵀ.
        softcap: bounds the scores, None for no bound (Gemma 2).
        mask_mod: FlexAttention's function of global positions, or None.
        q_positions: global positions of the tile's rows, where `mask_mod` is given.
        k_positions: global positions of its columns, likewise.
        first_head: the global index of the first query head at hand.
        parts: several tiles that are computed in one launch (`Capabilities.varlen`), see `packed`; else empty.
        deterministic: whether the backward is to give the same bits at every run, where the kernel does so on request only.
    """

    tile: Tile
    scale: float
    softcap: float | None = None
    mask_mod: MaskMod | None = None
    q_positions: Tensor | None = field(default=None, compare=False)
    k_positions: Tensor | None = field(default=None, compare=False)
    first_head: int = 0
    parts: tuple[Tile, ...] = ()
    deterministic: bool = False
    _borders: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, compare=False, repr=False)

    def borders(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Where `parts` begin and end, in rows and keys of the launch, `[parts + 1]` each, int32 on `device`.

        They lie there as long as these scores are kept: a captured graph copies nothing from the host, and reads them at each replay.
        """
        if device not in self._borders:
            first = self.parts[0]
            rows = [0, *(part.q_stop - first.q_start for part in self.parts)]
            keys = [0, *(part.k_stop - first.k_start for part in self.parts)]
            with torch.inference_mode(False):
                found = [torch.tensor(ends, dtype=torch.int32, device=device) for ends in (rows, keys)]
            self._borders[device] = found[0], found[1]
        return self._borders[device]

    def allowed(self, rows: slice, batch: int, heads: int, device: torch.device) -> Tensor | None:
        """Which pairs of `rows` (of the tile) are allowed: boolean, broadcastable to `[batch, heads, rows, keys]`; None for all."""
        result = None
        if self.tile.kind != "full":
            i = torch.arange(rows.start, rows.stop, device=device).unsqueeze(1)
            distance = i - torch.arange(self.tile.num_keys, device=device)
            low = distance.new_full((), self.tile.low) if self.tile.low is not None else distance
            high = distance.new_full((), self.tile.high) if self.tile.high is not None else distance
            result = ((distance >= low) & (distance <= high))[None, None]
        if self.mask_mod is not None:
            assert self.q_positions is not None and self.k_positions is not None
            b = torch.arange(batch, device=device).view(-1, 1, 1, 1)
            h = torch.arange(self.first_head, self.first_head + heads, device=device).view(1, -1, 1, 1)
            said = self.mask_mod(b, h, self.q_positions[rows].view(1, 1, -1, 1), self.k_positions.view(1, 1, 1, -1))
            result = said if result is None else result & said
        return result


class Kernel(Protocol):
    """Partial attention of one tile."""

    @property
    def name(self) -> str:
        """What the user calls it."""
        ...

    @property
    def can(self) -> Capabilities:
        """What it can do."""
        ...

    @property
    def shapes(self) -> frozenset[str]:
        """Short for `can.shapes`."""
        ...

    @property
    def features(self) -> frozenset[str]:
        """Short for `can.features`."""
        ...

    @property
    def lse_gradient(self) -> bool:
        """Short for `can.lse_gradient`."""
        ...

    @property
    def rounds(self) -> bool:
        """Short for `can.rounds`."""
        ...

    def missing(self) -> str | None:
        """Why what the kernel is made of is not on this machine, or None where it is."""
        ...

    def refusal(self, problem: Problem) -> str | None:
        """Why this kernel does not compute `problem` here, or None where it does."""
        ...

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
        """`q [batch, queries, heads, head_dim]`, `k, v [batch, keys, kv_heads, head_dim]`, the rows of the tile alone, any strides.

        Returns `out [batch, queries, heads, head_dim]` and `lse [batch, heads, queries]` (natural log, float32 or wider).
        """
        ...

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None, scores: Scores
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
    if "corner" in shapes:
        return _without_rows_below(tile)
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


def packed(tiles: Sequence[Tile]) -> list[tuple[Tile, ...]]:
    """`tiles` in runs that one varlen launch computes: each part goes on in rows and keys where the one before ends, under one band.

    Documents along a shard's diagonal are one run. A band counts from a part's bottom right corner, and a bound that binds nothing in a
    part may be any.
    """
    runs: list[list[Tile]] = []
    for tile in sorted(tiles, key=lambda tile: (tile.q_start, tile.k_start)):
        if runs:
            last = runs[-1][-1]
            if (tile.q_start, tile.k_start) == (last.q_stop, last.k_stop) and common_window([*runs[-1], tile]) is not None:
                runs[-1].append(tile)
                continue
        runs.append([tile])
    return [tuple(run) for run in runs]


def common_window(parts: Sequence[Tile]) -> tuple[int | None, int | None] | None:
    """(left, right), counted from the bottom right corner, that say of each part what its own band says; None if there are none."""
    bounds = [corner_window(part) for part in parts]
    left = min((bound for bound, _ in bounds if bound is not None), default=None)
    right = min((bound for _, bound in bounds if bound is not None), default=None)
    for part, (own_left, own_right) in zip(parts, bounds, strict=True):
        # The first key lies num_keys − 1 before the corner, the last row's key; the last key num_queries − 1 after the first row's.
        if own_left != left and not (own_left is None and left is not None and left >= part.num_keys - 1):
            return None
        if own_right != right and not (own_right is None and right is not None and right >= part.num_queries - 1):
            return None
    return left, right


def corner_window(tile: Tile) -> tuple[int | None, int | None]:
    """(left, right) of a tile, counted from the bottom right corner: key ≤ query + keys − queries + right; None is no bound."""
    corner = tile.num_keys - tile.num_queries
    return None if tile.high is None else tile.high + corner, None if tile.low is None else -tile.low - corner


def _without_rows_below(tile: Tile) -> tuple[Tile, ...]:
    """The band, and apart from it the rows that its lower bound does not touch."""
    if tile.low is None or tile.num_queries <= tile.num_keys + tile.low:
        return (tile,)
    border = tile.num_keys + tile.low
    high = None if tile.high is None else tile.high - border
    above = trimmed(tile.q_start, tile.q_start + border, tile.k_start, tile.k_stop, tile.low, tile.high)
    below = trimmed(tile.q_start + border, tile.q_stop, tile.k_start, tile.k_stop, None, high)
    return tuple(part for part in (above, below) if part is not None)
