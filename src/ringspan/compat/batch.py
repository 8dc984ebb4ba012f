"""ring-flash-attention's functions for batches: one sequence, cut into shards of one length."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ringspan.attention.calls import Group, Request
from ringspan.attention.functional import Window, request_of
from ringspan.compat.call import BATCHED, Keywords, Result, call, refuse_window, unpacked
from ringspan.errors import RingspanError

_DOCSTRING = """ring-flash-attention's `{name}`: {layout} shards, the same length on every rank.

See `ringspan.attention` for the arguments. Refused are what its namesake ignored or got wrong: dropout, ALiBi, a window.
`return_attn_probs` returns `(out, lse [batch, heads, shard], None)`. Every rank owns {owns}.
"""
_OWNS = {
    "contiguous": "the part of its number",
    "zigzag": "the parts r and 2N − 1 − r of 2N",
    "striped": "the positions ≡ r modulo N",
}


def batch_forms(name: str, layout: str) -> tuple[Any, Any, Any]:
    """`{name}_func`, `{name}_kvpacked_func` and `{name}_qkvpacked_func` over shards of `layout`."""

    def request(function: str, q: Tensor, words: Keywords) -> Request:
        refuse_window(function, words.window_size, f"ringspan.attention(q, k, v, window_size={words.window_size}, layout={layout!r}, …)")
        if layout == "zigzag" and q.shape[1] % 2:
            raise RingspanError(
                f"{function} of shards of {q.shape[1]} tokens",
                "a zigzag shard is two parts, and these are of different lengths",
                "The 2N parts of a sequence are of one length here",
                "ringspan.attention(q, k, v, layout='zigzag', …), for any length",
            )
        return request_of(function, "ring", layout, "auto", words.causal, (-1, -1), length=None, shard_length=q.shape[1])

    def func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: Window = (-1, -1),
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
        group: Group = None,
    ) -> Result:
        words = Keywords(dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs, group)
        own = f"{name}_func"
        return call(own, BATCHED, lambda: (q, k, v), lambda q: request(own, q, words), words)

    def kvpacked_func(
        q: Tensor,
        kv: Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: Window = (-1, -1),
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
        group: Group = None,
    ) -> Result:
        words = Keywords(dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs, group)
        own = f"{name}_kvpacked_func"
        return call(own, BATCHED, lambda: (q, *unpacked(own, "kv", kv, BATCHED, 2)), lambda q: request(own, q, words), words)

    def qkvpacked_func(
        qkv: Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: Window = (-1, -1),
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
        group: Group = None,
    ) -> Result:
        words = Keywords(dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs, group)
        own = f"{name}_qkvpacked_func"
        return call(own, BATCHED, lambda: unpacked(own, "qkv", qkv, BATCHED, 3), lambda q: request(own, q, words), words)

    forms = (func, kvpacked_func, qkvpacked_func)
    for form in forms:
        form.__name__ = form.__qualname__ = f"{name}_{form.__name__}"
        form.__doc__ = _DOCSTRING.format(name=form.__name__, layout=layout, owns=_OWNS[layout])
    return forms


ring_flash_attn_func, ring_flash_attn_kvpacked_func, ring_flash_attn_qkvpacked_func = batch_forms("ring_flash_attn", "contiguous")
zigzag_ring_flash_attn_func, zigzag_ring_flash_attn_kvpacked_func, zigzag_ring_flash_attn_qkvpacked_func = batch_forms(
    "zigzag_ring_flash_attn", "zigzag"
)
stripe_flash_attn_func, stripe_flash_attn_kvpacked_func, stripe_flash_attn_qkvpacked_func = batch_forms("stripe_flash_attn", "striped")
