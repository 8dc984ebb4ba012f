"""What a strategy costs: seconds, bytes and memory of one attention layer, predicted from its schedules and a description of the links.

How time passes is said in `ringspan.strategies.forecast`.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace

from ringspan.geometry import Layout, Mask, head_shares
from ringspan.schedule import PieceBytes
from ringspan.schedule.validate import live_positions
from ringspan.strategies.common import Schedules
from ringspan.strategies.forecast import Forecast, Machine, forecast

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


@dataclass(frozen=True, kw_only=True)
class LayerForecast:
    """One layer in predicted time.

    Attributes:
        forward: the forward schedule, begun by all ranks together.
        backward: the backward schedule, likewise.
        sizes: of the tensors that a rank of the schedules computes: with its share of the heads where positions are exchanged for heads.
        exchanged_bytes: what the rank with most heads sends in exchanging positions for heads, forward and backward.
        exchanges: seconds of each exchange: before and after the forward, before and after the backward.
    """

    forward: Forecast
    backward: Forecast
    sizes: PieceBytes
    exchanged_bytes: int
    exchanges: tuple[float, float, float, float]

    @property
    def seconds(self) -> float:
        """Of all of it, one part after the other."""
        return sum(self.exchanges) + self.forward.seconds + self.backward.seconds


def forecast_layer(schedules: Schedules, layout: Layout, mask: Mask, sizes: PieceBytes, machine: Machine) -> LayerForecast:
    """Forward and backward of `schedules` for `layout` (of all ranks) and `mask`, with tensors of `sizes`, on `machine`."""
    inner, volumes = sizes, (0, 0, 0, 0)
    if schedules.grid is not None:
        shares = head_shares(sizes.heads, sizes.kv_heads, schedules.grid.degree)
        widest = max(shares, key=lambda share: share.heads)
        inner = replace(sizes, heads=widest.heads, kv_heads=widest.kv_heads)
        position = max(layout.shard_lengths) * sizes.batch * sizes.head_dim * sizes.element_bytes
        heads = (sizes.heads - min(share.heads for share in shares)) * position
        kv_heads = (sum(share.kv_heads for share in shares) - widest.kv_heads) * position
        # q, k and v there, out back; dO there, dq, dk and dv back.
        volumes = (heads + 2 * kv_heads, heads, heads, heads + 2 * kv_heads)
    overhead = machine.latency_seconds + machine.launch_seconds if schedules.grid is not None and schedules.grid.degree > 1 else 0.0
    there, back, there_again, back_again = (overhead and overhead + volume / machine.link_bytes_per_second for volume in volumes)
    forward, backward = (forecast(schedule, schedules.layout, mask, inner, machine) for schedule in (schedules.forward, schedules.backward))
    return LayerForecast(
        forward=forward,
        backward=backward,
        sizes=inner,
        exchanged_bytes=sum(volumes),
        exchanges=(there, back, there_again, back_again),
    )


def cost(schedules: Schedules, layout: Layout, mask: Mask, sizes: PieceBytes, machine: Machine) -> Cost:
    """The cost of `schedules` for `layout` (of all ranks) and `mask`, with tensors of `sizes`, on `machine`."""
    predicted = forecast_layer(schedules, layout, mask, sizes, machine)
    sent, live, inner = predicted.exchanged_bytes, 0, predicted.sizes
    for schedule in (schedules.forward, schedules.backward):
        by_rank: dict[int, int] = defaultdict(int)
        for rank, send in schedule.sends():
            by_rank[rank] += len(send.piece) * inner.of(send.piece.kind)
        sent += max(by_rank.values(), default=0)
        held = (sum(most * inner.of(kind) for kind, most in rank.items()) for rank in live_positions(schedule))
        live = max(live, max(held, default=0))
    busy = sum(sum(half.busy) / max(1, len(half.busy)) for half in (predicted.forward, predicted.backward))
    return Cost(
        seconds=predicted.seconds, sent_bytes=sent, live_bytes=live, computing=busy / predicted.seconds if predicted.seconds else 1.0
    )
