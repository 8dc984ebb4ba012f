"""The reference kernel: plain torch, any dtype, any tile. It is the specification that every other kernel is measured against."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ringspan.kernels.capabilities import Capabilities, Declared
from ringspan.kernels.partial import accumulator_dtype
from ringspan.kernels.protocol import Scores

SCORES_IN_MEMORY = 1 << 24
"""How many scores the reference holds at once; longer tiles are computed by blocks of queries."""


class Reference(Declared):
    """softmax(q kᵀ · scale) v by definition, in float32, or in float64 for float64 inputs. Partials are never rounded below that."""

    name = "reference"
    can = Capabilities(
        shapes=frozenset({"causal", "square", "band"}),
        features=frozenset({"window", "softcap", "mask_mod", "scale ≤ 0"}),
        lse_gradient=True,
        float32_partials=True,
    )

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
        """See `Kernel.forward`. Rows that see no key are 0 with lse −inf."""
        outs, lses = [], []
        for rows in _blocks(q, k):
            block, _ = _block_scores(q, k, scores, rows)
            lse = torch.logsumexp(block, -1)
            weights = torch.exp(block - _finite(lse).unsqueeze(-1))
            outs.append(torch.einsum("bgrqk,bkgd->bqgrd", weights, v.to(weights.dtype)).flatten(2, 3))
            lses.append(lse.flatten(1, 2))
        return torch.cat(outs, 1), torch.cat(lses, 2)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None, scores: Scores
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernel.backward`: P = exp(S − lse), dS = P ∘ (dO vᵀ − delta + dlse), delta = Σ dO ∘ out."""
        wide = accumulator_dtype(q.dtype)
        groups = k.shape[2]
        delta = (dout.to(wide) * out.to(wide)).sum(-1).transpose(1, 2)
        delta = delta if dlse is None else delta - dlse
        dqs, dk, dv = [], torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        for rows in _blocks(q, k):
            queries, grads = (x[:, rows].to(wide).unflatten(2, (groups, -1)) for x in (q, dout))
            block, slope = _block_scores(q, k, scores, rows)
            row_lse, row_delta = (x[:, :, rows].to(wide).unflatten(1, (groups, -1)).unsqueeze(-1) for x in (lse, delta))
            weights = torch.exp(block - _finite(row_lse))
            dscores = weights * (torch.einsum("bqgrd,bkgd->bgrqk", grads, v.to(wide)) - row_delta)
            dscores = dscores * scores.scale if slope is None else dscores * slope * scores.scale
            dqs.append(torch.einsum("bgrqk,bkgd->bqgrd", dscores, k.to(wide)).flatten(2, 3))
            dk += torch.einsum("bgrqk,bqgrd->bkgd", dscores, queries)
            dv += torch.einsum("bgrqk,bqgrd->bkgd", weights, grads)
        return torch.cat(dqs, 1), dk, dv


def _blocks(q: Tensor, k: Tensor) -> Iterator[slice]:
    size = max(1, SCORES_IN_MEMORY // max(1, q.shape[0] * q.shape[2] * k.shape[1]))
    yield from (slice(start, min(start + size, q.shape[1])) for start in range(0, q.shape[1], size))


def _block_scores(q: Tensor, k: Tensor, scores: Scores, rows: slice) -> tuple[Tensor, Tensor | None]:
    """`[batch, kv_heads, heads per kv head, rows, keys]`, −inf where forbidden; and the softcap's slope 1 − tanh², where there is one."""
    wide = accumulator_dtype(q.dtype)
    queries = q[:, rows].to(wide).unflatten(2, (k.shape[2], -1))
    block = torch.einsum("bqgrd,bkgd->bgrqk", queries, k.to(wide)) * scores.scale
    slope = None
    if scores.softcap is not None:
        tanh = torch.tanh(block / scores.softcap)
        block, slope = tanh * scores.softcap, 1 - tanh * tanh
    allowed = scores.allowed(rows, q.shape[0], q.shape[2], q.device)
    if allowed is not None:
        grouped = allowed.expand(-1, q.shape[2], -1, -1).unflatten(1, (k.shape[2], -1))
        block = block.masked_fill(~grouped, float("-inf"))
    return block, slope


def _finite(lse: Tensor) -> Tensor:
    # A row that sees no key has lse −inf; −inf − −inf would be NaN where 0 is meant.
    return torch.where(torch.isneginf(lse), torch.zeros_like(lse), lse)
