"""yunchang's `LongContextAttention` on shards cut as its `EXTRACT_FUNC_DICT` cuts them, beside float64 dense attention."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from enum import Enum
from typing import Any

import pytest
import torch
from torch import Tensor

import ringspan
from ringspan import compat
from ringspan.errors import RingspanError, UnsupportedError
from tests.support.calls import count_meetings, every_rank_refuses, meetings, split_call
from tests.support.dense import dense, make_tensors
from tests.support.errors import BUDGETS, assert_close

EXACT = BUDGETS[torch.float64]
DEGREES = [(1, 1), (2, 1), (1, 2), (3, 1), (1, 3), (2, 2)]
"""Ranks that share heads × groups of them that share positions."""


def cut(kind: str, length: int, ulysses: int, ring: int, place: int, group: int) -> list[int]:
    """The positions of number `place` of head group `group`: the ring's shard, in consecutive parts."""
    positions = torch.arange(length)
    if kind == "zigzag":
        chunks = positions.chunk(2 * ring)
        shard = torch.cat([chunks[group], chunks[2 * ring - 1 - group]])
    elif kind == "strip":
        shard = positions.reshape(length // ring, ring).T[group]
    else:
        shard = positions.chunk(ring)[group]
    return shard.chunk(ulysses)[place].tolist()


def make(group: Any, ulysses: int, ring: int, low: bool = True, **keywords: Any) -> compat.LongContextAttention:
    compat.set_seq_parallel_pg(ulysses, ring, group.rank, group.size, low, group=group)
    return compat.LongContextAttention(**keywords)


@pytest.mark.parametrize(("ulysses", "ring"), DEGREES)
@pytest.mark.parametrize("kind", ["basic", "zigzag", "strip"])
@pytest.mark.parametrize("low", [True, False])
def test_heads_and_positions_in_their_shards_are_dense_attention(kind: str, low: bool, ulysses: int, ring: int):
    num_ranks = ulysses * ring
    length = 4 * num_ranks
    tensors = make_tensors(length, heads=9, kv_heads=3)

    def positions(rank: int) -> list[int]:
        place, group = (rank % ulysses, rank // ulysses) if low else (rank // ring, rank % ring)
        return cut(kind, length, ulysses, ring, place, group)

    def call(q: Tensor, k: Tensor, v: Tensor, group: Any) -> tuple[Tensor, Tensor]:
        attention = make(group, ulysses, ring, low, ring_impl_type=kind, attn_type="torch_math")
        assert attention.shard(torch.arange(length), 0).tolist() == positions(group.rank)
        out = attention(q, k, v, 0.0, 0.5, True, (-1, -1), 3.0, None, False, True)
        return out, torch.zeros(q.shape[0], q.shape[2], q.shape[1], dtype=q.dtype)

    found = split_call(num_ranks, tensors, positions, call)
    exact = dense(tensors, torch.ones(length, length, dtype=torch.bool).tril(), scale=0.5, softcap=3.0)
    exact.lse.zero_()  # this class returns none
    assert_close(found, exact, EXACT)


def test_a_window_is_computed_where_no_ring_cuts_it():
    tensors = make_tensors(8)

    def call(q: Tensor, k: Tensor, v: Tensor, group: Any) -> tuple[Tensor, Tensor]:
        out = make(group, 2, 1)(q, k, v, window_size=(2, 1))
        return out, torch.zeros(2, 4, 4, dtype=q.dtype)

    distance = torch.arange(8).unsqueeze(1) - torch.arange(8)
    exact = dense(tensors, (distance <= 2) & (distance >= -1))
    exact.lse.zero_()
    assert_close(split_call(2, tensors, lambda rank: cut("basic", 8, 2, 1, rank, 0), call), exact, EXACT)


def test_without_a_process_group_one_rank_computes_the_whole():
    tensors = make_tensors(6)
    compat.set_seq_parallel_pg(1, 1, 0, 1)
    out = compat.LongContextAttention()(tensors.q, tensors.k, tensors.v, causal=True)
    exact = dense(tensors, torch.ones(6, 6, dtype=torch.bool).tril())
    torch.testing.assert_close(out, exact.out, rtol=0, atol=1e-13)


def test_names_and_the_order_of_arguments_are_theirs():
    made = inspect.signature(compat.LongContextAttention).parameters
    assert list(made) == ["scatter_idx", "gather_idx", "ring_impl_type", "use_pack_qkv", "use_sync", "attn_type", "attn_processor"]
    called = "query key value dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic return_attn_probs args"
    assert list(inspect.signature(compat.LongContextAttention.forward).parameters)[1:] == called.split()
    split = "sp_ulysses_degree sp_ring_degree rank world_size use_ulysses_low"
    assert list(inspect.signature(compat.set_seq_parallel_pg).parameters)[:5] == split.split()


class AttnType(Enum):
    """As yunchang names kernels."""

    FA = "fa"
    SAGE_AUTO = "sage_auto"


X = torch.zeros(1, 4, 2, 8)


def test_a_kernel_is_named_by_a_string_or_by_their_enumeration():
    def run(group: Any) -> tuple[str, ...]:
        return tuple(make(group, 1, 1, attn_type=kind).kernel for kind in (None, "torch_math", "torch_cudnn", AttnType.FA))

    assert ringspan.run_in_process(1, run) == [("auto", "reference", "cudnn", "auto")]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda g: make(g, 1, 2)(X, X, X, dropout_p=0.1), UnsupportedError, ("dropout_p=0.1",)),
        (lambda g: make(g, 1, 2)(X, X, X, alibi_slopes=X), UnsupportedError, ("alibi_slopes",)),
        (lambda g: make(g, 1, 2)(X, X, X, window_size=(2, 0)), UnsupportedError, ("each block", "strategy='two_dimensional'")),
        (lambda g: make(g, 1, 2)(X, X, X, 0.0, None, False, (-1, -1), 0.0, None, False, False, "more"), RingspanError, ("1 further",)),
        (lambda g: make(g, 1, 2, ring_impl_type="zigzag")(*[X[:, :3]] * 3), RingspanError, ("do not divide", "two parts")),
        (lambda g: make(g, 2, 1)(*[X[:, : 4 - g.rank]] * 3), RingspanError, ("the ranks hold 4, 3 tokens",)),
        (lambda g: make(g, 2, 1)(X, X, X, causal=g.rank > 0), RingspanError, ("window=(None, 0)", "window=(None, None)")),
        (lambda g: make(g, *((2, 1), (1, 2))[g.rank])(X, X, X), RingspanError, ("ulysses=2",)),
        (lambda g: make(g, 2, 1, attn_type="torch_cudnn")(X, X, X), RingspanError, ("runs on cuda",)),
        (lambda g: make(g, 1, 2, scatter_idx=1, gather_idx=2), RingspanError, ("Try: scatter_idx=2, gather_idx=1",)),
        (lambda g: make(g, 1, 2, ring_impl_type="basic_flashinfer"), UnsupportedError, ("basic, zigzag, strip",)),
        (lambda g: make(g, 1, 2, attn_type=AttnType.SAGE_AUTO), UnsupportedError, ("'sage_auto'", "'torch_cudnn'")),
        (lambda g: make(g, 1, 2, attn_processor=object()), UnsupportedError, ("attn_processor",)),
        (lambda g: compat.set_seq_parallel_pg(3, 1, g.rank, 2), RingspanError, ("3 × 1", "divide all ranks")),
        (lambda g: compat.set_seq_parallel_pg(2, 1, 1 - g.rank, 2, group=g), RingspanError, ("has this process as rank",)),
        (lambda g: compat.set_seq_parallel_pg(2, 2, g.rank, 4, group=g), RingspanError, ("of 2",)),
        (lambda g: compat.LongContextAttention(), RingspanError, ("Try: set_seq_parallel_pg",)),
        (lambda g: make(g, 1, 2).shard(torch.zeros(1, 5)), RingspanError, ("do not divide",)),
    ],
)  # fmt: skip
def test_what_is_not_computed_exactly_is_refused_on_every_rank(call: Callable, error: type, words: tuple):
    every_rank_refuses(2, call, error, *words)


def test_repeated_calls_ask_nobody_anything(monkeypatch: pytest.MonkeyPatch):
    modules: dict[int, compat.LongContextAttention] = {}

    def call(group: Any) -> object:
        attention = modules.setdefault(group.rank, make(group, 2, 1))
        return attention(X, X, X, causal=True)

    for first, later in meetings(2, count_meetings(monkeypatch), call):
        assert first > 2 and later == 0
