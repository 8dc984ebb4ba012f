"""The fused kernels beside their specification, on whatever device there is: a GPU, or with TRITON_INTERPRET=1 a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ringspan.transformer.fused import Norm, fused_gate, fused_rms_norm, fused_rotate, rms_norm, rotate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter cuts bfloat16 off where a GPU rounds.
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16
SHAPES = ((1, 1, 8), (2, 37, 96), (1, 5, 1000), (3, 0, 64), (1, 1100, 128))


def relative(found: Tensor, exact: Tensor) -> float:
    """‖found − exact‖ / ‖exact‖."""
    return float((found.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-30))


def check_norm(shape: tuple[int, ...], dtype: torch.dtype, weight_dtype: torch.dtype, one_plus: bool) -> None:
    """Forward like the specification, up to the last bit of few; gradients as close to float64's as the specification's are."""
    torch.manual_seed(0)
    norm = Norm(1e-5, one_plus)
    x = (torch.randn(shape, device=DEVICE) * 3).to(dtype)
    weight = torch.randn(shape[-1], device=DEVICE).to(weight_dtype)
    dy = torch.randn(shape, device=DEVICE)

    def run(function, dtype_of: torch.dtype | None = None) -> list[Tensor]:
        leaves = [(tensor if dtype_of is None else tensor.to(dtype_of)).detach().requires_grad_() for tensor in (x, weight)]
        y = function(*leaves, norm)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]

    def exact(x: Tensor, weight: Tensor, norm: Norm) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.eps) * (1 + weight if norm.one_plus else weight)

    found, specified, whole = run(fused_rms_norm), run(rms_norm), run(exact, torch.float64)
    for ours, theirs, true in zip(found, specified, whole, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert not ours.isnan().any()
        if ours.numel():
            assert relative(ours, true) <= 1.05 * relative(theirs, true) + 2e-6, (shape, dtype, one_plus, relative(ours, true))
    if found[0].numel():
        # Where rsqrt and sums differ in a last bit, few roundings fall otherwise.
        assert (found[0] != specified[0]).float().mean() < (0.02 if dtype != torch.float32 else 1.0)


def check_gate(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """As close to float64 as torch's silu and product are, which round between."""
    torch.manual_seed(1)
    gate, up, dout = ((torch.randn(shape, device=DEVICE) * 3).to(dtype) for _ in range(3))

    def run(function, dtype_of: torch.dtype = dtype) -> list[Tensor]:
        leaves = [tensor.to(dtype_of).detach().requires_grad_() for tensor in (gate, up)]
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(dtype_of))]

    def specified(gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

    for ours, theirs, true in zip(run(fused_gate), run(specified), run(specified, torch.float64), strict=True):
        assert ours.dtype == theirs.dtype and not ours.isnan().any()
        if ours.numel():
            assert relative(ours, true) <= 1.05 * relative(theirs, true) + 2e-6, (shape, dtype, relative(ours, true))


ROTATED = ((1, 1, 3, 8, 1), (2, 5, 37, 64, 2), (2, 32, 9, 128, 1), (1, 3, 11, 80, 1), (2, 2, 0, 64, 2), (1, 9, 7, 256, 1))
"""Batch, heads, positions, head_dim, and for how many of the batch there are angles."""


def check_rotation(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    """Value and gradient from queries as projections leave them: products and sum are rounded once each, or less where they are fused."""
    torch.manual_seed(2)
    batch, heads, length, head_dim, angles = shape
    x = torch.randn(batch, length, heads, head_dim, device=DEVICE).to(dtype).transpose(1, 2)
    # Both halves differ, as they do not in a model.
    cos, sin = torch.randn(2, angles, length, head_dim, device=DEVICE).to(dtype)
    together = torch.randn(batch, length, heads, head_dim, device=DEVICE).to(dtype).transpose(1, 2)

    def run(function, dy: Tensor, *angles: Tensor) -> list[Tensor]:
        leaf = x.to(dy.dtype).detach().requires_grad_()
        y = function(leaf, *angles)
        return [y.detach(), *torch.autograd.grad(y, leaf, dy)]

    exact = run(rotate, together.double(), cos.double(), sin.double())
    # Where nothing cancels: what each of the products and their sum is rounded from.
    sizes = [
        (part * cos.unsqueeze(1)).abs().double() + (torch.cat(part.chunk(2, -1)[::-1], -1) * turned.unsqueeze(1)).abs().double()
        for part, turned in ((x, sin), (together, torch.cat(sin.chunk(2, -1)[::-1], -1)))
    ]
    # A gradient in memory as it pleases, its heads apart, and its columns.
    for dy in (together, together.contiguous(), together.transpose(2, 3).contiguous().transpose(2, 3)):
        for ours, true, size in zip(run(fused_rotate, dy, cos, sin), exact, sizes, strict=True):
            assert ours.dtype == dtype and ours.shape == true.shape
            assert ((ours.double() - true).abs() <= 2.05 * torch.finfo(dtype).eps / 2 * size).all(), (shape, dtype)
            assert ours.transpose(1, 2).is_contiguous()


def main() -> None:
    """Every shape, dtype and kind."""
    for shape in ROTATED:
        for dtype in (torch.float32, HALF):
            check_rotation(shape, dtype)
    for shape in SHAPES:
        for dtype in (torch.float32, HALF):
            check_gate(shape, dtype)
            for one_plus in (False, True):
                check_norm(shape, dtype, dtype, one_plus)
    check_norm(SHAPES[1], HALF, torch.float32, False)
    # Rows that do not follow each other in memory.
    x = torch.randn(4, 6, 32, device=DEVICE).transpose(0, 1)
    weight = torch.randn(32, device=DEVICE)
    assert relative(fused_rms_norm(x, weight, Norm(1e-5, False)), rms_norm(x, weight, Norm(1e-5, False))) < 1e-6
    print("passed")


if __name__ == "__main__":
    main()
