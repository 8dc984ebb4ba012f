"""A stand-in for the package `flash_attn`, for peers that import it where it is not installed.

The same functions over FlashAttention-2 as torch carries it (on a CPU over torch's flash kernel there, so that adapters can be tried):
results of a backward are written in place into dq, dk, dv, and a forward returns four things, as flash-attn 2.8.3 does.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from types import ModuleType

import torch
from torch import Tensor

from ringspan.geometry import Tile
from ringspan.geometry.tile import trimmed
from ringspan.kernels import KERNELS, Scores, lowered

aten = torch.ops.aten
VERSION = "2.8.3"
_NAMES = ("flash_attn", "flash_attn.flash_attn_interface")


def is_installed() -> bool:
    """Whether the real flash-attn 2 is there. FlashAttention-4 installs a `flash_attn` of its own, which has no interface of this kind."""
    try:
        return importlib.util.find_spec("flash_attn.flash_attn_interface") is not None
    except (ImportError, ValueError):
        return False


@contextmanager
def flash_attn() -> Iterator[str]:
    """Within it `import flash_attn` works: the real one where it is installed, else the stand-in. Yields which, for the report."""
    if is_installed():
        yield "flash_attn"
        return
    before = {name: sys.modules.get(name) for name in _NAMES}
    outer, inner = ModuleType(_NAMES[0]), ModuleType(_NAMES[1])
    spec = importlib.util.find_spec("flash_attn") if before[_NAMES[0]] is None else None
    places = spec.submodule_search_locations if spec is not None else getattr(before[_NAMES[0]], "__path__", None)
    outer.__path__ = list(places or [])  # so that flash_attn.cute, where it is installed, is still found
    for module in (outer, inner):
        module.__dict__.update(_FUNCTIONS, __version__=VERSION, __spec__=importlib.util.spec_from_loader(module.__name__, None))
    outer.__dict__["flash_attn_interface"] = inner
    sys.modules.update(dict(zip(_NAMES, (outer, inner), strict=True)))
    try:
        yield "flash2"
    finally:
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


def _tile(queries: int, keys: int, causal: bool, left: int, right: int) -> Tile | None:
    """The tile of flash-attn's window, which counts from the bottom-right corner; −1 is no bound."""
    corner = keys - queries
    right = 0 if causal else right
    low = -(right + corner) if right >= 0 else None
    return trimmed(0, queries, 0, keys, low, left - corner if left >= 0 else None)


def _flash_attn_forward(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int = -1,
    window_size_right: int = -1, softcap: float = 0.0, alibi_slopes: Tensor | None = None, return_softmax: bool = False,
) -> tuple[Tensor, Tensor, None, None]:  # fmt: skip
    assert not (dropout_p or softcap or alibi_slopes is not None or return_softmax), "the stand-in computes plain attention"
    if q.is_cuda:
        out, lse, *_ = aten._flash_attention_forward(
            q, k, v, None, None, q.shape[1], k.shape[1], 0.0, causal, False, scale=softmax_scale,
            window_size_left=_bound(window_size_left), window_size_right=_bound(window_size_right),
        )  # fmt: skip
        return out, lse, None, None
    out, lse = torch.zeros_like(q), q.new_full((q.shape[0], q.shape[2], q.shape[1]), float("-inf"), dtype=torch.float32)
    for rows, keys, scores in _cpu_calls(q.shape[1], k.shape[1], causal, window_size_left, window_size_right, softmax_scale):
        out[:, rows], lse[:, :, rows] = KERNELS["torch_cpu"].forward(q[:, rows], k[:, keys], v[:, keys], scores)
    return out, lse, None, None


def _flash_attn_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
    dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int = -1, window_size_right: int = -1,
    softcap: float = 0.0, alibi_slopes: Tensor | None = None, deterministic: bool = False, rng_state: Tensor | None = None,
) -> Tensor:  # fmt: skip
    if q.is_cuda:
        seed = torch.zeros(2, dtype=torch.uint64, device=q.device)
        grads = aten._flash_attention_backward(
            dout, q, k, v, out, softmax_lse, None, None, q.shape[1], k.shape[1], 0.0, causal, seed, seed[:0], scale=softmax_scale,
            window_size_left=_bound(window_size_left), window_size_right=_bound(window_size_right),
        )  # fmt: skip
        for target, gradient in zip((dq, dk, dv), grads, strict=True):
            target.copy_(gradient)
        return softmax_lse
    for target in (dq, dk, dv):
        target.zero_()
    for rows, keys, scores in _cpu_calls(q.shape[1], k.shape[1], causal, window_size_left, window_size_right, softmax_scale):
        grads = KERNELS["torch_cpu"].backward(
            dout[:, rows], q[:, rows], k[:, keys], v[:, keys], out[:, rows], softmax_lse[:, :, rows], None, scores
        )
        for target, part, gradient in zip((dq, dk, dv), (rows, keys, keys), grads, strict=True):
            target[:, part] += gradient
    return softmax_lse


def _flash_attn_varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, dropout_p: float,
    softmax_scale: float, causal: bool, window_size_left: int = -1, window_size_right: int = -1, softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, return_softmax: bool = False,
) -> tuple[Tensor, Tensor, None, None]:  # fmt: skip
    assert not (dropout_p or softcap or alibi_slopes is not None or return_softmax), "the stand-in computes plain attention"
    if q.is_cuda:
        out, lse, *_ = aten._flash_attention_forward(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0, causal, False, scale=softmax_scale,
            window_size_left=_bound(window_size_left), window_size_right=_bound(window_size_right),
        )  # fmt: skip
        return out, lse, None, None
    out, lse = torch.zeros_like(q), q.new_full((q.shape[1], q.shape[0]), float("-inf"), dtype=torch.float32)
    for rows, keys in _sequences(cu_seqlens_q, cu_seqlens_k):
        part, part_lse, *_ = _flash_attn_forward(
            q[None, rows], k[None, keys], v[None, keys], 0.0, softmax_scale, causal, window_size_left, window_size_right
        )
        out[rows], lse[:, rows] = part[0], part_lse[0]
    return out, lse, None, None


def _flash_attn_varlen_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, dropout_p: float, softmax_scale: float,
    causal: bool, window_size_left: int = -1, window_size_right: int = -1, softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, rng_state: Tensor | None = None,
) -> Tensor:  # fmt: skip
    if q.is_cuda:
        seed = torch.zeros(2, dtype=torch.uint64, device=q.device)
        grads = aten._flash_attention_backward(
            dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0, causal, seed, seed[:0],
            scale=softmax_scale, window_size_left=_bound(window_size_left), window_size_right=_bound(window_size_right),
        )  # fmt: skip
        for target, gradient in zip((dq, dk, dv), grads, strict=True):
            target.copy_(gradient)
        return softmax_lse
    for rows, keys in _sequences(cu_seqlens_q, cu_seqlens_k):
        _flash_attn_backward(
            dout[None, rows], q[None, rows], k[None, keys], v[None, keys], out[None, rows], softmax_lse[None, :, rows],
            dq[None, rows], dk[None, keys], dv[None, keys], 0.0, softmax_scale, causal, window_size_left, window_size_right,
        )  # fmt: skip
    return softmax_lse


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: tuple[int, int]) -> Tensor:
        out, lse, *_ = _flash_attn_forward(q, k, v, 0.0, scale, causal, *window)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.asked = (scale, causal, *window)
        return out

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = (torch.empty_like(tensor) for tensor in (q, k, v))
        _flash_attn_backward(gradients[0], q, k, v, out, lse, dq, dk, dv, 0.0, *ctx.asked)
        return dq, dk, dv, None, None, None


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None, deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:  # fmt: skip
    """flash-attn's function of this name, differentiable."""
    assert not (dropout_p or softcap or alibi_slopes is not None or return_attn_probs), "the stand-in computes plain attention"
    return _Attention.apply(q, k, v, q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale, causal, tuple(window_size))


def _bound(size: int) -> int | None:
    return None if size < 0 else size


def _cpu_calls(queries: int, keys: int, causal: bool, left: int, right: int, scale: float) -> list[tuple[slice, slice, Scores]]:
    tile = _tile(queries, keys, causal, left, right)
    parts = lowered(tile, KERNELS["torch_cpu"].shapes) if tile is not None else ()
    return [(slice(part.q_start, part.q_stop), slice(part.k_start, part.k_stop), Scores(part, scale)) for part in parts]


def _sequences(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> list[tuple[slice, slice]]:
    starts = zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True)
    return [(slice(*rows), slice(*keys)) for rows, keys in starts]


_FUNCTIONS = {
    function.__name__: function
    for function in (
        _flash_attn_forward, _flash_attn_backward, _flash_attn_varlen_forward, _flash_attn_varlen_backward, flash_attn_func
    )
}  # fmt: skip
