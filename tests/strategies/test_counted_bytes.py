"""The formulas of `test_formulas` beside the transport's own counters, on real tensors."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from typing import Any

import pytest
import torch

import ringspan
from ringspan.geometry import Mask, causal, full
from ringspan.strategies import STRATEGIES
from tests.strategies.volumes import HEAD_DIM, HEADS, WIDTH, exchanged_bytes, helped_blocks, keys_on_the_wire
from tests.support.dense import make_tensors


def counted(
    strategy: str, ranks: int, mask: Mask, dtype: torch.dtype, kv_heads: int, layout: str = "zigzag", **options: Any
) -> tuple[int, int]:
    """Bytes of all ranks together, forward and backward, by the transport's own counters."""
    whole = make_tensors(24, batch=1, heads=HEADS, kv_heads=kv_heads, head_dim=HEAD_DIM, dtype=dtype)

    def run(group: Any) -> tuple[int, int]:
        context = ringspan.ContextParallel(group, strategy=strategy, layout=layout, **options)
        sequence = context.sequence(24, mask)
        q, k, v, dout = (sequence.shard(x).detach() for x in (whole.q, whole.k, whole.v, whole.dout))
        out = sequence.attention(*(x.requires_grad_() for x in (q, k, v)))
        forward = context.transport.bytes_sent.total()
        out.backward(dout)
        return forward, context.transport.bytes_sent.total() - forward

    return _summed(ringspan.run_in_process(ranks, run))


def _summed(pairs: Iterable[tuple[int, int]]) -> tuple[int, int]:
    forward, backward = zip(*pairs, strict=True)
    return sum(forward), sum(backward)


N, H = 24, WIDTH


def _ring_bytes(p: int, r: Fraction) -> tuple[Fraction, Fraction]:
    return 2 * 2 * N * H * r * (p - 1), (4 + 8) * N * H * r * (p - 1)


def _query_bytes(p: int, r: Fraction) -> tuple[int, int]:
    return N * (p - 1) * (2 * H + 4 * (H + HEADS)), N * (p - 1) * (6 * H + 4 * HEADS + 4 * H)


def _ulysses_bytes(p: int, r: Fraction) -> tuple[Fraction, Fraction]:
    return exchanged_bytes(int(r * HEADS), p, N)


def _two_dimensional_bytes(p: int, r: Fraction) -> tuple[Fraction, Fraction]:
    there, back = exchanged_bytes(int(r * HEADS), 2, N)
    forward, backward = _ring_bytes(p // 2, Fraction(keys_on_the_wire(int(r * HEADS), 2), HEADS))
    return there + forward, back + backward


def _balanced_bytes(p: int, r: Fraction) -> tuple[Fraction, Fraction]:
    c, helped = Fraction(N, p), helped_blocks(p)
    fetched = p * (p - 1) // 2 - helped
    forward = fetched * 2 * 2 * c * H * r + helped * c * (2 * H + 4 * (H + HEADS))
    return forward, fetched * (4 + 8) * c * H * r + helped * c * (6 * H + 4 * HEADS + 4 * H)


COUNTED = {
    "ring": (full(), "zigzag", {"rotate": "keys"}, _ring_bytes),
    "all_gather": (full(), "striped", {"stages": 2}, _ring_bytes),
    "direct": (full(), "contiguous", {}, _ring_bytes),
    "double_ring": (full(), "zigzag", {"window": 2}, _ring_bytes),
    "ring_self_attention": (full(), "zigzag", {}, _ring_bytes),
    "balanced": (causal(), "contiguous", {}, _balanced_bytes),
    "pass_query": (full(), "zigzag", {}, _query_bytes),
    "tree": (full(), "striped", {}, _query_bytes),
    "ulysses": (causal(), "zigzag", {}, _ulysses_bytes),
    "two_dimensional": (full(), "zigzag", {"ulysses": 2}, _two_dimensional_bytes),
}
"""Mask, layout, options, and the bytes of all P ranks for inputs of two bytes, partials and gradients of four."""


@pytest.mark.parametrize("strategy", COUNTED)
@pytest.mark.parametrize("kv_heads", [8, 4, 1])
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_transport_counts_what_the_formulas_say(strategy: str, ranks: int, kv_heads: int):
    mask, layout, options, formula = COUNTED[strategy]
    expected = formula(ranks, Fraction(kv_heads, HEADS))
    assert counted(strategy, ranks, mask, torch.bfloat16, kv_heads, layout, **options) == expected


def test_every_strategy_has_a_formula_here():
    assert set(STRATEGIES) == set(COUNTED)
