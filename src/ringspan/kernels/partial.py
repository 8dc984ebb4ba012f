"""Partial attention and its merge: the arithmetic that lets attention be computed in parts.

A partial result of some keys is `out = softmax(scores) v` with `lse = log Σ exp(scores)`. Two partials of disjoint keys merge into the
partial of their union (Liu et al. 2310.01889, equation of the running numerator and denominator, in the form that keeps quotients):

    lse = log(exp(lse₁) + exp(lse₂))        out = exp(lse₁ − lse) out₁ + exp(lse₂ − lse) out₂

The identity is `out = 0, lse = −inf`: a row that has seen no key yet. Inside, partials are kept rows first, `out [rows, batch, heads,
head_dim]` and `lse [rows, batch, heads]`, so that any span of a shard is contiguous and travels without a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32: what partials, lse and gradients are accumulated in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def merge_(out: Tensor, lse: Tensor, others: Sequence[tuple[int, Tensor, Tensor]], *, into: tuple[Tensor, Tensor] | None = None) -> None:
    """Merges other partials into rows of `out [rows, batch, heads, head_dim]`, `lse [rows, batch, heads]`, in place.

    Associative and commutative up to rounding, with the identity `0, −inf`; rows where all are empty stay zero and never become NaN.
    Computed in float32 or wider and rounded once, to the dtype of what is written, however many they are.

    Args:
        out: any dtype; the last merge of a partial may be made in the dtype that the kernel gave it.
        lse: of its rows, float32 or wider.
        others: for each the row of `out` that is its first, its own rows of out, any dtype, and their lse.
        into: buffers like `out` and `lse` that take all rows, merged or not, in place of these.
    """
    if into is None:
        (out, lse), others = _hull([out, lse], others)
        into = out, lse
    if out.is_cuda and lse.dtype == torch.float32 and (fused := _fused()) is not None:
        fused.fused_merge_(out, lse, others, into)
        return
    if len(others) > 1:
        # The sum of all but the last is kept wide.
        wide = out.to(lse.dtype, copy=True), lse.clone()
        for other in others[:-1]:
            merge_(*wide, [other])
        merge_(*wide, others[-1:], into=into)
        return
    ((start, other_out, other_lse),) = others
    rows = slice(start, start + other_out.shape[0])
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


def add_(held: Tensor, others: Sequence[tuple[int, Tensor]], *, into: Tensor | None = None) -> None:
    """Adds others to rows of `held [rows, batch, heads, head_dim]`, in place, in float32 or wider, rounded once, however many they are.

    Args:
        held: any dtype.
        others: for each the row of `held` that is its first, and its rows, any dtype.
        into: a buffer like `held` that takes all rows, added to or not, in its place.
    """
    if into is None:
        (held,), others = _hull([held], others)
        into = held
    wide = accumulator_dtype(held.dtype)
    if held.is_cuda and wide == torch.float32 and (fused := _fused()) is not None:
        fused.fused_add_(held, others, into)
        return
    # One addition is made in float32 and rounded by torch itself.
    total = into if into.dtype == wide or (len(others) == 1 and into is held) else torch.empty_like(into, dtype=wide)
    if total is not held:
        total.copy_(held)
    for start, other in others:
        total[start : start + len(other)].add_(other)
    if total is not into:
        into.copy_(total)


def _hull(tensors: list[Tensor], others: Sequence[tuple[Any, ...]]) -> tuple[list[Tensor], list[tuple[Any, ...]]]:
    """The rows of `tensors` from the first to the last that `others` reach, and `others` counted from there."""
    first = min(start for start, *_ in others)
    past = max(start + len(rows) for start, rows, *_ in others)
    return [tensor[first:past] for tensor in tensors], [(start - first, *rest) for start, *rest in others]


@cache
def _fused() -> Any:
    """The module of the same as one kernel each, where Triton is installed (torch's CUDA builds bring it)."""
    try:
        from ringspan.kernels import fused_merge
    except ImportError:
        return None
    return fused_merge


def rows_first(tensor: Tensor) -> Tensor:
    """`[batch, seq, …]` as `[seq, batch, …]`, a view."""
    return tensor.transpose(0, 1)


def batch_first(tensor: Tensor) -> Tensor:
    """`[rows, batch, …]` as `[batch, rows, …]`, a view."""
    return tensor.transpose(0, 1)
