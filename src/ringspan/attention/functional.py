"""Attention under the names that hands already know: flash-attn's, its varlen form's, and SDPA's. Tensors are this rank's shards."""

from __future__ import annotations

from collections.abc import Sequence as Numbers
from typing import Any, Literal, overload

from torch import Tensor

from ringspan.attention.call_checks import check_length, check_names, check_options, check_tensors, read_borders, read_softcap, read_window
from ringspan.attention.calls import Group, Request, find_sequence, promising
from ringspan.errors import RingspanError, UnsupportedError
from ringspan.geometry import Layout, Mask, causal, documents, full, make_layout, sliding_window

Window = tuple[int | None, int | None]
"""Keys before and after the query, flash-attn's `window_size`: −1 or None is no bound."""


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = ..., window_size: Window = ..., softcap: float = ...,
    softmax_scale: float | None = ..., dropout_p: float = ..., alibi_slopes: Tensor | None = ..., deterministic: bool = ...,
    sinks: Tensor | None = ..., return_lse: Literal[False] = ..., group: Group = ..., strategy: str = ..., layout: str = ...,
    kernel: str = ..., length: int | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = ..., window_size: Window = ..., softcap: float = ...,
    softmax_scale: float | None = ..., dropout_p: float = ..., alibi_slopes: Tensor | None = ..., deterministic: bool = ...,
    sinks: Tensor | None = ..., return_lse: Literal[True], group: Group = ..., strategy: str = ..., layout: str = ...,
    kernel: str = ..., length: int | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    group: Group = None,
    strategy: str = "ring",
    layout: str = "zigzag",
    kernel: str = "auto",
    length: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """flash-attn's `flash_attn_func` over a sequence that several ranks share. Collective, forward and backward.

    The first call with new arguments is agreed on by all ranks; later calls like it only compute.

    Args:
        q: `[batch, shard, heads, head_dim]`, this rank's shard.
        k: `[batch, shard, kv_heads, head_dim]`; `kv_heads` divides `heads`.
        v: like `k`.
        causal: a query sees no key after it.
        window_size: a query sees so many keys before and after it in the whole sequence; −1 is no bound. Under `causal`, none after it.
        softcap: scores become `softcap · tanh(scores / softcap)`; 0 is none.
        softmax_scale: of the scores; 1/√head_dim if not given.
        dropout_p: refused above 0.
        alibi_slopes: refused.
        deterministic: the same bits at every run; refused where the kernel cannot promise it.
        sinks: `[heads]`, see `Sequence.attention`.
        return_lse: also return the log-sum-exp of each query's scores.
        group: see `ContextParallel`, as `strategy`, `layout` and `kernel`.
        strategy: how shards meet.
        layout: who owns which positions.
        kernel: what computes a tile.
        length: tokens of the whole sequence. Without it, all ranks must hold equally many at every call.

    Returns:
        `out`, like `q`; with `return_lse` also `lse [batch, heads, shard]`.

    Raises:
        RingspanError: on every rank and before any tensor is sent, for what is not computed exactly, for shards that do not fit the
            layout, or where the ranks disagree.
    """

    def prepare() -> Request:
        check_tensors("attention", q, k, v, "[batch, shard, heads, head_dim]")
        check_options("attention", dropout_p, alibi_slopes)
        check_names("attention", strategy=strategy, layout=layout, kernel=kernel)
        check_length("attention", length)
        rows = q.shape[1] if length is None else None
        request = request_of("attention", strategy, layout, kernel, causal, window_size, length=length, shard_length=rows)
        return promising(request, deterministic)

    sequence = find_sequence(group, "attention", prepare)
    keywords: Any = {"softcap": read_softcap(softcap), "sinks": sinks, "return_lse": return_lse}
    return sequence.attention(q, k, v, softmax_scale, **keywords)


@overload
def attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor | Numbers[int], cu_seqlens_k: Tensor | Numbers[int],
    max_seqlen_q: int | None = ..., max_seqlen_k: int | None = ..., *, causal: bool = ..., window_size: Window = ...,
    softcap: float = ..., softmax_scale: float | None = ..., dropout_p: float = ..., alibi_slopes: Tensor | None = ...,
    deterministic: bool = ..., sinks: Tensor | None = ..., return_lse: Literal[False] = ..., group: Group = ..., strategy: str = ...,
    layout: str = ..., kernel: str = ...,
) -> Tensor: ...  # fmt: skip
@overload
def attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor | Numbers[int], cu_seqlens_k: Tensor | Numbers[int],
    max_seqlen_q: int | None = ..., max_seqlen_k: int | None = ..., *, causal: bool = ..., window_size: Window = ...,
    softcap: float = ..., softmax_scale: float | None = ..., dropout_p: float = ..., alibi_slopes: Tensor | None = ...,
    deterministic: bool = ..., sinks: Tensor | None = ..., return_lse: Literal[True], group: Group = ..., strategy: str = ...,
    layout: str = ..., kernel: str = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | Numbers[int],
    cu_seqlens_k: Tensor | Numbers[int],
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    group: Group = None,
    strategy: str = "ring",
    layout: str = "zigzag",
    kernel: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """flash-attn's `flash_attn_varlen_func` over packed documents that several ranks share, cut anywhere by the borders of shards.

    See `attention` for the other arguments, and for when it is collective.

    Args:
        q: `[shard, heads, head_dim]`: this rank's shard of the whole packed sequence, which is laid out as one sequence.
        k: `[shard, kv_heads, head_dim]`.
        v: like `k`.
        cu_seqlens_q: the documents' borders in the whole packed sequence, the same on every rank: 0 first, rising, the total last. A list
            or a tensor on the CPU is read at once; a CUDA tensor is waited for at every call.
        cu_seqlens_k: the same borders.
        max_seqlen_q: not needed; where it is given, no document is longer.
        max_seqlen_k: likewise.
        causal: a query sees no key after it in its document.
        window_size: within the document.

    Returns:
        `out`, like `q`; with `return_lse` also `lse [heads, shard]`.

    Raises:
        RingspanError: as `attention` does; also for borders that do not rise from 0, or that differ between queries and keys.
    """

    def prepare() -> Request:
        check_tensors("attention_varlen", q, k, v, "[shard, heads, head_dim]")
        check_options("attention_varlen", dropout_p, alibi_slopes)
        check_names("attention_varlen", strategy=strategy, layout=layout, kernel=kernel)
        borders = read_borders("attention_varlen", cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        request = request_of("attention_varlen", strategy, layout, kernel, causal, window_size, borders, length=borders[-1])
        return promising(request, deterministic)

    sequence = find_sequence(group, "attention_varlen", prepare)
    keywords: Any = {"softcap": read_softcap(softcap), "sinks": sinks, "return_lse": return_lse}
    return without_batch(sequence.attention(q[None], k[None], v[None], softmax_scale, **keywords))


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    group: Group = None,
    strategy: str = "ring",
    layout: str = "zigzag",
    kernel: str = "auto",
    length: int | None = None,
) -> Tensor:
    """torch's `scaled_dot_product_attention` over a sequence that several ranks share. See `attention` for the last five arguments.

    Args:
        query: `[batch, heads, shard, head_dim]`, this rank's shard.
        key: `[batch, kv_heads, shard, head_dim]`.
        value: like `key`.
        attn_mask: refused: the masks of `ringspan` say more in less memory.
        dropout_p: refused above 0.
        is_causal: a query sees no key after it.
        scale: of the scores; 1/√head_dim if not given.
        enable_gqa: allow fewer key heads than query heads, as torch asks for it.

    Returns:
        `[batch, heads, shard, head_dim]`.

    Raises:
        RingspanError: as `attention` does; also for an `attn_mask`, and for grouped heads without `enable_gqa`.
    """
    name = "scaled_dot_product_attention"

    def prepare() -> Request:
        check_tensors(name, query, key, value, "[batch, heads, shard, head_dim]")
        if attn_mask is not None:
            raise UnsupportedError(
                f"{name} with an attn_mask",
                "a tensor of scores or of permissions for all pairs grows with the square of the length",
                "A mask is a rule about positions in the whole sequence",
                "ContextParallel(…).sequence(length, mask=ringspan.causal() & ringspan.mask_mod(f)).attention(q, k, v), or is_causal=True",
            )
        if query.shape[1] != key.shape[1] and not enable_gqa:
            found = f"{query.shape[1]} query heads, {key.shape[1]} key heads"
            raise RingspanError(name, found, "Fewer key heads are asked for by name, as in torch", "enable_gqa=True")
        check_options(name, dropout_p, None)
        check_names(name, strategy=strategy, layout=layout, kernel=kernel)
        check_length(name, length)
        rows = query.shape[2] if length is None else None
        return request_of(name, strategy, layout, kernel, is_causal, (-1, -1), length=length, shard_length=rows)

    sequence = find_sequence(group, name, prepare)
    return sequence.attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), scale).transpose(1, 2)


def request_of(
    function: str,
    strategy: str,
    layout: str,
    kernel: str,
    causal: bool,
    window_size: Window,
    borders: tuple[int, ...] | None = None,
    *,
    length: int | None,
    shard_length: int | None = None,
    options: tuple[tuple[str, int | str], ...] = (),
) -> Request:
    """The request of a call whose layout is one of `ringspan.layouts`; `borders` are those of the documents."""
    band = read_window(function, causal, window_size)

    def make(num_ranks: int, length: int) -> tuple[Layout, Mask]:
        mask = mask_of(band, borders)
        return make_layout(layout, length, num_ranks, None, mask), mask

    return Request(
        function=function, strategy=strategy, layout=layout, kernel=kernel, length=length, shard_length=shard_length,
        options=options, mask=(("causal", causal), ("window", band), *((("cu_seqlens", borders),) if borders else ())), make=make,
    )  # fmt: skip


def mask_of(band: Window, borders: tuple[int, ...] | None) -> Mask:
    """The mask of a window as `read_window` reads it, within the documents that `borders` part."""
    mask = full() if band == (None, None) else causal() if band == (None, 0) else sliding_window(*band)
    if borders is None:
        return mask
    return documents(borders) if band == (None, None) else mask & documents(borders)


def without_batch(result: Any) -> Any:
    """`out`, or `(out, lse)`, of one batch entry."""
    return tuple(tensor.squeeze(0) for tensor in result) if isinstance(result, tuple) else result.squeeze(0)
