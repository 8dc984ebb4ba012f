"""The loss of tokens from their logits, and its gradient in the logits' place, as one Triton kernel: computed in float32, rounded once.

`ringspan.transformer.tiled_loss` has the formula in plain torch, which is the specification and goes over the logits some ten times, in
float32; this goes over them twice, as they are: 6 bytes a logit in half precision instead of about 50.
"""

from __future__ import annotations

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

LARGEST_BLOCK = 4096
"""Logits of one token that a program holds at a time."""


@triton.jit
def _logits(raw, multiplier, softcap, HAS_SOFTCAP: tl.constexpr):
    x = raw.to(tl.float32) * multiplier
    if HAS_SOFTCAP:
        # tanh by way of a sigmoid, which is in every Triton.
        x = softcap * (2.0 * tl.sigmoid(2.0 * x / softcap) - 1.0)
    return x


@triton.jit
def _token_loss_kernel(
    logits, labels, factor, losses, row_stride, columns, multiplier, softcap, smoothing, z_loss, ignore_index,
    HAS_SOFTCAP: tl.constexpr, WITH_GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    first = logits + row * row_stride
    label = tl.load(labels + row)
    counted = label != ignore_index
    strange = counted & ((label < 0) | (label >= columns))
    target = tl.where(counted & (label >= 0) & (label < columns), label, 0)
    weight = tl.where(counted, tl.load(factor).to(tl.float32), 0.0)
    wanted = _logits(tl.load(first + target), multiplier, softcap, HAS_SOFTCAP)
    column = tl.arange(0, BLOCK)
    highest = float("-inf")
    normaliser = 0.0
    total = 0.0
    for start in range(0, columns, BLOCK):
        inside = start + column < columns
        x = _logits(tl.load(first + start + column, inside, other=0.0), multiplier, softcap, HAS_SOFTCAP)
        total += tl.sum(tl.where(inside, x, 0.0))
        x = tl.where(inside, x, float("-inf"))
        above = tl.maximum(highest, tl.max(x))
        normaliser = normaliser * tl.exp(highest - above) + tl.sum(tl.exp(x - above))
        highest = above
    lse = highest + tl.log(normaliser)
    loss = lse - (1.0 - smoothing) * wanted - smoothing * total / columns + z_loss * lse * lse
    loss = tl.where(counted, loss * weight, 0.0)
    # There is no such logit, and nothing else is read in its stead.
    tl.store(losses + row, tl.where(strange, float("nan"), loss))
    if WITH_GRADIENT:
        # The logits of this token have all been read before the first of them is overwritten.
        tl.debug_barrier()
        scale = (1.0 + 2.0 * z_loss * lse) / normaliser
        for start in range(0, columns, BLOCK):
            inside = start + column < columns
            x = _logits(tl.load(first + start + column, inside, other=0.0), multiplier, softcap, HAS_SOFTCAP)
            gradient = tl.exp(x - highest) * scale - smoothing / columns
            gradient = tl.where(start + column == target, gradient - (1.0 - smoothing), gradient)
            if HAS_SOFTCAP:
                share = x / softcap
                gradient = gradient * (1.0 - share * share)
            # A token that does not count has none, whatever its logits are.
            gradient = tl.where(counted, gradient * weight * multiplier, 0.0)
            tl.store(first + start + column, gradient.to(logits.dtype.element_ty), inside)


def fused_token_loss_(
    logits: Tensor,
    labels: Tensor,
    factor: Tensor,
    *,
    multiplier: float,
    softcap: float | None,
    label_smoothing: float,
    z_loss: float,
    ignore_index: int,
    with_gradient: bool,
) -> Tensor:
    """The sum over tokens of `factor · (lse − (1−ε)·x_label − ε·mean(x) + z·lse²)`, `x = softcap · tanh(multiplier · logits / softcap)`.

    Args:
        logits: `[tokens, vocabulary]`, rows contiguous; what they are is lost where a gradient is wanted.
        labels: `[tokens]`, int64; below the vocabulary's size, or `ignore_index`. Any other makes the loss NaN.
        factor: a tensor of one element on the same device.
        multiplier: of the logits.
        softcap: of them, or None.
        label_smoothing: ε.
        z_loss: z.
        ignore_index: the label of tokens that do not count.
        with_gradient: whether `logits` becomes the loss's gradient by them, in their dtype.

    Returns:
        A scalar, float32.
    """
    tokens, columns = logits.shape
    assert logits.stride(-1) == 1
    losses = logits.new_empty(tokens, dtype=factor.dtype)
    if tokens:
        block = min(LARGEST_BLOCK, triton.next_power_of_2(columns))
        _token_loss_kernel[(tokens,)](  # pyright: ignore[reportIndexIssue]
            logits, labels.contiguous(), factor, losses, logits.stride(0), columns,
            float(multiplier), float(softcap or 1.0), float(label_smoothing), float(z_loss), ignore_index,
            HAS_SOFTCAP=softcap is not None, WITH_GRADIENT=with_gradient, BLOCK=block, num_warps=8,
        )  # fmt: skip
    return losses.sum()
