"""Every strategy with its options, every layout and every mask, and what is known to be refused among them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import ringspan
from ringspan.errors import RingspanError
from ringspan.geometry import Layout, documents, make_layout, sliding_window
from ringspan.strategies import Schedules, make_schedules
from tests.support.masks import EXAMPLES, Example, borders
from tests.support.split import weights_for

Options = dict[str, int | str]

LAYOUTS = ringspan.layouts


def _smallest_divisor(ranks: int) -> int:
    return next(size for size in (*range(2, ranks + 1), 1) if ranks % size == 0)


VARIANTS: dict[str, tuple[str, Callable[[int], Options]]] = {
    "ring": ("ring", lambda ranks: {}),
    "ring of queries": ("ring", lambda ranks: {"rotate": "queries"}),
    "ring in parts": ("ring", lambda ranks: {"parts": 1 + ranks // 2}),
    "all_gather": ("all_gather", lambda ranks: {}),
    "all_gather in stages": ("all_gather", lambda ranks: {"stages": 1 + ranks // 2}),
    "pass_query": ("pass_query", lambda ranks: {}),
    "balanced": ("balanced", lambda ranks: {}),
    "double_ring": ("double_ring", lambda ranks: {}),
    "double_ring of the smallest": ("double_ring", lambda ranks: {"window": _smallest_divisor(ranks)}),
    "direct": ("direct", lambda ranks: {}),
    "direct, several at once": ("direct", lambda ranks: {"shards_at_once": 1 + ranks // 2}),
    "tree": ("tree", lambda ranks: {}),
    "ulysses": ("ulysses", lambda ranks: {}),
    "ulysses in stages": ("ulysses", lambda ranks: {"stages": 2}),
    "two_dimensional": ("two_dimensional", lambda ranks: {}),
    "two_dimensional around direct": ("two_dimensional", lambda ranks: {"ulysses": _smallest_divisor(ranks), "inner": "direct"}),
    "two_dimensional, context first": (
        "two_dimensional",
        lambda ranks: {"ulysses": _smallest_divisor(ranks), "inner": "balanced", "placement": "context_first"},
    ),
    "ring_self_attention": ("ring_self_attention", lambda ranks: {}),
}
"""Name to strategy and options for a number of ranks."""


def _both(first: Example, second: Example) -> Example:
    return Example(
        lambda length: first.make(length) & second.make(length),
        lambda q, k, length: first.allows(q, k, length) & second.allows(q, k, length),
    )


def _same_document(q, k, length):
    inner = borders(length)[1:-1]
    return sum(((q >= border) != (k >= border)).long() for border in inner) + 0 * (q + k) == 0


_FULL_DOCUMENTS = Example(lambda length: documents(borders(length)), _same_document)

MASKS: dict[str, Example] = {
    **EXAMPLES,
    "long window": Example(lambda length: sliding_window(length // 2), lambda q, k, length: (k <= q) & (k >= q - length // 2)),
    "window of all that follows": Example(lambda length: sliding_window(0, None), lambda q, k, length: k >= q),
    "full documents": _FULL_DOCUMENTS,
    "documents & window": _both(EXAMPLES["documents"], EXAMPLES["window"]),
    "prefix & full documents": _both(EXAMPLES["prefix"], _FULL_DOCUMENTS),
    "blocks & causal": _both(EXAMPLES["blocks"], EXAMPLES["causal"]),
    "mask_mod & two-sided window": _both(EXAMPLES["mask_mod"], EXAMPLES["two-sided window"]),
}
"""Those of `tests.support.masks`, and what becomes of several together."""


@dataclass(frozen=True)
class Combination:
    """One way to split attention."""

    variant: str
    layout: str
    mask: str
    ranks: int
    length: int

    @property
    def strategy(self) -> str:
        """The strategy's name."""
        return VARIANTS[self.variant][0]

    @property
    def options(self) -> Options:
        """The strategy's options."""
        return VARIANTS[self.variant][1](self.ranks)

    def make_layout(self) -> Layout:
        """The layout of all ranks."""
        weights = weights_for(self.layout, self.ranks)
        return make_layout(self.layout, self.length, self.ranks, weights, MASKS[self.mask].make(self.length))

    def make_schedules(self) -> Schedules:
        """Forward and backward."""
        return make_schedules(self.strategy, self.make_layout(), MASKS[self.mask].make(self.length), **self.options)

    @contextmanager
    def unless_refused(self) -> Iterator[None]:
        """Lets a refusal pass where neighbouring ranks of a striped layout are a head group of several, and nowhere else."""
        try:
            yield
        except RingspanError as error:
            known = self.strategy == "two_dimensional" and self.layout == "striped" and self.options.get("placement") is None
            if not known or "not evenly spaced" not in str(error):
                raise


def length_for(ranks: int, index: int) -> int:
    """A length for so many ranks: below their number, one of no multiple, and a multiple, by turns."""
    return (max(1, ranks - 1), 5 * ranks + 3, 4 * ranks + 1, 6 * ranks)[index % 4]


def each(variants: list[str] | None = None) -> Iterator[Callable[[int, int], Combination]]:
    """Every variant under every layout and mask, waiting for a number of ranks and a length. Neighbours differ in all three."""
    names, masks = list(variants or VARIANTS), list(MASKS)
    for turn in range(len(LAYOUTS) * len(masks)):
        for index, variant in enumerate(names):
            # The number of layouts divides neither that of masks nor the step between variants, so every pair comes up.
            at = (turn + 7 * index) % (len(LAYOUTS) * len(masks))
            yield partial(Combination, variant, LAYOUTS[at % len(LAYOUTS)], masks[at // len(LAYOUTS)])
