"""The yardstick: dense attention and its gradients in float64, by definition, with nothing of the kernels room."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ringspan.geometry import Mask


@dataclass(frozen=True)
class Inputs:
    """Whole tensors: `q, dout [batch, length, heads, head_dim]`, `k, v [batch, length, kv_heads, head_dim]`."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor


@dataclass(frozen=True)
class Results:
    """What attention gives: `out, dq` like q, `dk, dv` like k, `lse [batch, heads, length]`."""

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


def make_inputs(
    batch: int, length: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, seed: int, device: torch.device | str = "cpu"
) -> Inputs:
    """Standard normal tensors in `dtype`, the same for one seed on every rank and device."""
    generator = torch.Generator().manual_seed(seed)

    def normal(count: int) -> Tensor:
        return torch.randn(batch, length, count, head_dim, generator=generator, dtype=torch.float64).to(device, dtype)

    return Inputs(normal(heads), normal(kv_heads), normal(kv_heads), normal(heads))


def allowed_pairs(mask: Mask, length: int, device: torch.device | str = "cpu") -> Tensor:
    """`[length, length]`, True where the query of the row sees the key of the column.

    It is written out from the mask's regions over the whole sequence, so that no tile and no layout has a part in it. A mask with a
    function of its own (`mask_mod`) is a mistake of the caller: verification reads its masks from text.
    """
    assert mask.mod is None, f"{mask} is not made of regions alone"
    allowed = torch.zeros(length, length, dtype=torch.bool, device=device)
    positions = torch.arange(length, device=device)
    for region in mask.regions(0, length, 0, length):
        rows, columns = slice(region.q_start, region.q_stop), slice(region.k_start, region.k_stop)
        distance = positions[rows].unsqueeze(1) - positions[columns]
        inside = torch.ones_like(distance, dtype=torch.bool)
        inside = inside if region.low is None else inside & (distance >= region.low)
        inside = inside if region.high is None else inside & (distance <= region.high)
        allowed[rows, columns] |= inside
    return allowed


def dense_attention(inputs: Inputs, mask: Mask, scale: float | None = None) -> Results:
    """Out, lse and gradients of `inputs` under `mask` in float64, one head at a time.

    S = q kᵀ · scale, lse = log Σ exp S, P = exp(S − lse), out = P v; dv = Pᵀ dO, dS = P ∘ (dO vᵀ − Σ dO ∘ out), dq = dS k · scale,
    dk = dSᵀ q · scale. A query that sees no key has out 0, lse −∞ and no gradient.
    """
    q, k, v, dout = (tensor.double() for tensor in (inputs.q, inputs.k, inputs.v, inputs.dout))
    batch, length, heads, head_dim = q.shape
    factor = head_dim**-0.5 if scale is None else scale
    forbidden = ~allowed_pairs(mask, length, q.device)
    out, dq, dk, dv = torch.zeros_like(q), torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    lse = q.new_zeros(batch, heads, length)
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // k.shape[2])
            queries, keys, values, grads = q[b, :, h], k[b, :, g], v[b, :, g], dout[b, :, h]
            scores = (queries @ keys.T * factor).masked_fill_(forbidden, float("-inf"))
            lse[b, h] = torch.logsumexp(scores, -1)
            weights = scores.sub_(lse[b, h].nan_to_num(neginf=0.0).unsqueeze(-1)).exp_()
            out[b, :, h] = weights @ values
            dv[b, :, g] += weights.T @ grads
            dscores = weights * (grads @ values.T - (grads * out[b, :, h]).sum(-1, keepdim=True))
            dq[b, :, h] = dscores @ keys * factor
            dk[b, :, g] += dscores.T @ queries * factor
    return Results(out, lse, dq, dk, dv)
