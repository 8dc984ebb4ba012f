"""What FlexAttention is told of a tile: which blocks of it are empty, full or mixed, and what holds inside the mixed ones."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from ringspan.kernels.capture import is_captured
from ringspan.kernels.protocol import Scores

BLOCK = 128
"""Rows and columns of a block, FlexAttention's own choice."""
KEPT = 128
"""Tiles whose blocks are kept: a plan's forward and backward meet the same ones at every step."""


@dataclass(frozen=True)
class FlexTile:
    """A tile in FlexAttention's terms.

    Args:
        block_mask: None where all pairs are allowed.
        score_mod: scale and softcap.
        held: positions that stay alive as long as this is kept, so that no other tensor comes to lie where they lie.
    """

    block_mask: BlockMask | None
    score_mod: Callable[..., Tensor]
    held: tuple[Tensor | None, Tensor | None]


class FlexTiles:
    """The tiles met last and what was made of them, and for good what a captured graph reads."""

    def __init__(self, limit: int = KEPT) -> None:
        self._limit = limit
        self._kept: OrderedDict[Any, FlexTile] = OrderedDict()
        self._captured: list[FlexTile] = []

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, scores: Scores, batch: int, heads: int, device: torch.device) -> FlexTile:
        """What FlexAttention is told of the tile, for tensors of `batch` sequences and `heads` query heads."""
        tile = scores.tile
        places = tuple(None if x is None else (x.data_ptr(), x.stride(), len(x)) for x in (scores.q_positions, scores.k_positions))
        key = (
            tile.num_queries, tile.num_keys, tile.low, tile.high, scores.scale, scores.softcap, scores.mask_mod, places,
            scores.first_head, batch, heads, device,
        )  # fmt: skip
        if (found := self._kept.get(key)) is not None:
            self._kept.move_to_end(key)
            if is_captured(device) and all(each is not found for each in self._captured):
                self._captured.append(found)
            return found
        # A backward saves what is made here, and autograd saves no tensor that was made in inference mode.
        with torch.inference_mode(False), torch.no_grad():
            made = self._kept[key] = FlexTile(
                block_mask(scores, batch, heads, device), score_mod(scores, device), (scores.q_positions, scores.k_positions)
            )
        if len(self._kept) > self._limit:
            self._kept.popitem(last=False)
        return made


def block_mask(scores: Scores, batch: int, heads: int, device: torch.device) -> BlockMask | None:
    """The blocks of the tile; None where all pairs are allowed. Evaluated a row of blocks at a time: memory grows with the keys alone."""
    if scores.tile.kind == "full" and scores.mask_mod is None:
        return None
    queries, keys = scores.tile.num_queries, scores.tile.num_keys
    some, every = [], []
    for start in range(0, queries, BLOCK):
        allowed = scores.allowed(slice(start, min(start + BLOCK, queries)), batch, heads, device)
        assert allowed is not None
        allowed = allowed.expand(*allowed.shape[:2], allowed.shape[2], keys)
        # A block that reaches beyond the tile is a mixed one, as torch has it: inside full ones nothing asks where the tile ends.
        beyond = (0, -keys % BLOCK, 0, -allowed.shape[2] % BLOCK)
        padded = torch.nn.functional.pad(allowed, beyond).unflatten(-1, (-1, BLOCK))
        some.append(padded.any(-1).any(-2))
        every.append(padded.all(-1).all(-2))
    some, every = torch.stack(some, 2), torch.stack(every, 2)
    return BlockMask.from_kv_blocks(
        *_listed(some & ~every), *_listed(every), BLOCK_SIZE=BLOCK, mask_mod=mask_mod(scores, device), seq_lengths=(queries, keys)
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of each row are marked, and which: the marked ones first, in order."""
    order = torch.argsort((~blocks).to(torch.int8), dim=-1, stable=True)
    return blocks.sum(-1, dtype=torch.int32), order.to(torch.int32)


def mask_mod(scores: Scores, device: torch.device) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """`Scores.allowed` as a function of one pair of the tile. Bounds are tensors: as numbers, each tile would be compiled anew."""
    tile, mod = scores.tile, scores.mask_mod
    low = None if tile.low is None else torch.tensor(tile.low, device=device)
    high = None if tile.high is None else torch.tensor(tile.high, device=device)
    first = torch.tensor(scores.first_head, device=device)
    q_positions, k_positions = scores.q_positions, scores.k_positions

    def allowed(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        result = q >= 0
        if low is not None:
            result = result & (q - kv >= low)
        if high is not None:
            result = result & (q - kv <= high)
        if mod is not None:
            assert q_positions is not None and k_positions is not None
            result = result & mod(b, h + first, q_positions[q], k_positions[kv])
        return result

    return allowed


def score_mod(scores: Scores, device: torch.device) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    """`softcap · tanh(q kᵀ · scale / softcap)` of the bare q kᵀ, with numbers as tensors, likewise."""
    scale = torch.tensor(scores.scale, device=device, dtype=torch.float32)
    if scores.softcap is None:

        def scaled(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return score * scale

        return scaled
    softcap = torch.tensor(scores.softcap, device=device, dtype=torch.float32)

    def capped(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return softcap * torch.tanh(score * scale / softcap)

    return capped
