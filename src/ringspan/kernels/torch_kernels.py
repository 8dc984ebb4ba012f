"""The flash kernels inside torch: its own on the CPU, cuDNN and FlashAttention-2 on CUDA. Each takes strided views and grouped heads."""

from __future__ import annotations

import torch
from torch import Tensor

from ringspan.geometry import Tile
from ringspan.kernels.protocol import Problem

aten = torch.ops.aten
_HALF = (torch.float16, torch.bfloat16)


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    """`[batch, seq, heads, head_dim]` as `[batch, heads, seq, head_dim]`, views."""
    return [tensor.transpose(1, 2) for tensor in tensors]


def _dtype_refusal(problem: Problem, device: str, dtypes: tuple[torch.dtype, ...]) -> str | None:
    if problem.device != device:
        return f"it runs on {device}, and the tensors are on {problem.device}"
    if problem.dtype not in dtypes:
        return f"it computes {', '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)}, not {str(problem.dtype).removeprefix('torch.')}"
    return None


class TorchCpu:
    """Torch's CPU flash attention. Its fully masked rows come back with lse 0 instead of −inf, so it is only given tiles without any."""

    name = "torch_cpu"
    shapes = frozenset({"causal", "square"})
    lse_gradient = False

    def refusal(self, problem: Problem) -> str | None:
        """CPU tensors in float64, float32, bfloat16 or float16."""
        return _dtype_refusal(problem, "cpu", (torch.float64, torch.float32, *_HALF))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tile: Tile, scale: float) -> tuple[Tensor, Tensor]:
        """See `Kernel.forward`."""
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(*_heads_first(q, k, v), 0.0, tile.kind == "causal", scale=scale)
        return out.transpose(1, 2), lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None, tile: Tile, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernel.backward`."""
        assert dlse is None
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *_heads_first(dout, q, k, v, out), lse, 0.0, tile.kind == "causal", scale=scale
        )
        dq, dk, dv = _heads_first(*grads)
        return dq, dk, dv


class CuDnn:
    """cuDNN's fused attention: the fastest on Hopper inside torch."""

    name = "cudnn"
    shapes = frozenset({"causal", "square"})
    lse_gradient = False

    def refusal(self, problem: Problem) -> str | None:
        """CUDA tensors in bfloat16 or float16 with heads of at most 128, a multiple of 8, on compute capability 8.0 or later."""
        if (reason := _dtype_refusal(problem, "cuda", _HALF)) is not None:
            return reason
        if problem.head_dim % 8 or problem.head_dim > 128:
            return f"it computes head sizes that are multiples of 8 up to 128, not {problem.head_dim}"
        if torch.cuda.get_device_capability() < (8, 0):
            return f"it wants compute capability 8.0, and this GPU has {torch.cuda.get_device_capability()}"
        return None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tile: Tile, scale: float) -> tuple[Tensor, Tensor]:
        """See `Kernel.forward`."""
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(
            *_heads_first(q, k, v), None, True, 0.0, tile.kind == "causal", False, scale=scale
        )
        return out.transpose(1, 2), lse.view(lse.shape[:3])

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None, tile: Tile, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernel.backward`."""
        assert dlse is None
        seed = torch.zeros((), dtype=torch.int64, device=q.device)
        grads = aten._scaled_dot_product_cudnn_attention_backward(
            *_heads_first(dout, q, k, v, out), lse.contiguous().unsqueeze(-1), seed, seed, None, None, None,
            q.shape[1], k.shape[1], 0.0, tile.kind == "causal", scale=scale,
        )  # fmt: skip
        dq, dk, dv = _heads_first(*grads)
        return dq, dk, dv


class Flash2:
    """FlashAttention-2 as torch carries it. Its causal alignment is bottom-right, so it is given squares."""

    name = "flash2"
    shapes = frozenset({"square"})
    lse_gradient = False

    def refusal(self, problem: Problem) -> str | None:
        """CUDA tensors in bfloat16 or float16 with heads of at most 256, a multiple of 8, on compute capability 8.0 or later."""
        if (reason := _dtype_refusal(problem, "cuda", _HALF)) is not None:
            return reason
        if problem.head_dim % 8 or problem.head_dim > 256:
            return f"it computes head sizes that are multiples of 8 up to 256, not {problem.head_dim}"
        if torch.cuda.get_device_capability() < (8, 0):
            return f"it wants compute capability 8.0, and this GPU has {torch.cuda.get_device_capability()}"
        return None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tile: Tile, scale: float) -> tuple[Tensor, Tensor]:
        """See `Kernel.forward`."""
        out, lse, *_ = aten._flash_attention_forward(
            q, k, v, None, None, q.shape[1], k.shape[1], 0.0, tile.kind == "causal", False, scale=scale
        )
        return out, lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None, tile: Tile, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernel.backward`."""
        assert dlse is None
        seed = torch.zeros(2, dtype=torch.uint64, device=q.device)
        return aten._flash_attention_backward(
            dout,
            q,
            k,
            v,
            out,
            lse.contiguous(),
            None,
            None,
            q.shape[1],
            k.shape[1],
            0.0,
            tile.kind == "causal",
            seed,
            seed[:0],
            scale=scale,
        )
