"""What a strategy costs: seconds, bytes and memory of one attention layer, predicted from its schedules and a description of the links.

How time passes is said in `ringspan.strategies.forecast`. Where links rest when nobody uses them, ranks compute faster meanwhile.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from ringspan.geometry import Layout, Mask, head_shares
from ringspan.schedule import PieceBytes
from ringspan.schedule.validate import live_positions
from ringspan.strategies.common import Schedules
from ringspan.strategies.forecast import Forecast, Machine, forecast
from ringspan.strategies.links import Links, exchanges_bytes, link_bytes

_DIRECTIONS = ("forward", "backward")

MACHINES = {
    "cuda": Machine(
        name="NVLink GPUs",
        flops_per_second=8.8e14,
        softmax_width=40,
        link_bytes_per_second=2.9e11,
        latency_seconds=1e-5,
        launch_seconds=5e-6,
        sum_seconds=2e-6,
        signal_seconds=1.5e-6,
        backward_factor=2.6,
        memory_bytes_per_second=3.3e12,
        exchange_bytes_per_second=2.85e11,
        exchange_seconds=1.5e-5,
        exchange_beside=0.1,
        stage_seconds=1e-5,
        rest_seconds=0.05,
        rest_saves=0.025,
        host_seconds=3e-4,
    ),
    "cpu": Machine(
        name="CPU processes",
        flops_per_second=5e10,
        link_bytes_per_second=1e9,
        latency_seconds=2e-4,
        launch_seconds=1e-4,
        memory_bytes_per_second=1e10,
    ),
}
"""By device: what was measured on H100 and H200 over NVLink (2026-11), and what gloo does on one host.

The GPUs' launches and signals are the device's, where a graph is replayed or Python is ahead; Python's are `host_seconds`. Positions are
exchanged for heads through peer memory.
"""

SENDING = {
    **MACHINES,
    "cuda": replace(MACHINES["cuda"], latency_seconds=2e-5, exchange_bytes_per_second=1e11, exchange_beside=None, rest_seconds=None),
}
"""The same where a process group sends and receives: exchanges are packed and unpacked, and what the links are is not known."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one layer costs, forward and backward.

    Attributes:
        seconds: until the last rank is done.
        forward_seconds: of them those of the forward.
        launched_seconds: the same where Python launches it: no less than that takes.
        sent_bytes: of the rank that sends most.
        live_bytes: of visitors, on the rank that holds most at once.
        computing: the share of the time in which the ranks compute, on average.
    """

    seconds: float
    forward_seconds: float
    launched_seconds: float
    sent_bytes: int
    live_bytes: int
    computing: float


@dataclass(frozen=True, kw_only=True)
class LayerForecast:
    """One layer in predicted time.

    Attributes:
        forward: the forward schedule, begun by all ranks together.
        backward: the backward schedule, likewise.
        sizes: of the tensors that a rank of the schedules computes: with its share of the heads where positions are exchanged for heads.
        exchanges: seconds of each exchange of positions for heads: before and after the forward, before and after the backward. In stages,
            of what is not hidden.
        exchange_host_seconds: what Python takes to launch one of them.
        stages: in how many the heads are computed.
    """

    forward: Forecast
    backward: Forecast
    sizes: PieceBytes
    exchanges: tuple[float, float, float, float]
    exchange_host_seconds: float = 0.0
    stages: int = 1

    @property
    def seconds(self) -> float:
        """Of all of it, one part after the other."""
        return sum(self.exchanges) + self.forward.seconds + self.backward.seconds

    @property
    def launched_seconds(self) -> float:
        """The same where Python launches each pass, which then takes no less than Python does."""
        parts = ((self.forward, self.exchanges[:2]), (self.backward, self.exchanges[2:]))
        launching = (self.stages * half.host_seconds + 2 * self.exchange_host_seconds for half, _ in parts)
        return sum(max(half.seconds + sum(around), python) for (half, around), python in zip(parts, launching, strict=True))


def share_sizes(schedules: Schedules, sizes: PieceBytes) -> PieceBytes:
    """Of the tensors that a rank of `schedules` computes, with the largest share of the heads where positions are exchanged for heads."""
    if schedules.grid is None:
        return sizes
    widest = max(head_shares(sizes.heads, sizes.kv_heads, schedules.grid.degree), key=lambda share: share.heads)
    return replace(sizes, heads=widest.heads, kv_heads=widest.kv_heads)


def forecast_layer(schedules: Schedules, layout: Layout, mask: Mask, sizes: PieceBytes, machine: Machine) -> LayerForecast:
    """Forward and backward of `schedules` for `layout` (of all ranks) and `mask`, with tensors of `sizes`, on `machine`."""
    inner, exchanges, launching, stages = share_sizes(schedules, sizes), (0.0, 0.0, 0.0, 0.0), 0.0, 1
    forward, backward = (forecast(schedule, schedules.layout, mask, inner, machine) for schedule in (schedules.forward, schedules.backward))
    if (grid := schedules.grid) is not None and grid.degree > 1:
        # q, k and v there, out back; dO there, dq, dk and dv back.
        volumes = (_busiest(links) for direction in _DIRECTIONS for links in exchanges_bytes(grid, layout, sizes, direction))
        there, back, there_again, back_again = volumes
        stages = max(1, min(schedules.head_stages, inner.kv_heads))
        halves = (there, back, forward.seconds), (there_again, back_again, backward.seconds)
        exchanges = (*_exchanged(*halves[0], stages, machine), *_exchanged(*halves[1], stages, machine))
        # Both ends of a message to every other rank.
        launching = (grid.degree - 1) * machine.host_seconds
    return LayerForecast(
        forward=forward, backward=backward, sizes=inner, exchanges=exchanges, exchange_host_seconds=launching, stages=stages
    )


def _exchanged(there: int, back: int, computing: float, stages: int, machine: Machine) -> tuple[float, float]:
    """Seconds of the exchanges of so many bytes around a pass that computes for `computing` seconds: those in which it does not compute."""
    rate = machine.exchange_bytes_per_second or machine.link_bytes_per_second
    alone = machine.latency_seconds + machine.launch_seconds if machine.exchange_seconds is None else machine.exchange_seconds
    if stages == 1 or machine.exchange_beside is None:
        return stages * alone + there / rate, stages * alone + back / rate
    # The first stage on its way there, and the last on its way back: of the others there is time for what is computed meanwhile.
    late = (1 - 1 / stages) * max(0.0, (there + back) / rate - computing)
    shares = ((1 / stages + machine.exchange_beside * (1 - 1 / stages)) * volume / rate for volume in (there, back))
    first, last = (alone + seconds + (stages - 1) * machine.stage_seconds / 2 for seconds in shares)
    return first + late, last


def cost(schedules: Schedules, layout: Layout, mask: Mask, sizes: PieceBytes, machine: Machine) -> Cost:
    """The cost of `schedules` for `layout` (of all ranks) and `mask`, with tensors of `sizes`, on `machine`."""
    predicted = forecast_layer(schedules, layout, mask, sizes, machine)
    sent = _busiest(sum((link_bytes(schedules, layout, sizes, direction) for direction in _DIRECTIONS), Counter()))
    live = 0
    for schedule in (schedules.forward, schedules.backward):
        held = (sum(most * predicted.sizes.of(kind) for kind, most in rank.items()) for rank in live_positions(schedule))
        live = max(live, max(held, default=0))
    busy = sum(sum(half.busy) / max(1, len(half.busy)) for half in (predicted.forward, predicted.backward))
    saved = [rest_saves(half, predicted.stages, machine) for half in (predicted.forward, predicted.backward)]
    return Cost(
        seconds=predicted.seconds - sum(saved),
        forward_seconds=predicted.forward.seconds + sum(predicted.exchanges[:2]) - saved[0],
        launched_seconds=predicted.launched_seconds - sum(saved),
        sent_bytes=sent,
        live_bytes=live,
        computing=busy / predicted.seconds if predicted.seconds else 1.0,
    )


def rest_saves(half: Forecast, stages: int, machine: Machine) -> float:
    """Seconds by which a direction is sooner done than `half`, since links that nobody uses rest: those of the rank that gains least.

    Positions are exchanged for heads before and after it; in `stages`, when the last of them begins as well.
    """
    if machine.rest_seconds is None:
        return 0.0
    gained = []
    for rank, done in enumerate(half.done):
        used = sorted((each.begins, each.arrives) for each in half.transfers if rank in (each.source, each.target))
        used.append((done * (1 - 1 / stages) if stages > 1 else done, done))
        awake, seconds = 0.0, 0.0
        for begins, arrives in used:
            seconds += max(0.0, begins - awake - machine.rest_seconds)
            awake = max(awake, arrives)
        gained.append(seconds * machine.rest_saves)
    return min(gained, default=0.0)


def _busiest(links: Links) -> int:
    """The bytes of the rank that sends most."""
    by_rank: Counter[int] = Counter()
    for (source, _), size in links.items():
        by_rank[source] += size
    return max(by_rank.values(), default=0)
