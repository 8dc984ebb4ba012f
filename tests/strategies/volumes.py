"""Sizes and counts that the tests of strategies share."""

from __future__ import annotations

from fractions import Fraction

from ringspan.geometry import Mask, make_layout
from ringspan.schedule import PieceBytes
from ringspan.strategies import Schedules, link_bytes, make_schedules

HEADS, HEAD_DIM = 8, 4
WIDTH = HEADS * HEAD_DIM
RANKS = (1, 2, 3, 4, 5, 6, 8, 12)
LENGTH = 240
"""Twice every number of ranks divides it: shards, and zigzag's halves of them, are of one length."""


def elements(kv_heads: int = HEADS) -> PieceBytes:
    """Sizes under which bytes are elements, an lse counting as one."""
    return PieceBytes(heads=HEADS, kv_heads=kv_heads, head_dim=HEAD_DIM, element_bytes=1, accumulator_bytes=1)


def half_precision(kv_heads: int = HEADS) -> PieceBytes:
    """Inputs of two bytes, partials and gradients of four."""
    return PieceBytes(heads=HEADS, kv_heads=kv_heads, head_dim=HEAD_DIM, element_bytes=2, accumulator_bytes=4)


def make(strategy: str, ranks: int, mask: Mask, layout: str = "zigzag", length: int = LENGTH, **options: int | str) -> Schedules:
    """The schedules of `strategy`."""
    return make_schedules(strategy, make_layout(layout, length, ranks), mask, **options)


def sent(
    strategy: str, ranks: int, mask: Mask, direction: str, sizes: PieceBytes, layout: str = "zigzag", length: int = LENGTH,
    **options: int | str,
) -> Fraction:  # fmt: skip
    """What a rank sends, on average."""
    whole = make_layout(layout, length, ranks)
    return Fraction(link_bytes(make_schedules(strategy, whole, mask, **options), whole, sizes, direction).total(), ranks)


def shards(count: int | Fraction, sizes: PieceBytes, ranks: int, kind: str) -> Fraction:
    """`count` shards of `kind`."""
    return Fraction(count) * (LENGTH // ranks) * sizes.of(kind)


def helped_blocks(ranks: int) -> int:
    """Blocks at a distance above P/2, which the keys' owner computes: 1 + 2 + … + (⌈P/2⌉ − 1)."""
    most = (ranks + 1) // 2 - 1
    return most * (most + 1) // 2


def keys_on_the_wire(kv_heads: int, degree: int) -> int:
    """Key heads that head groups of `degree` ranks exchange: where there are fewer than ranks, each rank gets the one that it needs."""
    return max(kv_heads, degree)


def exchanged_bytes(kv_heads: int, degree: int, tokens: int) -> tuple[Fraction, Fraction]:
    """Forward and backward, of all ranks, the exchange of positions for heads: inputs of two bytes, accumulators of four.

    The gradient of a key head that several ranks share is sent in parts, which are accumulators; all else is as wide as the inputs.
    """
    keys = 2 * keys_on_the_wire(kv_heads, degree) * HEAD_DIM
    away = tokens * Fraction(degree - 1, degree)
    return 2 * (2 * WIDTH + keys) * away, (2 * 2 * WIDTH + (4 if kv_heads < degree else 2) * keys) * away
