"""The sizes that laws are tried on: few and fixed examples, so that the suite is quick and says the same on every machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from ringspan.errors import RingspanError
from ringspan.geometry import LAYOUTS, Layout, make_layout
from tests.support.split import weights_for

NUM_RANKS = (1, 2, 3, 4, 5, 7, 8)
LAYOUT_NAMES = (*LAYOUTS, "auto")
HEADS = ((4, 4), (4, 2), (4, 1), (9, 3), (3, 1), (1, 1))
"""Query and key heads: as many, grouped by two, one for all, SmolLM2's nine and three, an odd group, one."""

PRIMES = (2, 3, 5, 7, 11, 13, 17, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61)


def examples(count: int) -> settings:
    """So many examples, the same at every run, without a limit on the time of one (machines share their cores)."""
    return settings(max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))


def layout_of(name: str, length: int, num_ranks: int) -> Layout:
    """The layout, uneven where it takes weights."""
    return make_layout(name, length, num_ranks, weights_for(name, num_ranks))


@contextmanager
def unless_refused(strategy: str, layout: str, kernel: str = "reference") -> Iterator[None]:
    """Lets a refusal pass for the combinations that are refused: neighbouring ranks of a striped layout as a head group, and Ring
    Self-Attention with a kernel, which it has none of."""
    try:
        yield
    except RingspanError:
        if (strategy, layout) != ("two_dimensional", "striped") and (strategy, kernel) != ("ring_self_attention", "torch_cpu"):
            raise


num_ranks = st.sampled_from(NUM_RANKS)
layout_names = st.sampled_from(LAYOUT_NAMES)
lengths = st.one_of(st.integers(1, 9), st.sampled_from(PRIMES), st.integers(1, 64))
"""Below the number of ranks, prime, and anything."""

shapes = st.builds(
    lambda heads, batch, seed: {"heads": heads[0], "kv_heads": heads[1], "batch": batch, "seed": seed},
    st.sampled_from(HEADS),
    st.integers(1, 3),
    st.integers(0, 99),
)
"""Keywords of `make_tensors`."""
