"""FlexAttention, compiled: a user's mask_mod, windows and softcap on CUDA, without scores in memory."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from ringspan.kernels.capabilities import Capabilities, Declared
from ringspan.kernels.flex_tiles import FlexTile, FlexTiles
from ringspan.kernels.partial import accumulator_dtype
from ringspan.kernels.protocol import Scores

# In-process ranks are threads that meet a new kind of tile together, and a limit of the compiler's is lifted for the process.
_COMPILING = threading.Lock()
_COMPILED_FORMS = 1024
"""How many forms of the kernel may be compiled: one for each mask_mod and each kind of band, where torch's default is 8 in all."""
_OPTIONS: Any = {"FORCE_USE_FLEX_ATTENTION": True}
"""Not the kernel for decoding, which takes fewer forms of heads."""


class Flex(Declared):
    """FlexAttention through its public function alone, which differentiates its own softmax over the tile's keys.

    A tile's share of the merged gradient needs the merged statistics instead. With `w = exp(lse_tile − lse)`, a row's merged weights are
    `w` times the tile's own, so the gradients that make FlexAttention compute that share are, for out and lse of the tile::

        dout_tile = w dO        dlse_tile = w (dlse − Σ dO ∘ out) + Σ dout_tile ∘ out_tile

    The tile's own out and lse are computed anew for this: two of seven products of a backward.

    Args:
        backend: of torch.compile. Another than `inductor` computes the scores whole: for tests.
    """

    name = "flex"
    can = Capabilities(
        shapes=frozenset({"band"}),
        features=frozenset({"window", "softcap", "mask_mod"}),
        device="cuda",
        dtypes=(torch.float16, torch.bfloat16),
        head_dims=(16, 256),
        lse_gradient=True,
        # Its backward gathers where others scatter: no sum's order depends on which program ends first.
        determinism="always",
    )

    def __init__(self, backend: str = "inductor") -> None:
        self._backend = backend
        self._tiles = FlexTiles()

    def missing(self) -> str | None:
        """Triton, which torch's CUDA builds bring."""
        return _missing() if self._backend == "inductor" else None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
        """See `Kernel.forward`."""
        with _COMPILING, torch.no_grad():
            tile = self._tiles.get(scores, q.shape[0], q.shape[2], q.device)
            out, lse = self._attend(tile, *(x.transpose(1, 2) for x in (q, k, v)))
        return out.transpose(1, 2), lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None, scores: Scores
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernel.backward`."""
        with _COMPILING, torch.enable_grad():
            tile = self._tiles.get(scores, q.shape[0], q.shape[2], q.device)
            leaves = [x.transpose(1, 2).detach().requires_grad_() for x in (q, k, v)]
            tile_out, tile_lse = self._attend(tile, *leaves)
            outer = tile_gradients(dout.transpose(1, 2), out.transpose(1, 2), lse, dlse, tile_out.detach(), tile_lse.detach())
            dq, dk, dv = torch.autograd.grad((tile_out, tile_lse), leaves, outer)
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)

    def _attend(self, tile: FlexTile, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        with torch._dynamo.config.patch(recompile_limit=_COMPILED_FORMS, accumulated_recompile_limit=_COMPILED_FORMS):
            return self._compiled(q, k, v, tile.score_mod, tile.block_mask)

    @cached_property
    def _compiled(self) -> Callable[..., tuple[Tensor, Tensor]]:
        # A form that cannot be compiled is an error: what torch would fall back to holds all scores in memory.
        return torch.compile(_attend, backend=self._backend, fullgraph=True, dynamic=True)


def _attend(q: Tensor, k: Tensor, v: Tensor, score_mod: Any, block_mask: Any) -> tuple[Tensor, Tensor]:
    out, more = flex_attention(
        q, k, v, score_mod, block_mask, scale=1.0, enable_gqa=True, kernel_options=_OPTIONS, return_aux=AuxRequest(lse=True)
    )
    assert more.lse is not None
    return out, more.lse


def tile_gradients(
    dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None, tile_out: Tensor, tile_lse: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of a tile's own out and lse whose pull-back is the tile's share of the merged gradient; see `Flex`.

    Args:
        dout: `[batch, heads, queries, head_dim]`, like `out` (merged) and `tile_out`.
        out: merged over all tiles.
        lse: `[batch, heads, queries]`, likewise.
        dlse: like `lse`, or None.
        tile_out: of this tile alone.
        tile_lse: likewise; −inf where a row sees none of its keys, and then both gradients are 0.
    """
    wide = accumulator_dtype(dout.dtype)
    weight = torch.where(torch.isneginf(tile_lse), torch.zeros_like(tile_lse, dtype=wide), torch.exp(tile_lse - lse))
    merged_delta = (dout.to(wide) * out.to(wide)).sum(-1)
    slope = -merged_delta if dlse is None else dlse - merged_delta
    outer = (dout.to(wide) * weight.unsqueeze(-1)).to(tile_out.dtype)
    # From the rounded gradient, as FlexAttention takes it off again from the same.
    return outer, (weight * slope + (outer.to(wide) * tile_out.to(wide)).sum(-1)).to(tile_lse.dtype)


def _missing() -> str | None:
    try:
        import triton  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        return f"it is compiled by Triton, which does not import here ({error})"
    return None
