"""flash-attn's, varlen's and SDPA's names beside float64 dense attention, what they refuse, and what repeated calls cost."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import ringspan
from ringspan.attention import calls
from ringspan.errors import RingspanError, UnsupportedError
from ringspan.geometry import make_layout
from tests.support.calls import count_meetings, every_rank_refuses, meetings, split_call
from tests.support.dense import Outcome, dense, make_tensors
from tests.support.errors import BUDGETS, assert_close

EXACT = BUDGETS[torch.float64]
RANKS = (1, 2, 3)
LAYOUTS = ("zigzag", "striped", "contiguous")


def band(length: int, left: int | None, right: int | None) -> Tensor:
    """What a window allows, by looking at every pair."""
    distance = torch.arange(length).unsqueeze(1) - torch.arange(length)
    return (distance <= (length if left is None else left)) & (-distance <= (length if right is None else right))


def same_document(borders: list[int]) -> Tensor:
    documents = torch.cat([torch.full((stop - start,), index) for index, (start, stop) in enumerate(pairwise(borders))])
    return documents.unsqueeze(1) == documents


def cut(layout: str, length: int, num_ranks: int) -> Callable[[int], list[int]]:
    return make_layout(layout, length, num_ranks).positions


# --- attention -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_ranks", RANKS)
@pytest.mark.parametrize(
    ("keywords", "left", "right"),
    [
        ({}, None, None),
        ({"causal": True}, None, 0),
        ({"window_size": (3, 2)}, 3, 2),
        ({"window_size": (-1, 2)}, None, 2),
        ({"window_size": [3, None]}, 3, None),
        ({"window_size": (3, 2), "causal": True}, 3, 0),
        ({"causal": True, "softcap": 1.5}, None, 0),
        ({"window_size": (4, 0), "softcap": 2.0, "softmax_scale": 0.7}, 4, 0),
    ],
)
def test_attention_is_dense_attention_whatever_window_softcap_and_scale(num_ranks: int, keywords: dict, left, right):
    tensors = make_tensors(12, with_dlse=True)
    found = split_call(
        num_ranks, tensors, cut("zigzag", 12, num_ranks),
        lambda q, k, v, group: ringspan.attention(q, k, v, **keywords, kernel="reference", return_lse=True, group=group),
    )  # fmt: skip
    exact = dense(tensors, band(12, left, right), softcap=keywords.get("softcap"), scale=keywords.get("softmax_scale"))
    assert_close(found, exact, EXACT, f"{keywords} on {num_ranks} ranks")


@pytest.mark.parametrize("num_ranks", RANKS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 1), (9, 3)])
def test_attention_infers_the_length_where_all_ranks_hold_equally_many(num_ranks: int, layout: str, heads: int, kv_heads: int):
    tensors = make_tensors(6 * num_ranks, heads=heads, kv_heads=kv_heads)
    found = split_call(
        num_ranks, tensors, cut(layout, 6 * num_ranks, num_ranks),
        lambda q, k, v, group: ringspan.attention(q, k, v, causal=True, layout=layout, return_lse=True, group=group),
    )  # fmt: skip
    assert_close(found, dense(tensors, band(6 * num_ranks, None, 0)), EXACT)


@pytest.mark.parametrize("layout", [*LAYOUTS, "auto"])
@pytest.mark.parametrize("length", [1, 2, 13])
def test_attention_takes_any_length_that_it_is_told_also_where_a_rank_holds_nothing(layout: str, length: int):
    tensors = make_tensors(length, kv_heads=1)
    found = split_call(
        3, tensors, make_layout(layout, length, 3, None, ringspan.causal()).positions,
        lambda q, k, v, group: ringspan.attention(q, k, v, causal=True, layout=layout, length=length, return_lse=True, group=group),
    )  # fmt: skip
    assert_close(found, dense(tensors, band(length, None, 0)), EXACT)


@pytest.mark.parametrize("strategy", ["all_gather", "direct", "ulysses", "auto"])
def test_attention_hands_on_strategy_and_kernel(strategy: str):
    tensors = make_tensors(12)
    found = split_call(
        2, tensors, cut("zigzag", 12, 2),
        lambda q, k, v, group: ringspan.attention(
            q, k, v, causal=True, window_size=(5, 0), strategy=strategy, kernel="torch_cpu", return_lse=True, group=group
        ),
    )  # fmt: skip
    assert_close(found, dense(tensors, band(12, 5, 0)), EXACT)


@pytest.mark.parametrize("num_ranks", RANKS)
def test_sinks_get_the_gradient_that_the_ranks_shares_add_up_to(num_ranks: int):
    tensors, sinks = make_tensors(12), torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
    shares: dict[int, Tensor] = {}

    def call(q: Tensor, k: Tensor, v: Tensor, group: Any) -> tuple[Tensor, Tensor]:
        own = sinks.clone().requires_grad_()
        own.register_hook(lambda gradient: shares.__setitem__(group.rank, gradient))
        return ringspan.attention(q, k, v, causal=True, sinks=own, return_lse=True, group=group)

    found = split_call(num_ranks, tensors, cut("zigzag", 12, num_ranks), call)
    dsinks = torch.stack([shares[rank] for rank in range(num_ranks)]).sum(0)
    assert_close(Outcome(**{**vars(found), "dsinks": dsinks}), dense(tensors, band(12, None, 0), sinks=sinks), EXACT)


def test_without_a_group_one_rank_computes_the_whole():
    tensors = make_tensors(9)
    out = ringspan.attention(tensors.q, tensors.k, tensors.v, causal=True, deterministic=True)
    torch.testing.assert_close(out, dense(tensors, band(9, None, 0)).out, rtol=0, atol=1e-13)


# --- attention_varlen ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_ranks", RANKS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [(-1, -1), (3, 1)])
def test_packed_documents_are_cut_anywhere_and_stay_apart(num_ranks: int, layout: str, causal: bool, window: tuple[int, int]):
    borders = [0, 1, 8, 19, 23]
    tensors = make_tensors(23, batch=1)
    cu_seqlens = torch.tensor(borders, dtype=torch.int32)

    def call(q: Tensor, k: Tensor, v: Tensor, group: Any) -> tuple[Tensor, Tensor]:
        out, lse = ringspan.attention_varlen(
            q[0], k[0], v[0], cu_seqlens, cu_seqlens, 11, 11, causal=causal, window_size=window, layout=layout, return_lse=True, group=group
        )
        assert out.shape == q.shape[1:] and lse.shape == (4, q.shape[1])
        return out[None], lse[None]

    found = split_call(num_ranks, tensors, cut(layout, 23, num_ranks), call)
    left = None if window[0] == -1 else window[0]
    right = 0 if causal else None if window[1] == -1 else window[1]
    assert_close(found, dense(tensors, band(23, left, right) & same_document(borders)), EXACT)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_a_softcap_acts_within_documents_too_and_lse_has_a_gradient(num_ranks: int):
    borders = [0, 7, 17]
    tensors = make_tensors(17, batch=1, kv_heads=1, with_dlse=True)

    def call(q: Tensor, k: Tensor, v: Tensor, group: Any) -> tuple[Tensor, Tensor]:
        keywords: dict[str, Any] = {"causal": True, "softcap": 1.2, "softmax_scale": 0.9, "kernel": "reference"}
        out, lse = ringspan.attention_varlen(q[0], k[0], v[0], borders, list(borders), return_lse=True, group=group, **keywords)
        return out[None], lse[None]

    found = split_call(num_ranks, tensors, cut("zigzag", 17, num_ranks), call)
    assert_close(found, dense(tensors, band(17, None, 0) & same_document(borders), softcap=1.2, scale=0.9), EXACT)


# --- scaled_dot_product_attention ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_ranks", RANKS)
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_sdpa_gives_what_torch_gives_on_the_whole(num_ranks: int, is_causal: bool, kv_heads: int):
    tensors = make_tensors(6 * num_ranks, kv_heads=kv_heads)
    q, k, v = (x.transpose(1, 2).requires_grad_() for x in (tensors.q, tensors.k, tensors.v))
    whole = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=0.3, enable_gqa=True)
    expected = [whole, *torch.autograd.grad(whole, (q, k, v), tensors.dout.transpose(1, 2))]

    def run(group: Any) -> None:
        own = torch.tensor(cut("zigzag", 6 * num_ranks, num_ranks)(group.rank))
        shards = [x.detach()[:, :, own].requires_grad_() for x in (q, k, v)]
        out = ringspan.scaled_dot_product_attention(*shards, None, 0.0, is_causal, scale=0.3, enable_gqa=kv_heads < 4, group=group)
        found = [out, *torch.autograd.grad(out, shards, tensors.dout.transpose(1, 2)[:, :, own])]
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other[:, :, own], rtol=1e-12, atol=1e-12)

    ringspan.run_in_process(num_ranks, run)


# --- refusals --------------------------------------------------------------------------------------------------------------------

X = torch.zeros(1, 4, 2, 8)
P = torch.zeros(4, 2, 8)
HALF = [0, 3, 8]
"""Documents of eight tokens on two ranks."""


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda g: ringspan.attention(X, X, X, dropout_p=0.1, group=g), UnsupportedError, ("dropout_p=0.1", "Try: dropout_p=0.0")),
        (lambda g: ringspan.attention(X, X, X, alibi_slopes=torch.ones(2), group=g), UnsupportedError, ("alibi_slopes",)),
        (lambda g: ringspan.attention(X, X, X, window_size=(-2, 0), group=g), RingspanError, ("window_size=(-2, 0)",)),
        (lambda g: ringspan.attention(X, X, X, window_size=4, group=g), RingspanError, ("window_size=4",)),  # pyright: ignore
        (lambda g: ringspan.attention(X, X, X, window_size=(1.0, 0), group=g), RingspanError, ("window_size=(1.0, 0)",)),  # pyright: ignore
        (lambda g: ringspan.attention(X, X, X, causal=1, group=g), RingspanError, ("causal=1",)),  # pyright: ignore
        (lambda g: ringspan.attention(X, X, X, softcap=-1.0, group=g), RingspanError, ("softcap=-1.0",)),
        (lambda g: ringspan.attention(X, X, X, softmax_scale=float("nan"), group=g), RingspanError, ("scale=nan",)),
        (lambda g: ringspan.attention(X, X, X, strategy="rings", group=g), RingspanError, ("strategy 'rings'", "Try: strategy='ring'")),
        (lambda g: ringspan.attention(X, X, X, strategy=["ring"], group=g), RingspanError, ("strategy=['ring']",)),  # pyright: ignore
        (lambda g: ringspan.attention(X, X, X, layout="zagzig", group=g), RingspanError, ("layout 'zagzig'",)),
        (lambda g: ringspan.attention(X, X, X, kernel="flash9", group=g), RingspanError, ("kernel 'flash9'",)),
        (lambda g: ringspan.attention(X, X, X, kernel="cudnn", group=g), RingspanError, ("cudnn", "runs on cuda")),
        (lambda g: ringspan.attention(X, X, X, kernel="torch_cpu", softcap=1.0, group=g), RingspanError, ("softcap",)),
        (lambda g: ringspan.attention(X, X, X, length=0, group=g), RingspanError, ("length=0",)),
        (lambda g: ringspan.attention(X, X, X, length=9, group=g), RingspanError, ("owns 5 positions",)),
        (lambda g: ringspan.attention(X[0], X, X, group=g), RingspanError, ("q is (4, 2, 8)", "[batch, shard, heads, head_dim]")),
        (lambda g: ringspan.attention(X, X.numpy(), X, group=g), RingspanError, ("k is ndarray",)),  # pyright: ignore
        (lambda g: ringspan.attention(X, X[:, :3], X[:, :3], group=g), RingspanError, ("do not belong together",)),
        (lambda g: ringspan.attention(X.expand(1, 4, 2, 8), X.repeat(1, 1, 2, 1), X.repeat(1, 1, 2, 1), group=g), RingspanError, ("KV",)),
        (lambda g: ringspan.attention(X, X.double(), X.double(), group=g), RingspanError, ("dtypes",)),
        (lambda g: ringspan.attention(X, X.to("meta"), X.to("meta"), group=g), RingspanError, ("devices",)),
        (lambda g: ringspan.attention(X.long(), X.long(), X.long(), group=g), RingspanError, ("floating-point",)),
        (lambda g: ringspan.attention(X, X, X, sinks=torch.zeros(3), group=g), RingspanError, ("sinks",)),
        (lambda g: ringspan.attention_varlen(P, P, P, HALF, [0, 4, 8], group=g), RingspanError, ("cu_seqlens_q and cu_seqlens_k differ",)),
        (lambda g: ringspan.attention_varlen(P, P, P, [0, 5, 3, 8], [0, 5, 3, 8], group=g), RingspanError, ("do not rise from 0",)),
        (lambda g: ringspan.attention_varlen(P, P, P, [0, 5, 5, 8], [0, 5, 5, 8], group=g), RingspanError, ("do not rise from 0",)),
        (lambda g: ringspan.attention_varlen(P, P, P, [1, 8], [1, 8], group=g), RingspanError, ("do not rise from 0",)),
        (lambda g: ringspan.attention_varlen(P, P, P, [], [], group=g), RingspanError, ("do not rise from 0",)),
        (lambda g: ringspan.attention_varlen(P, P, P, [0, 4], [0, 4], group=g), RingspanError, ("owns 2 positions",)),
        (lambda g: ringspan.attention_varlen(P, P, P, torch.tensor([0.0, 8.0]), HALF, group=g), RingspanError, ("cu_seqlens_q", "float32")),
        (lambda g: ringspan.attention_varlen(P, P, P, torch.tensor([HALF]), HALF, group=g), RingspanError, ("(1, 3)",)),
        (lambda g: ringspan.attention_varlen(P, P, P, HALF, HALF, 4, 5, group=g), RingspanError, ("max_seqlen_q=4", "max_seqlen_q=5")),
        (lambda g: ringspan.attention_varlen(P, P, P, HALF, HALF, dropout_p=0.5, group=g), UnsupportedError, ("dropout_p=0.5",)),
        (lambda g: ringspan.attention_varlen(X, X, X, HALF, HALF, group=g), RingspanError, ("[shard, heads, head_dim]",)),
        (lambda g: ringspan.scaled_dot_product_attention(X, X, X, X, group=g), UnsupportedError, ("attn_mask", "ringspan.mask_mod(f)")),
        (lambda g: ringspan.scaled_dot_product_attention(X, X, X, None, 0.1, group=g), UnsupportedError, ("dropout_p=0.1",)),
        (lambda g: ringspan.scaled_dot_product_attention(X, X[:, :2], X[:, :2], group=g), RingspanError, ("Try: enable_gqa=True",)),
        (lambda g: ringspan.scaled_dot_product_attention(P, P, P, group=g), RingspanError, ("[batch, heads, shard, head_dim]",)),
    ],
)  # fmt: skip
def test_what_is_not_computed_exactly_is_refused_on_every_rank_before_anything_is_sent(call: Callable, error: type, words: tuple):
    every_rank_refuses(2, call, error, *words)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda g: ringspan.attention(X, X, X, dropout_p=0.1 * g.rank, group=g), ("dropout_p=0.1",)),
        (lambda g: ringspan.attention(X, X, X, causal=g.rank == 1, group=g), ("rank 0 has attention", "causal=False", "causal=True")),
        (lambda g: ringspan.attention(X, X, X, window_size=(g.rank, 0), group=g), ("rank 0 has", "window=(0, 0)", "window=(1, 0)")),
        (lambda g: ringspan.attention(X, X, X, softcap=1.0 + g.rank, group=g), ("softcap=1.0", "softcap=2.0")),
        (lambda g: ringspan.attention(X, X, X, softmax_scale=1.0 + g.rank, group=g), ("scale=1.0", "scale=2.0")),
        (lambda g: ringspan.attention(X, X, X, strategy=("ring", "direct")[g.rank], group=g), ("'ring'", "'direct'")),
        (lambda g: ringspan.attention(X, X, X, layout=("zigzag", "striped")[g.rank], group=g), ("'zigzag'", "'striped'")),
        (lambda g: ringspan.attention(X, X, X, kernel=("auto", "reference")[g.rank], group=g), ("'auto'", "'reference'")),
        (lambda g: ringspan.attention(X, X, X, length=(8, None)[g.rank], group=g), ("length=8", "length=None")),
        (lambda g: ringspan.attention(*[X.expand(1 + g.rank, 4, 2, 8)] * 3, group=g), ("batch=1", "batch=2")),
        (lambda g: ringspan.attention(*[X.to((torch.float32, torch.float64)[g.rank])] * 3, group=g), ("float32", "float64")),
        (lambda g: ringspan.attention(*[(X, X[0])[g.rank]] * 3, group=g), ("q is (4, 2, 8)",)),
        (lambda g: ringspan.attention_varlen(P, P, P, *[[0, 3 + g.rank, 8]] * 2, group=g), ("(0, 3, 8)", "(0, 4, 8)")),
        (lambda g: ringspan.attention_varlen(P, P, P, *[(HALF, [0, 9, 8])[g.rank]] * 2, group=g), ("do not rise",)),
        (lambda g: (ringspan.attention, ringspan.scaled_dot_product_attention)[g.rank](X, X, X, group=g), ("rank 0 has attention",)),
        (
            lambda g: ringspan.attention(*[X[:, : 4 - g.rank]] * 3, group=g),
            ("the ranks hold 4, 3 tokens", "length=7), and shards as ContextParallel(…).sequence(7).shard(x) cuts them"),
        ),
    ],
)  # fmt: skip
def test_ranks_that_ask_for_different_things_are_told_so_on_every_rank(call: Callable, words: tuple):
    every_rank_refuses(2, call, RingspanError, *words)


def test_long_borders_that_differ_late_are_noticed_and_said_in_short():
    def call(group: Any) -> object:
        borders = [*range(100), 100 + group.rank, 120]
        return ringspan.attention_varlen(*[torch.zeros(60, 2, 8)] * 3, borders, borders, group=group)

    every_rank_refuses(2, call, RingspanError, "102 in all, checksum")


def test_a_refusal_that_the_other_ranks_do_not_share_is_still_said_where_they_have_gone_on():
    def run(group: Any) -> None:
        ringspan.attention(X, X, X, group=group)
        ringspan.attention(X, X, X, dropout_p=0.1 if group.rank == 1 else 0.0, group=group)

    with pytest.raises(UnsupportedError, match=r"dropout_p=0\.1"):
        ringspan.run_in_process(2, run, timeout_seconds=1.0)


# --- what repeated calls cost ----------------------------------------------------------------------------------------------------


def test_calls_like_an_earlier_one_ask_nobody_anything(monkeypatch: pytest.MonkeyPatch):
    x, packed = torch.randn(1, 4, 2, 8), torch.randn(4, 2, 8)

    def every_form(group: Any) -> None:
        leaf = x.clone().requires_grad_()
        ringspan.attention(leaf, x, x, causal=True, window_size=(3, -1), group=group).sum().backward()
        ringspan.attention(leaf, x, x, causal=True, length=8, group=group).sum().backward()
        ringspan.attention_varlen(packed, packed, packed, torch.tensor(HALF), torch.tensor(HALF), causal=True, group=group)
        ringspan.scaled_dot_product_attention(leaf, x, x, group=group, length=4).sum().backward()

    for first, later in meetings(2, count_meetings(monkeypatch), every_form):
        assert first > 4, "the first calls are agreed on"
        assert later == 0


def test_one_context_serves_all_calls_of_a_group():
    x = torch.randn(1, 4, 2, 8)

    def run(group: Any) -> int:
        for left in range(4):
            ringspan.attention(x, x, x, window_size=(left, 0), group=group)
        kept = calls._kept(group)
        assert len(kept.sequences) == 4
        return len(kept.contexts)

    assert ringspan.run_in_process(2, run) == [1, 1]


def test_the_least_recent_sequence_is_forgotten_and_can_be_asked_for_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(calls, "MAX_SEQUENCES", 2)
    tensors = make_tensors(8, batch=1)

    def run(group: Any) -> list[Tensor]:
        own = torch.tensor(cut("zigzag", 8, 2)(group.rank))
        q, k, v = (x[0, own] for x in (tensors.q, tensors.k, tensors.v))
        borders = [[0, border, 8] for border in (1, 2, 3, 1)]
        outs = [ringspan.attention_varlen(q, k, v, cu, cu, group=group) for cu in borders]
        assert len(calls._kept(group).sequences) == 2
        return outs

    for outs in ringspan.run_in_process(2, run):
        assert torch.equal(outs[0], outs[3]) and not torch.equal(outs[0], outs[1])


def test_what_is_kept_goes_with_its_group():
    x = torch.randn(1, 4, 2, 8)

    def run(group: Any) -> weakref.ref:
        ringspan.attention(x, x, x, group=group)
        return weakref.ref(calls._kept(group).contexts.popitem()[1]) if group.rank else weakref.ref(group)

    groups = ringspan.run_in_process(2, run)
    gc.collect()
    assert [group() for group in groups] == [None, None]


def test_the_room_can_be_imported_although_a_function_has_its_name():
    from ringspan.attention import ContextParallel
    from ringspan.attention.executor import ForwardPass

    assert callable(ringspan.attention) and ContextParallel is ringspan.ContextParallel and ForwardPass.__doc__
