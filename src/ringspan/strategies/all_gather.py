"""All-gather attention: every rank fetches all the keys and values that it reads, in a few large stages.

One stage is the all-gather of Llama 3's context parallelism and of PyTorch's `context_parallel`: the local block is computed while
everything else arrives, and then the rest in one kernel call. N − 1 stages are a ring without forwarding. In between, fewer launches are
traded against memory: two stages are held at once. Gradients go straight home, as a reduce-scatter would bring them.
"""

from __future__ import annotations

from ringspan.errors import RingspanError
from ringspan.geometry import Layout, Mask
from ringspan.geometry.span import split_evenly
from ringspan.schedule import ScheduleBuilder
from ringspan.strategies.common import Schedules, block, hull, straight_backward


def all_gather(layout: Layout, mask: Mask, stages: int = 1) -> Schedules:
    """Forward and backward schedules with the remote shards in `stages` groups.

    Raises:
        RingspanError: for a number of stages below 1.
    """
    if stages < 1:
        raise RingspanError(f"all_gather with stages={stages}", "", "Keys arrive in at least one stage", "stages=1")
    num_ranks = layout.num_ranks
    builder = ScheduleBuilder("all_gather", "forward", layout.shard_lengths)
    for rank in range(num_ranks):
        if (own := block(layout, mask, rank, rank)) is not None:
            builder.attend(rank, 0, *own)
        for step, group in enumerate(split_evenly(num_ranks - 1, min(stages, max(1, num_ranks - 1))), start=1):
            owners = [(rank - 1 - hops) % num_ranks for hops in group]
            found = [pieces for owner in owners if (pieces := block(layout, mask, rank, owner)) is not None]
            for _, kv in found:
                builder.transfer(kv, kv.owner, rank, posted=step - 1, due=step)
            if found:
                builder.attend(rank, step, hull([q for q, _ in found]), *(kv for _, kv in found))
    forward = builder.build()
    return Schedules(forward, straight_backward(forward), layout)
