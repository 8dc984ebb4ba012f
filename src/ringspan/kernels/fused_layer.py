"""The elementwise parts of a decoder layer as Triton kernels, each one pass over memory, forward and backward: RMSNorm, the gated SiLU, and
the rotary embedding.

Every rounding that transformers makes on the way forward is made here, at the same place; between it all is float32. What they compute is
written in plain torch in `ringspan.transformer.fused`.
"""

from __future__ import annotations

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

BLOCK = 2048
PROGRAMS = 1024
"""At most so many sum the gradient of a norm's weight, each over its rows: enough to fill a GPU, few enough to add up."""


@triton.jit
def _norm_forward(x, weight, y, x_row, hidden, eps, WIDTH: tl.constexpr, ONE_PLUS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < hidden
    wide = tl.load(x + row * x_row + column, inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + column, inside, other=0.0).to(tl.float32)
    normed = wide * tl.rsqrt(tl.sum(wide * wide) / hidden + eps)
    if ONE_PLUS:
        result = normed * (1.0 + scale)
    else:
        result = scale * normed.to(x.dtype.element_ty).to(tl.float32)
    tl.store(y + row * hidden + column, result.to(y.dtype.element_ty), inside)


@triton.jit
def _norm_backward(
    x, weight, dy, dx, dweight, x_row, dy_row, rows, hidden, eps, WIDTH: tl.constexpr, ONE_PLUS: tl.constexpr
):  # fmt: skip
    column = tl.arange(0, WIDTH)
    inside = column < hidden
    scale = tl.load(weight + column, inside, other=0.0).to(tl.float32)
    if ONE_PLUS:
        scale = 1.0 + scale
    total = tl.zeros((WIDTH,), tl.float32)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        place = tl.cast(row, tl.int64)
        wide = tl.load(x + place * x_row + column, inside, other=0.0).to(tl.float32)
        gradient = tl.load(dy + place * dy_row + column, inside, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(wide * wide) / hidden + eps)
        normed = wide * inverse
        if ONE_PLUS:
            total += gradient * normed
        else:
            total += gradient * normed.to(x.dtype.element_ty).to(tl.float32)
        # Beyond `hidden` both factors are 0.
        scaled = tl.where(inside, gradient * scale, 0.0)
        result = inverse * (scaled - normed * (tl.sum(scaled * normed) / hidden))
        tl.store(dx + place * hidden + column, result.to(dx.dtype.element_ty), inside)
    tl.store(dweight + tl.program_id(0) * hidden + column, total, inside)


@triton.jit
def _gated_forward(gate, up, out, elements, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < elements
    g = tl.load(gate + place, inside, other=0.0).to(tl.float32)
    u = tl.load(up + place, inside, other=0.0).to(tl.float32)
    active = (g / (1.0 + tl.exp(-g))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + place, (active * u).to(out.dtype.element_ty), inside)


@triton.jit
def _gated_backward(gate, up, dout, dgate, dup, elements, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < elements
    g = tl.load(gate + place, inside, other=0.0).to(tl.float32)
    u = tl.load(up + place, inside, other=0.0).to(tl.float32)
    d = tl.load(dout + place, inside, other=0.0).to(tl.float32)
    share = 1.0 / (1.0 + tl.exp(-g))
    active = (g * share).to(dup.dtype.element_ty).to(tl.float32)
    tl.store(dup + place, (d * active).to(dup.dtype.element_ty), inside)
    tl.store(dgate + place, (d * u * share * (1.0 + g * (1.0 - share))).to(dgate.dtype.element_ty), inside)


@triton.jit
def _rotate(
    x, cos, sin, y, length, heads, half, x_batch, x_position, x_head, angles_batch, HEADS: tl.constexpr, WIDTH: tl.constexpr,
    BACKWARD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch, position = row // length, row % length
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    inside = (head < heads) & (column < half)
    angle = batch * angles_batch + position * 2 * half + column
    cos_left = tl.load(cos + angle, column < half, other=0.0).to(tl.float32)
    cos_right = tl.load(cos + angle + half, column < half, other=0.0).to(tl.float32)
    sin_left = tl.load(sin + angle, column < half, other=0.0).to(tl.float32)
    sin_right = tl.load(sin + angle + half, column < half, other=0.0).to(tl.float32)
    read = x + batch * x_batch + position * x_position + head.to(tl.int64) * x_head + column
    left = tl.load(read, inside, other=0.0).to(tl.float32)
    right = tl.load(read + half, inside, other=0.0).to(tl.float32)
    if BACKWARD:
        # The transposed rotation: what the left half gave to the right comes back, and the other way round.
        turned_left, turned_right = right * sin_right, -(left * sin_left)
    else:
        turned_left, turned_right = -(right * sin_left), left * sin_right
    dtype: tl.constexpr = y.dtype.element_ty
    new_left = (left * cos_left).to(dtype).to(tl.float32) + turned_left.to(dtype).to(tl.float32)
    new_right = (right * cos_right).to(dtype).to(tl.float32) + turned_right.to(dtype).to(tl.float32)
    write = y + (row * heads + head) * 2 * half + column
    tl.store(write, new_left.to(dtype), inside)
    tl.store(write + half, new_right.to(dtype), inside)


def norm_forward(x: Tensor, weight: Tensor, eps: float, one_plus: bool, dtype: torch.dtype) -> Tensor:
    """`x [rows, hidden]`, its rows anywhere, to `[rows, hidden]` of `dtype`, contiguous."""
    rows, hidden = x.shape
    y = torch.empty((rows, hidden), dtype=dtype, device=x.device)
    if rows:
        width = triton.next_power_of_2(hidden)
        _norm_forward[(rows,)](  # pyright: ignore[reportIndexIssue]
            x, weight, y, x.stride(0), hidden, eps, WIDTH=width, ONE_PLUS=one_plus, num_warps=_warps(width)
        )
    return y


def norm_backward(x: Tensor, weight: Tensor, dy: Tensor, eps: float, one_plus: bool) -> tuple[Tensor, Tensor]:
    """dx, contiguous, of the dtype of x, and dweight in float32."""
    rows, hidden = x.shape
    dx = torch.empty((rows, hidden), dtype=x.dtype, device=x.device)
    programs = min(rows, PROGRAMS)
    parts = torch.empty((programs, hidden), dtype=torch.float32, device=x.device)
    if rows:
        width = triton.next_power_of_2(hidden)
        _norm_backward[(programs,)](  # pyright: ignore[reportIndexIssue]
            x, weight, dy, dx, parts, x.stride(0), dy.stride(0), rows, hidden, eps,
            WIDTH=width, ONE_PLUS=one_plus, num_warps=_warps(width),
        )  # fmt: skip
    return dx, parts.sum(0)


def gated_forward(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) · up`, all contiguous and of one dtype."""
    out = torch.empty_like(gate)
    if gate.numel():
        _gated_forward[(triton.cdiv(gate.numel(), BLOCK),)](gate, up, out, gate.numel(), BLOCK=BLOCK, num_warps=8)  # pyright: ignore[reportIndexIssue]
    return out


def gated_backward(gate: Tensor, up: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `gate` and `up`."""
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    if gate.numel():
        _gated_backward[(triton.cdiv(gate.numel(), BLOCK),)](  # pyright: ignore[reportIndexIssue]
            gate, up, dout, dgate, dup, gate.numel(), BLOCK=BLOCK, num_warps=8
        )
    return dgate, dup


def rotate(x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
    """`x [batch, heads, seq, head_dim]` turned by the angles, or by the transposed rotation; in memory as `[batch, seq, heads, head_dim]`.

    Args:
        x: its last dimension contiguous.
        cos: `[batch or 1, seq, head_dim]`, contiguous, of the dtype of x.
        sin: likewise.
        backward: which of both.
    """
    batch, heads, length, head_dim = x.shape
    y = torch.empty((batch, length, heads, head_dim), dtype=x.dtype, device=x.device)
    if y.numel():
        width = triton.next_power_of_2(head_dim // 2)
        together = min(triton.next_power_of_2(heads), max(1, BLOCK // width))
        _rotate[(batch * length, triton.cdiv(heads, together))](  # pyright: ignore[reportIndexIssue]
            x, cos, sin, y, length, heads, head_dim // 2, x.stride(0), x.stride(2), x.stride(1), cos.stride(0) if cos.shape[0] > 1 else 0,
            HEADS=together, WIDTH=width, BACKWARD=backward, num_warps=4,
        )  # fmt: skip
    return y.transpose(1, 2)


def _warps(width: int) -> int:
    return min(16, max(1, width // 512))
