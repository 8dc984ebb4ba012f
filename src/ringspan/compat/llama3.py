"""ring-flash-attention's Llama 3 functions: packed documents in contiguous shards, keys and values gathered."""

from __future__ import annotations

from collections.abc import Sequence as Numbers
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ringspan.attention.call_checks import read_integers
from ringspan.attention.calls import Group, Request, transport_of
from ringspan.attention.functional import Window, request_of
from ringspan.compat.call import PACKED, Keywords, Result, call, unpacked
from ringspan.errors import RingspanError
from ringspan.geometry import documents


@dataclass(frozen=True, eq=False)
class LocalKeys:
    """What `llama3_flash_attn_prepare_cu_seqlens` returns where its namesake returns a slice; hand it on as `local_k_slice`.

    A slice and the borders inside it say nothing of what other ranks hold, and ranks that must ask one another do so at every call.

    Attributes:
        start: the first position that this rank's queries may see.
        stop: the position behind the last one.
        borders: those of all documents.
        causal: what was prepared for.
        rank: likewise.
        num_ranks: likewise.
        cu_seqlens_q: the borders of this rank's queries.
        cu_seqlens_k: the borders of the keys between `start` and `stop`.
        max_seqlen_q: the longest part of a document among the queries.
        max_seqlen_k: likewise among the keys.
    """

    start: int
    stop: int
    borders: tuple[int, ...]
    causal: bool
    rank: int
    num_ranks: int
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int


def llama3_flash_attn_prepare_cu_seqlens(
    cu_seqlens: Tensor | Numbers[int], causal: bool, rank: int, world_size: int
) -> tuple[Tensor, Tensor, int, int, LocalKeys]:
    """ring-flash-attention's function of this name: what of the packed documents concerns this rank.

    Args:
        cu_seqlens: the borders of the documents in the whole packed sequence.
        causal: as it will be asked for.
        rank: this rank.
        world_size: the number of ranks, which divides the total.

    Returns:
        `cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k` of this rank, and `local_k_slice`.

    Raises:
        RingspanError: for borders that do not rise from 0, or a total that does not divide.
    """
    name = "llama3_flash_attn_prepare_cu_seqlens"
    borders = read_integers(name, "cu_seqlens", cu_seqlens)
    documents(borders)
    if world_size < 1 or not 0 <= rank < world_size or borders[-1] % world_size:
        raise RingspanError(
            f"{name} of {borders[-1]} tokens for rank {rank} of {world_size}",
            "",
            "Every rank owns as many tokens here",
            "ringspan.attention_varlen(…, layout='contiguous', strategy='all_gather'), for any total",
        )
    own = borders[-1] // world_size
    first, last = rank * own, (rank + 1) * own
    touched = [(start, stop) for start, stop in pairwise(borders) if start < last and stop > first]
    begin, end = touched[0][0], last if causal else touched[-1][1]
    q_borders = [0, *(min(stop, last) - first for _, stop in touched)]
    k_borders = [0, *(min(stop, end) - begin for _, stop in touched)]
    kind: dict[str, Any] = {"dtype": torch.int32}
    if isinstance(cu_seqlens, Tensor):
        kind = {"dtype": cu_seqlens.dtype, "device": cu_seqlens.device}
    cu_seqlens_q, cu_seqlens_k = (torch.tensor(some, **kind) for some in (q_borders, k_borders))
    longest_q, longest_k = (max(stop - start for start, stop in pairwise(some)) for some in (q_borders, k_borders))
    keys = LocalKeys(begin, end, borders, causal, rank, world_size, cu_seqlens_q, cu_seqlens_k, longest_q, longest_k)
    return cu_seqlens_q, cu_seqlens_k, longest_q, longest_k, keys


def _request(function: str, prepared: tuple[Any, Any, int, int], heads_k_stride: int, keys: Any, words: Keywords) -> Request:
    """`prepared` are `cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k` as the user hands them on."""
    if not isinstance(keys, LocalKeys):
        raise RingspanError(
            f"{function} with local_k_slice={keys!r}",
            "a slice says nothing of the documents on other ranks",
            "All ranks plan for the same documents",
            "ringspan.compat.llama3_flash_attn_prepare_cu_seqlens, which is called like its namesake",
        )
    for name, found in zip(("cu_seqlens_q", "cu_seqlens_k"), prepared[:2], strict=True):
        # The tensors that came from there need no look, which on CUDA would be a wait.
        made = getattr(keys, name)
        if found is not made and read_integers(function, name, found) != tuple(made.tolist()):
            raise RingspanError(
                f"{function} with {name}", "it is not what was prepared", "What was prepared goes together", f"{name} as it came"
            )
    transport = transport_of(words.group)
    for name, made, found in (
        ("causal", keys.causal, words.causal),
        ("rank", keys.rank, transport.rank),
        ("world_size", keys.num_ranks, transport.size),
        ("max_seqlen_q", keys.max_seqlen_q, prepared[2]),
        ("max_seqlen_k", keys.max_seqlen_k, prepared[3]),
    ):
        if made != found:
            raise RingspanError(function, f"it was prepared for {name}={made} and called with {found}", "", f"{name}={made} in both")
    return request_of(
        function, "all_gather", "contiguous", "auto", words.causal, words.window_size, keys.borders,
        length=keys.borders[-1], options=(("kv_heads_per_stage", heads_k_stride),),
    )  # fmt: skip


def llama3_flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    heads_k_stride: int,
    local_k_slice: LocalKeys,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: Group = None,
) -> Result:
    """ring-flash-attention's function of this name: contiguous shards of packed documents, keys and values gathered.

    `q [shard, heads, head_dim]`, `k, v [shard, kv_heads, head_dim]`. What `llama3_flash_attn_prepare_cu_seqlens` returned is handed on as
    it came. `heads_k_stride` key heads are gathered at a time. A window is computed; see `ringspan.attention_varlen` for the other
    arguments. `return_attn_probs` returns `(out, lse [heads, shard], None)`.
    """
    own = "llama3_flash_attn_varlen_func"
    words = Keywords(dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs, group)
    prepared = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return call(own, PACKED, lambda: (q, k, v), lambda q: _request(own, prepared, heads_k_stride, local_k_slice, words), words)


def llama3_flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    heads_k_stride: int,
    local_k_slice: LocalKeys,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: Group = None,
) -> Result:
    """`llama3_flash_attn_varlen_func` of `kv [shard, 2, kv_heads, head_dim]`."""
    own = "llama3_flash_attn_varlen_kvpacked_func"
    words = Keywords(dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs, group)
    prepared = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return call(
        own,
        PACKED,
        lambda: (q, *unpacked(own, "kv", kv, PACKED, 2)),
        lambda q: _request(own, prepared, heads_k_stride, local_k_slice, words),
        words,
    )


def llama3_flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    heads_k_stride: int,
    local_k_slice: LocalKeys,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: Group = None,
) -> Result:
    """`llama3_flash_attn_varlen_func` of `qkv [shard, 3, heads, head_dim]`."""
    own = "llama3_flash_attn_varlen_qkvpacked_func"
    words = Keywords(dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs, group)
    prepared = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return call(
        own,
        PACKED,
        lambda: unpacked(own, "qkv", qkv, PACKED, 3),
        lambda q: _request(own, prepared, heads_k_stride, local_k_slice, words),
        words,
    )
