"""What a score is besides q kᵀ: scale, softcap, a user's mask_mod. And sinks, which act on the merged result."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ringspan.geometry import Layout, MaskMod, Tile
from ringspan.kernels import Scores, is_captured


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """The part of `Scores` that all tiles of one attention share."""

    scale: float
    softcap: float | None = None
    mask_mod: MaskMod | None = None
    first_head: int = 0
    deterministic: bool = False


_CAPTURED: set[TileScores] = set()
"""Whose tensors graphs read that others have captured."""


class TileScores:
    """Makes the `Scores` of each tile, with global positions where a mask_mod asks for them.

    Args:
        scoring: what all tiles share.
        layout: tells the positions of each owner's shard.
        device: where the positions are wanted.
    """

    def __init__(self, scoring: Scoring, layout: Layout, device: torch.device) -> None:
        self.scoring, self._layout, self._device = scoring, layout, device
        self._positions: dict[int, Tensor] = {}
        self._packed: dict[tuple[Tile, ...], Scores] = {}

    def from_head(self, head: int) -> TileScores:
        """The same for tensors whose first query head is number `head` of these."""
        if self.scoring.mask_mod is None or head == 0:
            return self
        later = TileScores(replace(self.scoring, first_head=self.scoring.first_head + head), self._layout, self._device)
        # A kernel knows a tile again by where its positions lie.
        later._positions = self._positions
        return later

    @property
    def shard_lengths(self) -> tuple[int, ...]:
        """How many positions each owner has."""
        return self._layout.shard_lengths

    def keep_if_captured(self) -> None:
        """If the current stream is captured, what kernels read of these scores stays where it is: nobody says when that graph ends."""
        if is_captured(self._device):
            _CAPTURED.add(self)

    def __call__(self, q_owner: int, kv_owner: int, tile: Tile, parts: tuple[Tile, ...] = ()) -> Scores:
        scoring = self.scoring
        if scoring.mask_mod is None:
            if (made := self._packed.get(parts)) is None:
                made = Scores(tile, scoring.scale, scoring.softcap, deterministic=scoring.deterministic, parts=parts)
                if parts:
                    # It holds where the parts begin, on the device: as long as a graph of this plan reads it there.
                    self._packed[parts] = made
            return made
        return Scores(
            tile, scoring.scale, scoring.softcap, scoring.mask_mod,
            self._of(q_owner)[tile.q_start : tile.q_stop], self._of(kv_owner)[tile.k_start : tile.k_stop], scoring.first_head,
            deterministic=scoring.deterministic,
        )  # fmt: skip

    def _of(self, owner: int) -> Tensor:
        if owner not in self._positions:
            with torch.inference_mode(False):
                self._positions[owner] = torch.tensor(self._layout.positions(owner), device=self._device)
        return self._positions[owner]


def add_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """One more key a head, with score `sinks [heads]` and value zero (gpt-oss): it takes weight and gives nothing.

    Args:
        out: `[batch, shard, heads, head_dim]`, merged.
        lse: `[batch, heads, shard]`, merged.
        sinks: a score for each head.
    """
    with_sink = torch.logaddexp(lse, sinks.to(lse.dtype).view(1, -1, 1).expand_as(lse))
    weight = torch.exp(lse - with_sink)
    return (out * weight.transpose(1, 2).unsqueeze(-1)).to(out.dtype), with_sink


def sinks_gradient(dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None, sinks: Tensor) -> Tensor:
    """d loss / d sinks over this rank's rows: Σ exp(sink − lse) · (dlse − Σ dO ∘ out), with `out` and `lse` after `add_sinks`."""
    delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1).transpose(1, 2)
    slope = -delta if dlse is None else dlse - delta
    return (torch.exp(sinks.to(lse.dtype).view(1, -1, 1) - lse) * slope).sum((0, 2)).to(sinks.dtype)
