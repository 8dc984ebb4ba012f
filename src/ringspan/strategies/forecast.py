"""When each rank computes, waits and sends, predicted from a schedule and a description of the machine.

Work is priced by pairs: 4·head_dim FLOPs a pair and head, and its exponential; and by kernel calls, the keys that are seen by the same
queries in one: each takes a launch, and passes through memory what it reads, writes and prepares while it computes nothing. What calls give
is added up, which passes through memory too (`ringspan.strategies.sums`). A transfer begins when both ends have come to it; it takes the
latency, and its bytes at the bandwidth of the ports that it leaves and enters by, one after the other. A rank starts a step when its own
last one is done and what is due has come: ranks drift as they would.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

from ringspan.geometry import Layout, Mask
from ringspan.schedule import Action, Attend, Piece, PieceBytes, Receive, Schedule, Send, send_bytes
from ringspan.schedule.draw import tiles_between
from ringspan.strategies.common import is_seen_whole
from ringspan.strategies.sums import sum_bytes


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Ranks of equal speed, every two of them linked alike.

    Args:
        name: what it is.
        flops_per_second: of the attention kernel on one rank, forward.
        softmax_width: a pair's exponential takes as long as this many elements of its width do.
        link_bytes_per_second: of a rank's port, in each direction.
        latency_seconds: from posting a small transfer to its arrival, without signals.
        launch_seconds: of one kernel call.
        sum_seconds: of adding up, besides its bytes, where a launch of a kernel call does not include it.
        backward_factor: how many times as long as the forward of a tile its backward takes; 2.5 by the number of its matrix products.
        memory_bytes_per_second: at which results are added up; None where that is counted in the other rates.
        exchange_bytes_per_second: of a rank's port where positions are exchanged for heads, copies on both ends included; None for the
            link's.
        exchange_seconds: of an exchange of nothing; None for a latency and a launch.
        exchange_beside: what an exchange that goes on beside the computing takes of that, as a share of its own time; None where nothing
            is known of exchanges in stages.
        stage_seconds: of a pass, for each stage of the heads after the first.
        signal_seconds: of a rank's time to say that a transfer may come, and to read that it has; None for a fourth of a launch, which
            an end of a transfer takes where it is posted.
        rest_seconds: after which links that nobody uses rest; None where they do not.
        rest_saves: by how much of its time a rank computes faster meanwhile.
        host_seconds: of Python, for a kernel call that it launches while the device waits for nothing else; half of it for an end of a
            transfer.
    """

    name: str
    flops_per_second: float
    link_bytes_per_second: float
    latency_seconds: float
    launch_seconds: float
    backward_factor: float = 2.5
    memory_bytes_per_second: float | None = None
    exchange_bytes_per_second: float | None = None
    exchange_seconds: float | None = None
    exchange_beside: float | None = None
    stage_seconds: float = 0.0
    softmax_width: float = 0.0
    sum_seconds: float = 0.0
    signal_seconds: float | None = None
    rest_seconds: float | None = None
    rest_saves: float = 0.0
    host_seconds: float = 0.0


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
        host_seconds: what Python takes to launch the part of the rank that has most to launch. Launched so, no forecast ends sooner.
    """

    starts: tuple[tuple[float, ...], ...]
    ends: tuple[tuple[float, ...], ...]
    done: tuple[float, ...]
    transfers: tuple[Carried, ...]
    host_seconds: float = 0.0

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
    """What actions take on `machine`.

    Attributes:
        layout: whose shards they speak of.
        mask: what a query sees.
        sizes: of attention's tensors.
        machine: speeds.
        factor: 1 forward, and `machine.backward_factor` backward.
        sums: `sum_bytes` of the schedule.
    """

    layout: Layout
    mask: Mask
    sizes: PieceBytes
    machine: Machine
    factor: float
    sums: Mapping[Action, float] = field(default_factory=dict)

    def flops(self, attend: Attend) -> float:
        """Of every allowed pair of an attend."""
        pairs, _ = _work(self.layout, self.mask, attend.q, attend.kvs)
        return pairs * 4 * self.sizes.head_dim * self.sizes.heads * self.sizes.batch * self.factor

    def call_bytes(self, rows: int, keys: int) -> float:
        """What a call passes through memory while it computes nothing: blocks are read and written, and a backward prepares and rounds."""
        sizes = self.sizes
        query, key = (sizes.batch * heads * sizes.head_dim for heads in (sizes.heads, sizes.kv_heads))
        narrow, wide = sizes.element_bytes, sizes.accumulator_bytes
        if self.factor == 1.0:
            # q in, out out.
            return rows * query * 2 * narrow
        # Around the kernel: dO and out are read; dq is zeroed and read as a sum, and written. In it, for each query head: k and v in, dk
        # and dv out, which are sums, zeroed before and rounded after it, where several heads share them.
        around, shared = rows * query * (3 * narrow + 2 * wide), sizes.heads != sizes.kv_heads
        inside = keys * query * 2 * (narrow + (wide if shared else narrow))
        return around + inside + (keys * key * 2 * (2 * wide + narrow) if shared else 0)

    def seconds(self, action: Action) -> float:
        """Of a rank's time."""
        machine = self.machine
        if isinstance(action, (Send, Receive)):
            if machine.signal_seconds is None:
                return machine.launch_seconds / 4
            # That it may come. Who sends waits for that beside what it computes.
            return machine.signal_seconds if isinstance(action, Receive) else 0.0
        seconds, rate = 0.0, machine.memory_bytes_per_second
        if isinstance(action, Attend):
            _, calls = _work(self.layout, self.mask, action.q, action.kvs)
            width = 1.0 + machine.softmax_width / self.sizes.head_dim
            seconds = self.flops(action) * width / machine.flops_per_second + len(calls) * machine.launch_seconds
            seconds += 0.0 if rate is None else sum(self.call_bytes(*call) for call in calls) / rate
        if rate is not None and (added := self.sums.get(action)):
            seconds += machine.sum_seconds + added / rate
        return seconds

    def host_seconds(self, action: Action) -> float:
        """Of Python's, where it launches what a rank does."""
        if isinstance(action, Attend):
            return len(_work(self.layout, self.mask, action.q, action.kvs)[1]) * self.machine.host_seconds
        return self.machine.host_seconds / 2 if isinstance(action, (Send, Receive)) else 0.0


def prices_of(schedule: Schedule, layout: Layout, mask: Mask, sizes: PieceBytes, machine: Machine) -> Prices:
    """The prices of the actions of `schedule`."""
    factor = 1.0 if schedule.direction == "forward" else machine.backward_factor
    unpriced = machine.memory_bytes_per_second is None
    sums = {} if unpriced else sum_bytes(schedule, sizes, lambda attend: _work(layout, mask, attend.q, attend.kvs)[1])
    return Prices(layout, mask, sizes, machine, factor, sums)


@lru_cache(maxsize=65536)
def _work(layout: Layout, mask: Mask, q: Piece, kvs: tuple[Piece, ...]) -> tuple[int, list[tuple[int, int]]]:
    """The pairs of an attend, and (rows, keys) of its kernel calls, where keys that all the same queries see are one's."""
    together: dict[tuple[int, int], int] = {}
    calls: list[tuple[int, int]] = []
    pairs = 0
    for kv in kvs:
        found = tiles_between(layout, mask, q, kv)
        pairs += sum(tile.pairs for tile in found)
        if is_seen_whole(found, mask):
            rows = found[0].q_start, found[0].q_stop
            together[rows] = together.get(rows, 0) + found[0].num_keys
        elif found:
            # However many tiles there are of one shard, the kernel computes them in one go, or in few.
            rows = max(tile.q_stop for tile in found) - min(tile.q_start for tile in found)
            calls.append((rows, max(tile.k_stop for tile in found) - min(tile.k_start for tile in found)))
    return pairs, calls + [(stop - start, keys) for (start, stop), keys in together.items()]


def forecast(schedule: Schedule, layout: Layout, mask: Mask, sizes: PieceBytes, machine: Machine) -> Forecast:
    """`schedule` in predicted time.

    Args:
        schedule: forward or backward.
        layout: whose shards the schedule speaks of.
        mask: what a query sees.
        sizes: of attention's tensors, with the heads that a rank computes.
        machine: speeds of the ranks and links.
    """
    prices = prices_of(schedule, layout, mask, sizes, machine)
    ranks = range(schedule.num_ranks)
    clock = [0.0] * schedule.num_ranks
    leaves, enters = list(clock), list(clock)
    arrives: dict[tuple[int, int], float] = defaultdict(float)
    # For each message that has come, its signal is read.
    heard: dict[tuple[int, int], float] = defaultdict(float)
    signal = machine.signal_seconds or 0.0
    cells: dict[tuple[int, int], list[Action]] = defaultdict(list)
    for rank, program in enumerate(schedule.programs):
        for action in program:
            cells[(rank, action.step)].append(action)
    begun, ended, transfers = [], [], []
    for step in range(schedule.num_steps):
        starts = [max(clock[rank], arrives[(rank, step)]) + heard[(rank, step)] for rank in ranks]
        free = [starts[rank] + signal * sum(isinstance(action, Receive) for action in cells[(rank, step)]) for rank in ranks]
        # They are written side by side; each port sends and takes all the while, as it does in this order.
        sends = [(rank, send) for rank in ranks for send in _sends(cells[(rank, step)])]
        for rank, send in sorted(sends, key=lambda sent: (sent[1].due, (sent[1].peer - sent[0]) % schedule.num_ranks)):
            ready = max(starts[rank], free[send.peer])
            begins = max(ready, leaves[rank], enters[send.peer])
            size = send_bytes(schedule, rank, send, sizes)
            leaves[rank] = enters[send.peer] = begins + size / machine.link_bytes_per_second
            there = leaves[rank] + machine.latency_seconds
            transfers.append(Carried(step, rank, send.peer, send.piece, send.due, size, ready, begins, there))
            arrives[(send.peer, send.due)] = max(arrives[(send.peer, send.due)], there)
            heard[(send.peer, send.due)] += signal
        clock = [starts[rank] + sum(map(prices.seconds, cells[(rank, step)])) for rank in ranks]
        begun.append(tuple(starts))
        ended.append(tuple(clock))
    done = list(clock)
    for (target, _), time in arrives.items():
        done[target] = max(done[target], time)
    host = max((sum(map(prices.host_seconds, program)) for program in schedule.programs), default=0.0) if machine.host_seconds else 0.0
    return Forecast(tuple(begun), tuple(ended), tuple(done), tuple(transfers), host)


def _sends(cell: Iterable[Action]) -> Iterable[Send]:
    return (action for action in cell if isinstance(action, Send))
