"""ring-flash-attention's functions on shards cut as its own tests cut them, beside float64 dense attention of the whole."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from ringspan import compat
from ringspan.compat.varlen import document_layout
from ringspan.errors import RingspanError, UnsupportedError
from tests.support.calls import count_meetings, every_rank_refuses, meetings, split_call
from tests.support.dense import dense, make_tensors
from tests.support.errors import BUDGETS, assert_close

EXACT = BUDGETS[torch.float64]
RANKS = (1, 2, 3)
COMMON = "dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs, group"
BATCH = ("ring_flash_attn", "zigzag_ring_flash_attn", "stripe_flash_attn")
VARLEN = ("ring_flash_attn_varlen", "zigzag_ring_flash_attn_varlen")


def cut(name: str, start: int, stop: int, rank: int, num_ranks: int) -> list[int]:
    """The positions of one sequence that a rank holds, as the users of ring-flash-attention cut them."""
    positions = torch.arange(start, stop)
    if name.startswith("zigzag"):
        chunks = positions.chunk(2 * num_ranks)
        return torch.cat([chunks[rank], chunks[2 * num_ranks - 1 - rank]]).tolist()
    if name.startswith("stripe"):
        return positions[rank::num_ranks].tolist()
    return positions.chunk(num_ranks)[rank].tolist()


def causal_pairs(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


def same_document(borders: list[int]) -> Tensor:
    documents = torch.cat([torch.full((stop - start,), index) for index, (start, stop) in enumerate(pairwise(borders))])
    return documents.unsqueeze(1) == documents


def packings(name: str, dim: int) -> dict[str, Callable[..., Any]]:
    """The function, and its forms of packed tensors, all called with q, k and v."""
    func, kvpacked, qkvpacked = (getattr(compat, f"{name}{form}") for form in ("_func", "_kvpacked_func", "_qkvpacked_func"))
    return {
        "func": func,
        "kvpacked": lambda q, k, v, *rest, **keywords: kvpacked(q, torch.stack((k, v), dim), *rest, **keywords),
        "qkvpacked": lambda q, k, v, *rest, **keywords: qkvpacked(torch.stack((q, k, v), dim), *rest, **keywords),
    }


@pytest.mark.parametrize("num_ranks", RANKS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("form", ["func", "kvpacked", "qkvpacked"])
@pytest.mark.parametrize("name", BATCH)
def test_a_batch_in_their_shards_is_dense_attention(name: str, form: str, causal: bool, num_ranks: int):
    length = 4 * num_ranks
    tensors = make_tensors(length, kv_heads=4 if form == "qkvpacked" else 2)
    function = packings(name, 2)[form]

    def call(q: Tensor, k: Tensor, v: Tensor, group: Any) -> tuple[Tensor, Tensor]:
        out, lse, nothing = function(q, k, v, 0.0, 0.4, causal, (-1, -1), None, True, True, group)
        assert nothing is None
        assert torch.equal(function(q, k, v, softmax_scale=0.4, causal=causal, group=group), out)
        return out, lse

    found = split_call(num_ranks, tensors, lambda rank: cut(name, 0, length, rank, num_ranks), call)
    allowed = causal_pairs(length) if causal else torch.ones(length, length, dtype=torch.bool)
    assert_close(found, dense(tensors, allowed, scale=0.4), EXACT)


@pytest.mark.parametrize("num_ranks", RANKS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("form", ["func", "kvpacked", "qkvpacked"])
@pytest.mark.parametrize("name", VARLEN)
def test_documents_that_each_rank_shares_are_dense_attention_and_stay_apart(name: str, form: str, causal: bool, num_ranks: int):
    parts = [0, 2, 8, 12]
    borders = [part * num_ranks for part in parts]
    tensors = make_tensors(borders[-1], batch=1, kv_heads=4 if form == "qkvpacked" else 1)
    function = packings(name, 1)[form]

    def positions(rank: int) -> list[int]:
        return [position for start, stop in pairwise(borders) for position in cut(name, start, stop, rank, num_ranks)]

    def call(q: Tensor, k: Tensor, v: Tensor, group: Any) -> tuple[Tensor, Tensor]:
        cu_seqlens = torch.tensor(parts, dtype=torch.int32)
        out, lse, _ = function(q[0], k[0], v[0], cu_seqlens, 6, causal=causal, return_attn_probs=True, group=group)
        assert out.shape == q.shape[1:] and lse.shape == (4, q.shape[1])
        return out[None], lse[None]

    found = split_call(num_ranks, tensors, positions, call)
    allowed = same_document(borders) & (causal_pairs(borders[-1]) if causal else torch.tensor(True))
    assert_close(found, dense(tensors, allowed), EXACT)


def test_a_document_layout_deals_every_document_over_all_ranks_and_joins_what_touches():
    layout = document_layout("zigzag", (0, 2, 6), 2)
    owners = torch.full((12,), -1)
    for rank in range(2):
        owners[layout.positions(rank)] = rank
    assert owners.tolist() == [0, 1, 1, 0, 0, 0, 1, 1, 1, 1, 0, 0]
    assert [len(shard) for shard in layout.shards] == [3, 2]


@pytest.mark.parametrize("num_ranks", RANKS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [(-1, -1), (3, 1)])
@pytest.mark.parametrize(("form", "stride"), [("func", 1), ("kvpacked", 2), ("qkvpacked", 4)])
def test_llama3_gathers_documents_that_are_cut_anywhere(form: str, stride: int, window: tuple[int, int], causal: bool, num_ranks: int):
    borders = [0, 1, 7, 18, 24]
    tensors = make_tensors(24, batch=1, kv_heads=4 if form == "qkvpacked" else 2)
    function = packings("llama3_flash_attn_varlen", 1)[form]

    def call(q: Tensor, k: Tensor, v: Tensor, group: Any) -> tuple[Tensor, Tensor]:
        *prepared, local = compat.llama3_flash_attn_prepare_cu_seqlens(torch.tensor(borders), causal, group.rank, num_ranks)
        out, lse, _ = function(
            q[0], k[0], v[0], *prepared, stride, local, causal=causal, window_size=window, return_attn_probs=True, group=group
        )
        return out[None], lse[None]

    found = split_call(num_ranks, tensors, lambda rank: cut("ring", 0, 24, rank, num_ranks), call)
    distance = torch.arange(24).unsqueeze(1) - torch.arange(24)
    left, right = (24 if bound == -1 else bound for bound in window)
    allowed = same_document(borders) & (distance <= left) & (-distance <= (0 if causal else right))
    assert_close(found, dense(tensors, allowed), EXACT)


def test_what_llama3_prepares_is_what_concerns_a_rank():
    borders = torch.tensor([0, 3, 5, 12], dtype=torch.int32)
    for causal, rank, q, k, start, stop in (
        (True, 0, [0, 3, 4], [0, 3, 4], 0, 4),
        (True, 1, [0, 1, 4], [0, 2, 5], 3, 8),
        (False, 1, [0, 1, 4], [0, 2, 9], 3, 12),
        (True, 2, [0, 4], [0, 7], 5, 12),
    ):
        cu_seqlens_q, cu_seqlens_k, max_q, max_k, local = compat.llama3_flash_attn_prepare_cu_seqlens(borders, causal, rank, 3)
        assert (cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), local.start, local.stop) == (q, k, start, stop)
        assert cu_seqlens_q.dtype == torch.int32
        assert (max_q, max_k) == tuple(max(b - a for a, b in pairwise(some)) for some in (q, k))


# --- names and arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*BATCH, *VARLEN, "llama3_flash_attn_varlen"])
def test_names_and_the_order_of_arguments_are_theirs(name: str):
    middle = {
        "ring_flash_attn_varlen": "cu_seqlens, max_seqlen, ",
        "zigzag_ring_flash_attn_varlen": "cu_seqlens, max_seqlen, ",
        "llama3_flash_attn_varlen": "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, heads_k_stride, local_k_slice, ",
    }.get(name, "")
    for form, first in (("func", "q, k, v, "), ("kvpacked_func", "q, kv, "), ("qkvpacked_func", "qkv, ")):
        function = getattr(compat, f"{name}_{form}")
        assert ", ".join(inspect.signature(function).parameters) == first + middle + COMMON
        assert function.__name__ == f"{name}_{form}" and function.__doc__


# --- refusals --------------------------------------------------------------------------------------------------------------------

X, P = torch.zeros(1, 4, 2, 8), torch.zeros(4, 2, 8)
PARTS = [0, 2, 4]


def llama3(group: Any, **changes: Any) -> object:
    prepared = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "local_k_slice")
    arguments = dict(zip(prepared, compat.llama3_flash_attn_prepare_cu_seqlens([0, 3, 8], True, group.rank, group.size), strict=True))
    return compat.llama3_flash_attn_varlen_func(P, P, P, **{**arguments, "heads_k_stride": 1, "causal": True, "group": group, **changes})  # pyright: ignore


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        *(
            (lambda g, f=name, w=words: getattr(compat, f"{f}_func")(X, X, X, **w, group=g), UnsupportedError, said)
            for name in BATCH
            for words, said in (
                ({"dropout_p": 0.1}, ("dropout_p=0.1",)),
                ({"alibi_slopes": torch.ones(2)}, ("alibi_slopes",)),
                ({"window_size": (2, 0)}, ("each block of a shard", "Try: ringspan.attention(q, k, v, window_size=(2, 0)")),
            )
        ),
        *(
            (lambda g, f=name, w=words: getattr(compat, f"{f}_func")(P, P, P, PARTS, 2, **w, group=g), UnsupportedError, said)
            for name in VARLEN
            for words, said in (
                ({"dropout_p": 0.1}, ("dropout_p=0.1",)),
                ({"window_size": (-1, 0)}, ("each block of a shard", "ringspan.attention_varlen")),
            )
        ),
        (lambda g: compat.zigzag_ring_flash_attn_func(*[X[:, :3]] * 3, group=g), RingspanError, ("shards of 3 tokens",)),
        (lambda g: compat.ring_flash_attn_kvpacked_func(X, X, group=g), RingspanError, ("kv is (1, 4, 2, 8)", "[batch, shard, 2, heads")),
        (lambda g: compat.ring_flash_attn_qkvpacked_func(X[:, :, None], group=g), RingspanError, ("torch.stack((…), dim=2)",)),
        (lambda g: compat.ring_flash_attn_varlen_qkvpacked_func(P[:, None], PARTS, 2, group=g), RingspanError, ("dim=1)",)),
        (lambda g: compat.ring_flash_attn_varlen_func(P, P, P, [0, 4, 8], 4, group=g), RingspanError, ("cu_seqlens // num_ranks",)),
        (lambda g: compat.ring_flash_attn_varlen_func(P, P, P, [0, 3, 2, 4], 3, group=g), RingspanError, ("do not rise",)),
        (lambda g: compat.ring_flash_attn_varlen_func(P, P, P, PARTS, 1, group=g), RingspanError, ("max_seqlen=1",)),
        (lambda g: compat.zigzag_ring_flash_attn_varlen_func(P, P, P, [0, 1, 4], 3, group=g), RingspanError, ("1 is odd",)),
        (lambda g: llama3(g, dropout_p=0.1), UnsupportedError, ("dropout_p=0.1",)),
        (lambda g: llama3(g, local_k_slice=slice(0, 4)), RingspanError, ("slice(0, 4", "compat.llama3_flash_attn_prepare_cu_seqlens")),
        (lambda g: llama3(g, causal=False), RingspanError, ("prepared for causal=True and called with False",)),
        (lambda g: llama3(g, cu_seqlens_q=torch.tensor([0, 2, 4])), RingspanError, ("not what was prepared",)),
        (lambda g: llama3(g, max_seqlen_q=1), RingspanError, ("max_seqlen_q",)),
        (lambda g: llama3(g, heads_k_stride=0), RingspanError, ("at least one key head",)),
        (lambda g: compat.ring_flash_attn_func(*[X[:, : 4 - g.rank]] * 3, group=g), RingspanError, ("the ranks hold 4, 3 tokens",)),
        (lambda g: compat.ring_flash_attn_func(X, X, X, causal=g.rank > 0, group=g), RingspanError, ("causal=False", "causal=True")),
        (lambda g: compat.ring_flash_attn_varlen_func(P, P, P, [0, 1 + g.rank, 4], 3, group=g), RingspanError, ("(0, 1, 4)", "(0, 2, 4)")),
        (lambda g: llama3(g, **({"local_k_slice": None} if g.rank else {})), RingspanError, ("local_k_slice=None",)),
    ],
)  # fmt: skip
def test_what_they_ignored_or_got_wrong_is_refused_on_every_rank(call: Callable, error: type, words: tuple):
    every_rank_refuses(2, call, error, *words)


def test_llama3_prepared_for_another_rank_is_refused():
    local = compat.llama3_flash_attn_prepare_cu_seqlens([0, 3, 8], True, 0, 2)[-1]
    every_rank_refuses(2, lambda g: llama3(g, local_k_slice=local), RingspanError, "cu_seqlens_q")
    with pytest.raises(RingspanError, match="as many tokens"):
        compat.llama3_flash_attn_prepare_cu_seqlens([0, 3, 8], True, 0, 3)


def test_repeated_calls_ask_nobody_anything(monkeypatch: pytest.MonkeyPatch):
    def every_form(group: Any) -> None:
        compat.zigzag_ring_flash_attn_func(X, X, X, group=group)
        compat.zigzag_ring_flash_attn_varlen_func(P, P, P, torch.tensor(PARTS), 2, causal=True, group=group)
        llama3(group)

    for first, later in meetings(2, count_meetings(monkeypatch), every_form):
        assert first > 4 and later == 0
