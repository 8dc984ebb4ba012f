"""DeepSpeed-Ulysses: every rank exchanges positions for heads, and computes all positions of its heads with one kernel.

Jacobs et al. (2309.14509). Per rank and forward it sends 4Nh/P elements (queries, keys, values, output) for N tokens of width h, whatever
the mask; forward and backward are eight all-to-alls in the paper and four here, since q, k and v travel together. Any number of heads
works, uneven shares included; key heads that several ranks need are sent to each of them.
"""

from __future__ import annotations

from ringspan.geometry import Layout, Mask
from ringspan.strategies.common import Schedules
from ringspan.strategies.two_dimensional import two_dimensional


def ulysses(layout: Layout, mask: Mask) -> Schedules:
    """Two-dimensional attention with a single head group: all ranks."""
    return two_dimensional(layout, mask, ulysses=layout.num_ranks, placement="context_first")
