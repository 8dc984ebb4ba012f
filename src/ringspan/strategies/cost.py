"""What a strategy costs: seconds, bytes and memory of one attention layer, predicted from its schedules and a description of the links.

Work is priced by pairs: 4·head_dim FLOPs a pair and head forward, 2.5 times that backward, and a launch for each piece of keys. A transfer
takes the latency, and its bytes at the bandwidth of the ports that it leaves and enters by, one after the other. A rank starts a step when
its own last one is done and what is due has come: ranks drift as they would.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, replace

from ringspan.geometry import Layout, Mask, head_shares, tiles
from ringspan.schedule import Attend, PieceBytes, Receive, Schedule, Send, send_bytes
from ringspan.schedule.validate import live_positions
from ringspan.strategies.common import Schedules
from ringspan.strategies.links import Links, exchange_bytes, link_bytes


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Ranks of equal speed, every two of them linked alike.

    Args:
        name: what it is.
        flops_per_second: of the attention kernel on one rank.
        link_bytes_per_second: of a rank's port, in each direction.
        latency_seconds: from posting a small transfer to its arrival.
        launch_seconds: of one kernel call from Python, its merge included.
    """

    name: str
    flops_per_second: float
    link_bytes_per_second: float
    latency_seconds: float
    launch_seconds: float


MACHINES = {
    "cuda": Machine(name="NVLink GPUs", flops_per_second=5.5e14, link_bytes_per_second=2.9e11, latency_seconds=1e-4, launch_seconds=1e-4),
    "cpu": Machine(name="CPU processes", flops_per_second=5e10, link_bytes_per_second=1e9, latency_seconds=2e-4, launch_seconds=1e-4),
}
"""By device: what was measured on two H100 over NVLink (2026-11), and what gloo does on one host."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one layer costs, forward and backward.

    Attributes:
        seconds: until the last rank is done.
        sent_bytes: of the rank that sends most.
        live_bytes: of visitors, on the rank that holds most at once.
        computing: the share of the time in which the ranks compute, on average.
    """

    seconds: float
    sent_bytes: int
    live_bytes: int
    computing: float


def cost(schedules: Schedules, layout: Layout, mask: Mask, sizes: PieceBytes, machine: Machine) -> Cost:
    """The cost of `schedules` for `layout` (of all ranks) and `mask`, with tensors of `sizes`, on `machine`."""
    inner, seconds = sizes, 0.0
    if (grid := schedules.grid) is not None:
        widest = max(head_shares(sizes.heads, sizes.kv_heads, grid.degree), key=lambda share: share.heads)
        inner = replace(sizes, heads=widest.heads, kv_heads=widest.kv_heads)
        if grid.degree > 1:
            # q, k and v there, out back; dO there, dq, dk and dv back.
            exchanged = (_busiest(exchange_bytes(grid, layout, sizes, direction)) for direction in ("forward", "backward"))
            seconds = 4 * (machine.latency_seconds + machine.launch_seconds) + sum(exchanged) / machine.link_bytes_per_second
    sent = _busiest(sum((link_bytes(schedules, layout, sizes, direction) for direction in ("forward", "backward")), Counter()))
    busy, live = 0.0, 0
    for schedule, factor in ((schedules.forward, 1.0), (schedules.backward, 2.5)):
        ends, busiest = _run(schedule, schedules.layout, mask, inner, machine, factor)
        seconds, busy = seconds + ends, busy + busiest
        held = (sum(most * inner.of(kind) for kind, most in rank.items()) for rank in live_positions(schedule))
        live = max(live, max(held, default=0))
    return Cost(seconds=seconds, sent_bytes=sent, live_bytes=live, computing=busy / seconds if seconds else 1.0)


def _busiest(links: Links) -> int:
    """The bytes of the rank that sends most."""
    by_rank: Counter[int] = Counter()
    for (source, _), size in links.items():
        by_rank[source] += size
    return max(by_rank.values(), default=0)


def _run(schedule: Schedule, layout: Layout, mask: Mask, sizes: PieceBytes, machine: Machine, factor: float) -> tuple[float, float]:
    """(seconds until all ranks are done, mean seconds of computing)."""
    ranks = range(schedule.num_ranks)
    clock, busy = [0.0] * schedule.num_ranks, 0.0
    leaves, enters = list(clock), list(clock)
    arrives: dict[tuple[int, int], float] = defaultdict(float)
    cells: dict[tuple[int, int], list] = defaultdict(list)
    for rank, program in enumerate(schedule.programs):
        for action in program:
            cells[(rank, action.step)].append(action)
    flops = 4 * sizes.head_dim * sizes.heads * sizes.batch * factor
    for step in range(schedule.num_steps):
        starts = [max(clock[rank], arrives[(rank, step)]) for rank in ranks]
        for rank in ranks:
            for action in cells[(rank, step)]:
                if isinstance(action, Send):
                    begins = max(starts[rank], starts[action.peer], leaves[rank], enters[action.peer])
                    ends = begins + send_bytes(schedule, rank, action, sizes) / machine.link_bytes_per_second
                    leaves[rank] = enters[action.peer] = ends
                    key = (action.peer, action.due)
                    arrives[key] = max(arrives[key], ends + machine.latency_seconds)
        for rank in ranks:
            work = 0.0
            for action in cells[(rank, step)]:
                if isinstance(action, Attend):
                    pairs = sum(_pairs(layout, mask, action.q.owner, kv.owner) for kv in action.kvs)
                    launches = len({kv.owner for kv in action.kvs})
                    work += pairs * flops / machine.flops_per_second + launches * machine.launch_seconds
                elif isinstance(action, (Send, Receive)):
                    work += machine.launch_seconds / 4
            clock[rank], busy = starts[rank] + work, busy + work
    done = max((max(clock[rank], *(time for (target, _), time in arrives.items() if target == rank), 0.0) for rank in ranks), default=0.0)
    return done, busy / max(1, schedule.num_ranks)


def _pairs(layout: Layout, mask: Mask, q_owner: int, kv_owner: int) -> int:
    return sum(tile.pairs for tile in tiles(layout, mask, q_owner, kv_owner))
