"""Norms, gated feed-forwards and rotary embeddings that are known, in one pass over memory each: they cost what their bytes cost.

In a decoder layer as transformers writes it, norms and activations are a dozen passes in float32; at 65,536 tokens a GPU they took as long
as a third of the attention (measured on H100), and turning queries and keys, ten passes, 4% of a training step at 16,384 (H200). Here they
are the same functions with the same roundings, fused where a GPU and Triton are there. Everything else, and every module that is not known,
runs as transformers wrote it.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from functools import cache, wraps
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ringspan.kernels import autocast_dtype, first_order
from ringspan.transformer.layers import replace_forward

WIDEST = 16384
"""Of hidden states: a row is one program's."""
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_ROUNDED_FIRST = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")
_ONE_PLUS = ("GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm")
_GATED = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP")
_ROTATED = (
    "LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention", "GemmaAttention", "Gemma2Attention", "Gemma3Attention",
)  # fmt: skip
_ROTATION, _ROTATION_SLOT = "apply_rotary_pos_emb", "_ringspan_unfused_rotation"
_SILU = ("SiLU", "SiLUActivation")


class Norm(NamedTuple):
    """Of an RMSNorm, `x / √(mean(x²) + eps)` times its weight: `one_plus` that, in float32 (Gemma), or rounded first (Llama)."""

    eps: float
    one_plus: bool


def known_norm(module: nn.Module) -> Norm | None:
    """What kind of RMSNorm `module` is, or None for another module."""
    name = type(module).__name__
    if name in _ROUNDED_FIRST or name in _ONE_PLUS:
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if isinstance(eps, float):
            return Norm(eps, name in _ONE_PLUS)
    return None


def is_gated(module: nn.Module) -> bool:
    """Whether `module` is `down(silu(gate(x)) · up(x))`."""
    return type(module).__name__ in _GATED and type(getattr(module, "act_fn", None)).__name__ in _SILU


def can_fuse(x: Tensor) -> bool:
    """Whether there are kernels for hidden states like `x`."""
    # Of a DTensor each rank has a part, which these do not know.
    plain = type(x) is Tensor and x.is_cuda and x.dtype in _DTYPES and x.shape[-1] <= WIDEST
    return plain and autocast_dtype("cuda") is None and _has_triton()


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def feed_forward(module: nn.Module, forward: Callable[[Tensor], Any], x: Tensor) -> Any:
    """`forward(x)`, which is `module`'s: fused where it is its class's own, and gated."""
    own = getattr(forward, "__func__", None) is type(module).forward
    if not (own and is_gated(module) and can_fuse(x)):
        return forward(x)
    inner: Any = module
    return inner.down_proj(fused_gate(inner.gate_proj(x), inner.up_proj(x)))


def fuse_rotation(attention: nn.Module) -> None:
    """Has an attention module that is known turn queries and keys in one pass each. In place; others are left as they are.

    transformers looks the rotation up among its module's names, so this one module gets its class's forward with another name there: no
    other model is touched.
    """
    own = type(attention).forward
    if type(attention).__name__ not in _ROTATED or getattr(attention.forward, "__func__", None) is not own:
        return
    plain = inspect.unwrap(own)
    if isinstance(plain, FunctionType) and _ROTATION in plain.__code__.co_names and _ROTATION in plain.__globals__:
        names = {**plain.__globals__, _ROTATION: _rotation(plain.__globals__[_ROTATION])}
        forward = FunctionType(plain.__code__, names, plain.__name__, plain.__defaults__, plain.__closure__)
        forward.__kwdefaults__ = plain.__kwdefaults__
        replace_forward(attention, forward, _ROTATION_SLOT)


def _rotation(original: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    @wraps(original)
    def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **more: Any) -> tuple[Tensor, Tensor]:
        if rest or more or not (can_rotate(q, cos, sin) and can_rotate(k, cos, sin)):
            return original(q, k, cos, sin, *rest, **more)
        return fused_rotate(q, cos, sin), fused_rotate(k, cos, sin)

    return apply


def can_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether there is a kernel for `rotate(x, cos, sin)`."""
    return (
        can_fuse(x)
        and x.ndim == 4
        and x.shape[3] % 2 == 0
        and cos.shape == sin.shape
        and cos.shape in ((x.shape[0], x.shape[2], x.shape[3]), (1, x.shape[2], x.shape[3]))
        and cos.dtype == sin.dtype == x.dtype
        and not (cos.requires_grad or sin.requires_grad)
    )


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotary embedding (RoFormer, 2104.09864, eq. 34) in plain torch, as transformers computes it: the specification.

    Args:
        x: `[batch, heads, seq, head_dim]`.
        cos: of the angles, `[batch or 1, seq, head_dim]`.
        sin: likewise.
    """
    left, right = x.chunk(2, -1)
    return x * cos.unsqueeze(1) + torch.cat((-right, left), -1) * sin.unsqueeze(1)


def fused_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotate` as one kernel each way, rounded where it rounds or less often; the backward keeps the angles alone."""
    return _Rotate.apply(x, cos, sin)


def rms_norm(x: Tensor, weight: Tensor, norm: Norm) -> Tensor:
    """The norm in plain torch, as transformers computes it: the specification."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps)
    return (normed * (1.0 + weight.float())).type_as(x) if norm.one_plus else weight * normed.to(x.dtype)


def fused_rms_norm(x: Tensor, weight: Tensor, norm: Norm) -> Tensor:
    """`rms_norm` as one kernel each way; the backward keeps `x` alone.

    Args:
        x: `[…, hidden]`.
        weight: `[hidden]`.
        norm: of which kind.
    """
    return _RMSNorm.apply(x, weight, norm)


def fused_gate(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) · up`, rounded between as torch does, as one kernel each way.

    Args:
        gate: `[…, intermediate]`.
        up: likewise.
    """
    return _Gate.apply(gate, up)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, norm: Norm) -> Tensor:
        from ringspan.kernels.fused_layer import norm_forward

        ctx.save_for_backward(x, weight)
        ctx.norm = norm
        dtype = x.dtype if norm.one_plus else torch.promote_types(x.dtype, weight.dtype)
        return norm_forward(_rows(x), weight, norm.eps, norm.one_plus, dtype).view(x.shape)

    @staticmethod
    @first_order
    def backward(ctx, *gradients: Tensor):
        from ringspan.kernels.fused_layer import norm_backward

        x, weight = ctx.saved_tensors
        dx, dweight = norm_backward(_rows(x), weight, _rows(gradients[0]), ctx.norm.eps, ctx.norm.one_plus)
        return dx.view(x.shape), dweight.to(weight.dtype) if ctx.needs_input_grad[1] else None, None


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        from ringspan.kernels.fused_layer import gated_forward

        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return gated_forward(gate, up)

    @staticmethod
    @first_order
    def backward(ctx, *gradients: Tensor):
        from ringspan.kernels.fused_layer import gated_backward

        gate, up = ctx.saved_tensors
        return gated_backward(gate, up, gradients[0].contiguous())


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, backward=False)

    @staticmethod
    @first_order
    def backward(ctx, *gradients: Tensor):
        return _rotated(gradients[0], *ctx.saved_tensors, backward=True), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
    from ringspan.kernels.fused_layer import rotate

    return rotate(x if x.stride(-1) == 1 else x.contiguous(), cos, sin, backward)


def _rows(x: Tensor) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()
