"""Memory: what attention holds beyond its inputs and results, measured and as the schedule has it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from ringspan.geometry import Layout, head_shares
from ringspan.schedule import RESULTS, Attend, PieceBytes, Schedule
from ringspan.schedule.validate import live_positions
from ringspan.strategies import Schedules


@dataclass(frozen=True)
class Promise:
    """Bytes that the schedule asks of one rank beyond q, k, v, dO, out and the gradients.

    Attributes:
        visitors: pieces of other ranks, the most of each kind that lies there at once.
        accumulators: sums in float32: partial outputs with their lse in a forward, gradients in a backward.
        kernel: what the largest call of a kernel hands over before it is added there.
        exchanged: positions exchanged for heads, where a strategy does that.
    """

    visitors: int
    accumulators: int
    kernel: int
    exchanged: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.visitors + self.accumulators + self.kernel + self.exchanged

    def as_json(self) -> dict[str, int]:
        """Its parts and the total."""
        return {**asdict(self), "total": self.total}


def promise(schedules: Schedules, layout: Layout, sizes: PieceBytes, rank: int, direction: str) -> Promise:
    """The promise of a forward, or of the backward, to `rank`."""
    schedule = schedules.forward if direction == "forward" else schedules.backward
    grid, exchanged, lane = schedules.grid, 0, rank
    if grid is not None:
        share = head_shares(sizes.heads, sizes.kv_heads, grid.degree)[grid.place(rank)]
        sizes, lane = replace(sizes, heads=share.heads, kv_heads=share.kv_heads), grid.group(rank)
        if grid.degree > 1:
            # q, k, v and out of few heads, and in the backward dO; what is under way is less than what the kernel holds at another time.
            queries = 2 if direction == "forward" else 3
            exchanged = schedules.layout.shard_length(lane) * (queries * sizes.of("q") + sizes.of("kv"))
    if not sizes.heads:
        return Promise(0, 0, 0, exchanged)
    visitors = sum(count * sizes.of(kind) for kind, count in live_positions(schedule)[lane].items())
    return Promise(visitors, _accumulators(schedule, lane, sizes), _largest_call(schedule, lane, sizes), exchanged)


def promises(schedules: Schedules, layout: Layout, sizes: PieceBytes, at_once: PieceBytes, rank: int) -> dict[str, dict[str, int]]:
    """By pass the parts of what is promised to `rank`; of both, the larger, and the lse that the backward needs: out is a result.

    Args:
        sizes: of all heads.
        at_once: of those that are computed at once, see `staged`.
    """
    forward, backward = (promise(schedules, layout, at_once, rank, direction) for direction in ("forward", "backward"))
    lse = layout.shard_length(rank) * sizes.batch * sizes.heads * sizes.accumulator_bytes
    both = max(forward, backward, key=lambda each: each.total)
    return {"forward": forward.as_json(), "both": {**both.as_json(), "lse": lse, "total": both.total + lse}}


def staged(sizes: PieceBytes, kv_heads: int | str | None) -> PieceBytes:
    """What a position weighs with the heads that are computed at once, where `kv_heads` at a time take turns."""
    if kv_heads is None:
        return sizes
    at_once = min(int(kv_heads), sizes.kv_heads)
    return replace(sizes, heads=sizes.heads // sizes.kv_heads * at_once, kv_heads=at_once)


def _attends(schedule: Schedule, rank: int) -> list[Attend]:
    return [action for action in schedule.programs[rank] if isinstance(action, Attend)]


def _accumulators(schedule: Schedule, rank: int, sizes: PieceBytes) -> int:
    """The span of each piece that the rank adds to, once."""
    spans: dict[tuple[str, int], tuple[int, int]] = {}
    for attend in _attends(schedule, rank):
        for kv in attend.kvs:
            for kind in RESULTS[(schedule.direction, kv.kind)]:
                piece = attend.q if kind in ("o", "dq") else kv
                low, high = spans.get((kind, piece.owner), (piece.start, piece.stop))
                spans[(kind, piece.owner)] = (min(low, piece.start), max(high, piece.stop))
    return sum((stop - start) * sizes.of(kind) for (kind, _), (start, stop) in spans.items())


def _largest_call(schedule: Schedule, rank: int, sizes: PieceBytes) -> int:
    """out and lse of the queries, or dq, dk and dv, in the dtype of the inputs. All keys of an attend may be in one call."""

    def of(attend: Attend) -> int:
        keys = sum(map(len, attend.kvs))
        if schedule.direction == "forward":
            return len(attend.q) * (sizes.of("q") + sizes.batch * sizes.heads * sizes.accumulator_bytes)
        return len(attend.q) * sizes.of("q") + keys * sizes.of("kv")

    return max(map(of, _attends(schedule, rank)), default=0)


def peak_bytes(work: Callable[[], tuple[Tensor, ...]], device: torch.device) -> int | None:
    """The most that `work` holds at once beyond what was there and beyond its results; None where the device does not count."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    results = work()
    torch.cuda.synchronize(device)
    held = sum(result.numel() * result.element_size() for result in results)
    return torch.cuda.max_memory_allocated(device) - before - held


def release(device: torch.device) -> None:
    """Gives memory back that a GPU's allocator keeps, graphs' pools included; a CPU has none to spare it for."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


@contextmanager
def releasing(device: torch.device) -> Iterator[None]:
    """`release` on the way out."""
    try:
        yield
    finally:
        release(device)
