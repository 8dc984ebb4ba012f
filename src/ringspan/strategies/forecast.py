"""When each rank computes, waits and sends, predicted from a schedule and a description of the machine.

Work is priced by pairs: 4·head_dim FLOPs a pair and head; and by kernel calls, the keys that are seen by the same queries in one: each
takes a launch, and reads and writes memory besides, to prepare its tile and to add up what it gives. A transfer takes the latency, and its
bytes at the bandwidth of the ports that it leaves and enters by, one after the other. A rank starts a step when its own last one is done
and what is due has come: ranks drift as they would.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from ringspan.geometry import Layout, Mask
from ringspan.schedule import Action, Attend, Piece, PieceBytes, Receive, Schedule, Send, send_bytes
from ringspan.schedule.draw import pairs_between, tiles_between
from ringspan.strategies.common import is_seen_whole


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Ranks of equal speed, every two of them linked alike.

    Args:
        name: what it is.
        flops_per_second: of the attention kernel on one rank, forward.
        link_bytes_per_second: of a rank's port, in each direction.
        latency_seconds: from posting a small transfer to its arrival.
        launch_seconds: of one kernel call from Python, its merge included.
        backward_factor: how many times as long as the forward of a tile its backward takes; 2.5 by the number of its matrix products.
        memory_bytes_per_second: at which results are added up; None where that is counted in the other rates.
        exchange_bytes_per_second: of a rank's port where positions are exchanged for heads, packing included; None for the link's.
    """

    name: str
    flops_per_second: float
    link_bytes_per_second: float
    latency_seconds: float
    launch_seconds: float
    backward_factor: float = 2.5
    memory_bytes_per_second: float | None = None
    exchange_bytes_per_second: float | None = None


@dataclass(frozen=True, slots=True)
class Carried:
    """A transfer of a forecast, of `size` bytes, in seconds from the start.

    Both ends have posted it at `ready`, and its first byte leaves at `begins`.
    """

    step: int
    source: int
    target: int
    piece: Piece
    due: int
    size: int
    ready: float
    begins: float
    arrives: float


@dataclass(frozen=True)
class Forecast:
    """A schedule in predicted time, in seconds from the common start.

    Attributes:
        starts: for each step, when each rank begins it.
        ends: for each step, when each rank has computed it and begins to wait for what the next one needs.
        done: when each rank is done, all that it waits for included.
        transfers: everything that travels.
    """

    starts: tuple[tuple[float, ...], ...]
    ends: tuple[tuple[float, ...], ...]
    done: tuple[float, ...]
    transfers: tuple[Carried, ...]

    @property
    def seconds(self) -> float:
        """Until the last rank is done."""
        return max(self.done, default=0.0)

    @cached_property
    def busy(self) -> tuple[float, ...]:
        """For each rank how long it computes."""
        steps = list(zip(self.starts, self.ends, strict=True))
        return tuple(sum(end[rank] - start[rank] for start, end in steps) for rank in range(len(self.done)))


@dataclass(frozen=True)
class Prices:
    """What actions take on `machine`. `factor` is 1 forward, and `machine.backward_factor` backward."""

    layout: Layout
    mask: Mask
    sizes: PieceBytes
    machine: Machine
    factor: float

    def flops(self, attend: Attend) -> float:
        """Of every allowed pair of an attend."""
        pairs = sum(pairs_between(self.layout, self.mask, attend.q, kv) for kv in attend.kvs)
        return pairs * 4 * self.sizes.head_dim * self.sizes.heads * self.sizes.batch * self.factor

    def call_bytes(self, rows: int, keys: int) -> float:
        """What a call passes through memory besides its operands: results in, sums in and out; in a backward also the kernel's own sums."""
        sizes = self.sizes
        query, key = (sizes.batch * heads * sizes.head_dim for heads in (sizes.heads, sizes.kv_heads))
        if self.factor == 1.0:
            return rows * query * (sizes.element_bytes + 2 * sizes.accumulator_bytes)
        # dO and out are read; dq is zeroed and read as a sum, written, and added; dk and dv are written and added.
        each = 4 * sizes.element_bytes + 4 * sizes.accumulator_bytes
        return rows * query * each + 2 * keys * key * (2 * sizes.element_bytes + 2 * sizes.accumulator_bytes)

    def seconds(self, action: Action) -> float:
        """Of a rank's time; a combine costs nothing here."""
        if isinstance(action, Attend):
            calls = _calls(self.layout, self.mask, action)
            rate, passed = self.machine.memory_bytes_per_second, sum(self.call_bytes(rows, keys) for rows, keys in calls)
            adding = 0.0 if rate is None else passed / rate
            return self.flops(action) / self.machine.flops_per_second + len(calls) * self.machine.launch_seconds + adding
        return self.machine.launch_seconds / 4 if isinstance(action, (Send, Receive)) else 0.0


def _calls(layout: Layout, mask: Mask, attend: Attend) -> list[tuple[int, int]]:
    """(rows, keys) of the kernel calls of an attend, where keys that all the same queries see are one's."""
    together: dict[tuple[int, int], int] = {}
    apart: list[tuple[int, int]] = []
    for kv in attend.kvs:
        found = tiles_between(layout, mask, attend.q, kv)
        if is_seen_whole(found, mask):
            rows = found[0].q_start, found[0].q_stop
            together[rows] = together.get(rows, 0) + found[0].num_keys
        elif found:
            # However many tiles there are of one shard, the kernel computes them in one go, or in few.
            rows = max(tile.q_stop for tile in found) - min(tile.q_start for tile in found)
            apart.append((rows, max(tile.k_stop for tile in found) - min(tile.k_start for tile in found)))
    return apart + [(stop - start, keys) for (start, stop), keys in together.items()]


def forecast(schedule: Schedule, layout: Layout, mask: Mask, sizes: PieceBytes, machine: Machine) -> Forecast:
    """`schedule` in predicted time.

    Args:
        schedule: forward or backward.
        layout: whose shards the schedule speaks of.
        mask: what a query sees.
        sizes: of attention's tensors, with the heads that a rank computes.
        machine: speeds of the ranks and links.
    """
    prices = Prices(layout, mask, sizes, machine, 1.0 if schedule.direction == "forward" else machine.backward_factor)
    ranks = range(schedule.num_ranks)
    clock = [0.0] * schedule.num_ranks
    leaves, enters = list(clock), list(clock)
    arrives: dict[tuple[int, int], float] = defaultdict(float)
    cells: dict[tuple[int, int], list[Action]] = defaultdict(list)
    for rank, program in enumerate(schedule.programs):
        for action in program:
            cells[(rank, action.step)].append(action)
    begun, ended, transfers = [], [], []
    for step in range(schedule.num_steps):
        starts = [max(clock[rank], arrives[(rank, step)]) for rank in ranks]
        for rank in ranks:
            for send in _sends(cells[(rank, step)]):
                ready = max(starts[rank], starts[send.peer])
                begins = max(ready, leaves[rank], enters[send.peer])
                size = send_bytes(schedule, rank, send, sizes)
                leaves[rank] = enters[send.peer] = begins + size / machine.link_bytes_per_second
                there = leaves[rank] + machine.latency_seconds
                transfers.append(Carried(step, rank, send.peer, send.piece, send.due, size, ready, begins, there))
                arrives[(send.peer, send.due)] = max(arrives[(send.peer, send.due)], there)
        clock = [starts[rank] + sum(map(prices.seconds, cells[(rank, step)])) for rank in ranks]
        begun.append(tuple(starts))
        ended.append(tuple(clock))
    done = list(clock)
    for (target, _), time in arrives.items():
        done[target] = max(done[target], time)
    return Forecast(tuple(begun), tuple(ended), tuple(done), tuple(transfers))


def _sends(cell: Iterable[Action]) -> Iterable[Send]:
    return (action for action in cell if isinstance(action, Send))
