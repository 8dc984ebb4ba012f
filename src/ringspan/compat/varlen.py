"""ring-flash-attention's functions for packed documents, each of which is shared by all ranks."""

from __future__ import annotations

from collections.abc import Sequence as Numbers
from itertools import pairwise
from typing import Any

from torch import Tensor

from ringspan.attention.call_checks import check_longest, read_integers
from ringspan.attention.calls import Group, Request
from ringspan.attention.functional import Window, mask_of
from ringspan.compat.call import PACKED, Keywords, Result, call, refuse_window, unpacked
from ringspan.errors import RingspanError
from ringspan.geometry import Layout, Mask, Span, documents, make_layout

_DOCSTRING = """ring-flash-attention's `{name}`: every document is cut over all ranks, {layout}, and shards are packed documents.

`cu_seqlens` are the borders of this rank's parts, which are the same on every rank: the documents' borders divided by the number of
ranks. `max_seqlen` is the longest part. See `ringspan.attention` for the other arguments. Refused are what its namesake ignored or got
wrong: dropout, ALiBi, a window. `return_attn_probs` returns `(out, lse [heads, shard], None)`.
"""


def document_layout(layout: str, parts: tuple[int, ...], num_ranks: int) -> Layout:
    """Every document laid out over all ranks by itself; `parts` are the borders of what one rank owns of them.

    Documents of four and of eight tokens on two ranks, zigzag: `0 1 1 0 0 0 1 1 1 1 0 0`, and `parts` are 0, 2, 6.
    """
    shards: list[list[Span]] = [[] for _ in range(num_ranks)]
    for start, stop in pairwise(parts):
        document = make_layout(layout, (stop - start) * num_ranks, num_ranks)
        offset = start * num_ranks
        for shard, spans in zip(shards, document.shards, strict=True):
            for span in spans:
                moved = Span(span.start + offset, span.stop + offset, span.step)
                if shard and moved.step == 1 and shard[-1].stop == moved.start:
                    moved = Span(shard.pop().start, moved.stop)
                shard.append(moved)
    return Layout(f"{layout} by document", parts[-1] * num_ranks, tuple(map(tuple, shards)))


def varlen_forms(name: str, layout: str) -> tuple[Any, Any, Any]:
    """`{name}_func`, `{name}_kvpacked_func` and `{name}_qkvpacked_func` over documents of which each is cut by `layout`."""

    def request(function: str, q: Tensor, cu_seqlens: Any, max_seqlen: int | None, words: Keywords) -> Request:
        refuse_window(
            function, words.window_size, f"ringspan.attention_varlen(q, k, v, …, window_size={words.window_size}), with its own shards"
        )
        parts = read_integers(function, "cu_seqlens", cu_seqlens)
        documents(parts)
        check_longest(function, "max_seqlen", max_seqlen, parts)
        if parts[-1] != q.shape[0]:
            raise RingspanError(
                f"{function} with cu_seqlens that end with {parts[-1]}",
                f"this rank's shard has {q.shape[0]} tokens",
                "cu_seqlens are the borders of this rank's parts of the documents",
                "cu_seqlens // num_ranks, or ringspan.attention_varlen with those of the whole",
            )
        odd = [border for border in parts if border % 2]
        if layout == "zigzag" and odd:
            raise RingspanError(
                f"{function} with cu_seqlens {list(parts[:8])}{'…' if len(parts) > 8 else ''}",
                f"{odd[0]} is odd",
                "A rank owns two parts of each document, of one length",
                "ringspan.attention_varlen, for documents of any length",
            )

        def make(num_ranks: int, length: int) -> tuple[Layout, Mask]:
            whole = tuple(border * num_ranks for border in parts)
            return document_layout(layout, parts, num_ranks), mask_of((None, 0 if words.causal else None), whole)

        return Request(
            function=function, strategy="ring", layout=layout, kernel="auto", length=None, shard_length=q.shape[0],
            mask=(("causal", words.causal), ("cu_seqlens", parts)), make=make,
        )  # fmt: skip

    def func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor | Numbers[int],
        max_seqlen: int | None,
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
        return call(own, PACKED, lambda: (q, k, v), lambda q: request(own, q, cu_seqlens, max_seqlen, words), words)

    def kvpacked_func(
        q: Tensor,
        kv: Tensor,
        cu_seqlens: Tensor | Numbers[int],
        max_seqlen: int | None,
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
        return call(
            own,
            PACKED,
            lambda: (q, *unpacked(own, "kv", kv, PACKED, 2)),
            lambda q: request(own, q, cu_seqlens, max_seqlen, words),
            words,
        )

    def qkvpacked_func(
        qkv: Tensor,
        cu_seqlens: Tensor | Numbers[int],
        max_seqlen: int | None,
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
        return call(
            own,
            PACKED,
            lambda: unpacked(own, "qkv", qkv, PACKED, 3),
            lambda q: request(own, q, cu_seqlens, max_seqlen, words),
            words,
        )

    forms = (func, kvpacked_func, qkvpacked_func)
    for form in forms:
        form.__name__ = form.__qualname__ = f"{name}_{form.__name__}"
        form.__doc__ = _DOCSTRING.format(name=form.__name__, layout=layout)
    return forms


ring_flash_attn_varlen_func, ring_flash_attn_varlen_kvpacked_func, ring_flash_attn_varlen_qkvpacked_func = varlen_forms(
    "ring_flash_attn_varlen", "contiguous"
)
zigzag_ring_flash_attn_varlen_func, zigzag_ring_flash_attn_varlen_kvpacked_func, zigzag_ring_flash_attn_varlen_qkvpacked_func = (
    varlen_forms("zigzag_ring_flash_attn_varlen", "zigzag")
)
