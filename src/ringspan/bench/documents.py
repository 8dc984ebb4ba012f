"""A realistic mixture of document lengths: many short ones, and a few that are as long as all the others together."""

from __future__ import annotations

import math
import random

from ringspan.errors import RingspanError

MEDIAN_TOKENS = 600.0
"""Half of the documents are shorter."""

SPREAD = 1.3
"""Standard deviation of the logarithm of a length: one document in twenty is over five thousand tokens long."""


def realistic_lengths(total: int, seed: int) -> tuple[int, ...]:
    """Document lengths that add up to `total`, log-normal as those of web text are: median 600 tokens, spread 1.3 in the logarithm.

    The last document is cut to fit. The same for one total and seed on every machine. Nothing in them is a round number, so that they
    divide by no number of ranks.

    Raises:
        RingspanError: for a total below 1.
    """
    if total < 1:
        raise RingspanError(f"documents of {total} tokens in all", "", "There is at least one token", "a total of 1")
    draw = random.Random(f"{seed} {total}")
    lengths: list[int] = []
    left = total
    while left:
        length = min(left, max(1, round(math.exp(draw.gauss(math.log(MEDIAN_TOKENS), SPREAD)))))
        lengths.append(length)
        left -= length
    return tuple(lengths)


def parse_documents(text: str) -> int:
    """The seed of `realistic:SEED`.

    Raises:
        RingspanError: for anything else.
    """
    name, _, seed = text.partition(":")
    if name != "realistic" or not seed.isdecimal():
        raise RingspanError(
            f"--documents {text!r}",
            "it does not read",
            "Mixtures are realistic:SEED; documents of given lengths are part of the mask, as in causal&documents:LENGTH,LENGTH,…",
            "--documents realistic:0",
        )
    return int(seed)
