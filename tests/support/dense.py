"""Dense attention in float64 by definition, differentiated by autograd: nothing of ringspan has a part in it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tensors:
    """`q, dout [batch, length, heads, head_dim]`, `k, v [batch, length, kv_heads, head_dim]`, `dlse [batch, heads, length]` or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor | None = None


@dataclass(frozen=True)
class Outcome:
    """What attention gives, shaped as in `Tensors`; `lse [batch, heads, length]`, `dsinks [heads]` where there are sinks."""

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor
    dsinks: Tensor | None = None

    def named(self) -> dict[str, Tensor]:
        """Those that there are, by name."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}


def make_tensors(
    length: int, *, batch: int = 2, heads: int = 4, kv_heads: int = 2, head_dim: int = 8, dtype: torch.dtype = torch.float64,
    seed: int = 0, with_dlse: bool = False,
) -> Tensors:  # fmt: skip
    """Standard normal tensors; the same seed gives the same ones in every dtype, but for rounding."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, dout = (normal(batch, length, heads, head_dim).to(dtype) for _ in range(2))
    k, v = (normal(batch, length, kv_heads, head_dim).to(dtype) for _ in range(2))
    wide = torch.promote_types(dtype, torch.float32)
    return Tensors(q, k, v, dout, normal(batch, heads, length).to(wide) if with_dlse else None)


def dense(
    tensors: Tensors, allowed: Tensor, *, scale: float | None = None, softcap: float | None = None, sinks: Tensor | None = None
) -> Outcome:
    """softmax(q kᵀ · scale) v over the `allowed [queries, keys]` pairs, and all gradients. Queries that see nothing: out 0, lse −∞."""
    q, k, v = (tensor.double().detach().requires_grad_() for tensor in (tensors.q, tensors.k, tensors.v))
    sink = None if sinks is None else sinks.double().detach().requires_grad_()
    group = q.shape[2] // k.shape[2]
    keys, values = (tensor.repeat_interleave(group, dim=2).permute(0, 2, 1, 3) for tensor in (k, v))
    scores = q.permute(0, 2, 1, 3) @ keys.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    empty = ~allowed.any(-1) & (sink is None)
    # An empty row gets finite scores for the softmax's sake, and what comes of them is taken out again.
    scores = scores.masked_fill(~allowed & ~empty.unsqueeze(-1), float("-inf"))
    if sink is not None:
        scores = torch.cat((scores, sink.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)), -1)
    lse = torch.logsumexp(scores, -1)
    weights = torch.softmax(scores, -1)[..., : keys.shape[2]].masked_fill(empty.unsqueeze(-1), 0.0)
    out = (weights @ values).permute(0, 2, 1, 3)
    loss = (out * tensors.dout.double()).sum()
    if tensors.dlse is not None:
        loss = loss + (lse * tensors.dlse.double()).masked_fill(empty, 0.0).sum()
    leaves = (q, k, v) if sink is None else (q, k, v, sink)
    dq, dk, dv, *dsinks = torch.autograd.grad(loss, leaves)
    return Outcome(out.detach(), lse.detach().masked_fill(empty, float("-inf")), dq, dk, dv, dsinks[0] if dsinks else None)
