"""DeepSpeed-Ulysses: every rank exchanges positions for heads, and computes all positions of its heads with one kernel.

Jacobs et al. (2309.14509). Per rank and forward it sends 4Nh/P elements (queries, keys, values, output) for N tokens of width h, whatever
the mask; forward and backward are eight all-to-alls in the paper and four here, since q, k and v travel together. Any number of heads
works, uneven shares included; key heads that several ranks need are sent to each of them.

The exchange stands before the computing and after it. In stages, of some of a rank's key heads each, all but the first stage's way there
and the last's way back goes on beside the computing of others (UPipe, 2026, takes stages for memory's sake, one after the other). Over long
sequences all ways back wait for the last stage, so that links rest until then.
"""

from __future__ import annotations

from dataclasses import replace

from ringspan.errors import RingspanError
from ringspan.geometry import Layout, Mask
from ringspan.strategies.common import Schedules
from ringspan.strategies.two_dimensional import two_dimensional


def ulysses(layout: Layout, mask: Mask, stages: int = 1) -> Schedules:
    """Two-dimensional attention with a single head group: all ranks.

    Args:
        layout: who owns which positions.
        mask: what a query sees.
        stages: in how many the heads are exchanged and computed, at most as many as a rank has key heads.

    Raises:
        RingspanError: for fewer than one stage.
    """
    if stages < 1:
        raise RingspanError(f"strategy 'ulysses' with stages={stages}", "", "Heads are exchanged in one stage or more", "stages=1")
    schedules = two_dimensional(layout, mask, ulysses=layout.num_ranks, placement="context_first")
    return replace(schedules, head_stages=stages)
