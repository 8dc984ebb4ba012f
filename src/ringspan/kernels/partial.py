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


def merge_(
    out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor, *, start: int = 0, into: tuple[Tensor, Tensor] | None = None
) -> None:
    """Merges another partial into rows from `start` on of `out [rows, batch, heads, head_dim]`, `lse [rows, batch, heads]`, in place.

    Associative and commutative up to rounding, with the identity `0, −inf`; rows where both are empty stay zero and never become NaN.
    Computed in float32 or wider and rounded once, to the dtype of what is written.

    Args:
        out: any dtype; the last merge of a partial may be made in the dtype that the kernel gave it.
        lse: of its rows, float32 or wider.
        other_out: the other's rows, any dtype.
        other_lse: likewise.
        start: the row of `out` that is the other's first.
        into: buffers like `out` and `lse` that take all rows, merged or not, in place of these.
    """
    rows = slice(start, start + other_out.shape[0])
    if into is None:
        out, lse = out[rows], lse[rows]
        rows, into = slice(0, out.shape[0]), (out, lse)
    if out.is_cuda and lse.dtype == torch.float32 and (fused := _fused()) is not None:
        fused(out, lse, other_out, other_lse, rows.start, into)
        return
    into_out, into_lse = into
    if into_out is not out:
        for kept in (slice(0, rows.start), slice(rows.stop, None)):
            into_out[kept].copy_(out[kept])
            into_lse[kept].copy_(lse[kept])
    out, lse, other_lse = out[rows], lse[rows], other_lse.to(lse.dtype)
    merged = torch.logaddexp(lse, other_lse)
    # A row that neither side has seen: −inf − −inf is NaN, so its weights are taken against 0 instead, and both are exp(−inf) = 0.
    reference = torch.where(torch.isneginf(merged), torch.zeros_like(merged), merged)
    total = out * torch.exp(lse - reference).unsqueeze(-1)  # lse is wide, and with it the product
    total.addcmul_(other_out.to(total.dtype), torch.exp(other_lse - reference).unsqueeze(-1))
    into_out[rows].copy_(total)
    into_lse[rows].copy_(merged)


@cache
def _fused() -> Callable[..., None] | None:
    """The same as one kernel, where Triton is installed (torch's CUDA builds bring it)."""
    try:
        from ringspan.kernels.fused_merge import fused_merge_
    except ImportError:
        return None
    return fused_merge_


def rows_first(tensor: Tensor) -> Tensor:
    """`[batch, seq, …]` as `[seq, batch, …]`, a view."""
    return tensor.transpose(0, 1)


def batch_first(tensor: Tensor) -> Tensor:
    """`[rows, batch, …]` as `[batch, rows, …]`, a view."""
    return tensor.transpose(0, 1)
