"""Partial attention and its merge: the arithmetic that lets attention be computed in parts.

A partial result of some keys is `out = softmax(scores) v` with `lse = log Σ exp(scores)`. Two partials of disjoint keys merge into the
partial of their union (Liu et al. 2310.01889, equation of the running numerator and denominator, in the form that keeps quotients):

    lse = log(exp(lse₁) + exp(lse₂))        out = exp(lse₁ − lse) out₁ + exp(lse₂ − lse) out₂

The identity is `out = 0, lse = −inf`: a row that has seen no key yet. Inside, partials are kept rows first, `out [rows, batch, heads,
head_dim]` and `lse [rows, batch, heads]`, so that any span of a shard is contiguous and travels without a copy.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32: what partials, lse and gradients are accumulated in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def merge_(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> None:
    """Merges another partial into `out [rows, batch, heads, head_dim]`, `lse [rows, batch, heads]`, in place.

    Associative and commutative up to rounding, with the identity `0, −inf`; rows where both are empty stay zero and never become NaN.
    """
    if out.is_cuda and out.dtype == torch.float32 and (fused := _fused()) is not None and other_out.stride(-1) == 1:
        fused(out, lse, other_out, other_lse)
        return
    merged = torch.logaddexp(lse, other_lse)
    # A row that neither side has seen: −inf − −inf is NaN, so its weights are taken against 0 instead, and both are exp(−inf) = 0.
    reference = torch.where(torch.isneginf(merged), torch.zeros_like(merged), merged)
    out.mul_(torch.exp(lse - reference).unsqueeze(-1))
    out.addcmul_(other_out.to(out.dtype), torch.exp(other_lse - reference).unsqueeze(-1).to(out.dtype))
    lse.copy_(merged)


@cache
def _fused() -> Callable[[Tensor, Tensor, Tensor, Tensor], None] | None:
    """The same as one kernel, where Triton is installed (torch's CUDA builds bring it)."""
    try:
        from ringspan.kernels.fused_merge import fused_merge_
    except ImportError:
        return None
    return fused_merge_


def rows_first(tensor: Tensor) -> Tensor:
    """`[batch, seq, …]` as `[seq, batch, …]`, a view."""
    return tensor.movedim(1, 0)


def batch_first(tensor: Tensor) -> Tensor:
    """`[rows, batch, …]` as `[batch, rows, …]`, a view."""
    return tensor.movedim(0, 1)
