"""Laws 3, 4 and 7 on real tensors for every strategy under every layout and mask: float64, beside dense attention, and bytes by link."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch

from tests.strategies.combinations import LAYOUTS, MASKS, VARIANTS, Combination, each, length_for
from tests.support.dense import Outcome, Tensors, dense, make_tensors
from tests.support.errors import BUDGETS, assert_close
from tests.support.poison import poisoned
from tests.support.split import Split, split_attention

__all__ = ["poisoned"]

HEADS = ((4, 4), (4, 2), (9, 3), (5, 1))
"""Ungrouped, grouped, and odd numbers of both kinds of heads."""

FEATURES: tuple[frozenset[str], ...] = (
    frozenset(),
    frozenset({"sinks"}),
    frozenset({"softcap"}),
    frozenset({"dlse"}),
    frozenset({"scale", "torch_cpu"}),
    frozenset({"sinks", "softcap", "dlse", "scale"}),
)
"""What attention is asked for besides, or which kernel, by turns."""

MATERIALISED = frozenset({"sinks", "softcap", "torch_cpu"})
"""What Ring Self-Attention refuses."""


def asked(heads: tuple[int, int], features: frozenset[str]) -> dict[str, Any]:
    """What `features` mean, as arguments of `dense`."""
    return {
        "scale": 0.4 if "scale" in features else None,
        "softcap": 1.5 if "softcap" in features else None,
        "sinks": torch.linspace(-1, 1, heads[0], dtype=torch.float64) if "sinks" in features else None,
    }


def whole(length: int, heads: tuple[int, int], features: frozenset[str]) -> Tensors:
    """The whole tensors."""
    return make_tensors(length, batch=1, heads=heads[0], kv_heads=heads[1], head_dim=4, seed=length, with_dlse="dlse" in features)


@lru_cache(maxsize=512)
def expected(mask: str, length: int, heads: tuple[int, int], features: frozenset[str]) -> tuple[Tensors, Outcome]:
    """The whole tensors, and what dense attention makes of them."""
    tensors = whole(length, heads, features)
    return tensors, dense(tensors, MASKS[mask].allowed(length), **asked(heads, features))


def split_of(combination: Combination, heads: tuple[int, int], features: frozenset[str]) -> Split:
    """How attention is split."""
    return Split(
        num_ranks=combination.ranks, mask=MASKS[combination.mask].make(combination.length), strategy=combination.strategy,
        layout=combination.layout, options=combination.options, kernel="torch_cpu" if "torch_cpu" in features else "reference",
        **asked(heads, features),
    )  # fmt: skip


def check(combination: Combination, heads: tuple[int, int], features: frozenset[str]) -> None:
    """Out, lse, gradients and bytes of one combination."""
    if combination.strategy == "ring_self_attention":
        features -= MATERIALISED
    tensors, exact = expected(combination.mask, combination.length, heads, features)
    with combination.unless_refused():
        found, parts = split_attention(split_of(combination, heads, features), tensors)
        what = f"{combination}, {heads} heads, {sorted(features)}"
        assert_close(found, exact, BUDGETS[torch.float64], what)
        if "dlse" not in features:
            # A gradient of lse rides beside dO where queries travel; the schedule speaks of attention whose lse nobody differentiates.
            sent = {link: size for part in parts for link, size in part.sent.items()}
            assert sent == parts[0].promised, what


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_strategy_equals_dense_attention_under_every_layout_and_a_third_of_the_masks(variant: str, layout: str):
    # The third moves on by one from strategy to strategy and from layout to layout: each strategy meets each mask.
    shift = list(VARIANTS).index(variant) + LAYOUTS.index(layout)
    for index, mask in enumerate(MASKS, start=3 * shift):
        if index % 3 == shift % 3:
            ranks = (2, 3, 4, 5, 6, 8, 1)[index // 3 % 7]
            combination = Combination(variant, layout, mask, ranks, length_for(ranks, index))
            check(combination, HEADS[index // 5 % len(HEADS)], FEATURES[(index // 3 + index // 21) % len(FEATURES)])


@pytest.mark.parametrize("features", FEATURES, ids=lambda features: " ".join(sorted(features)) or "plain")
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_strategies_take_any_heads_with_every_feature(heads: tuple[int, int], features: frozenset[str]):
    turns = list(each())
    first = HEADS.index(heads) + len(HEADS) * FEATURES.index(features)
    for index in range(first % 2, len(VARIANTS), 2):
        check(turns[(index + len(VARIANTS) * first) % len(turns)](3, 16 + index), heads, features)


def test_each_strategy_meets_each_mask_above():
    for variant in range(len(VARIANTS)):
        met = {mask for layout in range(len(LAYOUTS)) for mask in range(len(MASKS)) if mask % 3 == (variant + layout) % 3}
        assert met == set(range(len(MASKS)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mask", ["causal", "window", "documents"])
def test_whatever_auto_picks_is_exact(mask: str, layout: str):
    for heads, length in (((4, 2), 31), ((5, 1), 24)):
        tensors, exact = expected(mask, length, heads, frozenset())
        split = Split(num_ranks=4, mask=MASKS[mask].make(length), strategy="auto", layout=layout)
        found, parts = split_attention(split, tensors)
        assert_close(found, exact, BUDGETS[torch.float64], str(split))
        assert {link: size for part in parts for link, size in part.sent.items()} == parts[0].promised


@pytest.mark.parametrize("heads", [(4, 2), (9, 3)], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_some_key_heads_after_the_others_are_exact_and_send_as_much(variant: str, heads: tuple[int, int]):
    index = list(VARIANTS).index(variant)
    features = FEATURES[0 if variant == "ring_self_attention" else index % len(FEATURES)] - {"dlse"}
    combination = Combination(variant, "zigzag", list(MASKS)[index % len(MASKS)], ranks=4, length=26)
    tensors, exact = expected(combination.mask, 26, heads, features)
    split = split_of(combination, heads, features)
    staged = replace(split, options={**split.options, "kv_heads_per_stage": 1 + index % 2})
    found, parts = split_attention(staged, tensors)
    assert_close(found, exact, BUDGETS[torch.float64], f"{staged}")
    assert {link: size for part in parts for link, size in part.sent.items()} == parts[0].promised
