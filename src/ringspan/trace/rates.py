"""The rates of this machine, measured by all ranks at once: what a prediction for it rests on."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

from ringspan.attention import Sequence
from ringspan.geometry import Tile, head_shares, tiles
from ringspan.kernels import Kernel, Scores, lowered, select_kernel
from ringspan.strategies import MACHINES, Machine, Schedules
from ringspan.trace.case import TraceCase
from ringspan.transport import Parcel, Transport
from ringspan.verify import DTYPES

_REPEATS = 5
_SMALL_BYTES, _LEAST_BYTES = 1024, 2**18
_FEW_ROWS = 8


def measure_machine(case: TraceCase, sequence: Sequence, device: torch.device) -> Machine:
    """The rates of the ranks at hand, the median over them. Collective: all compute at once, and all send at once.

    One kernel call of the largest tile that a rank computes gives FLOP/s, and its backward beside it; one of a few rows what a launch
    takes; a small and a large transfer from each rank to the next latency and bandwidth.

    Args:
        case: what is traced.
        sequence: the rank's view, on which attention has run once.
        device: of the tensors.
    """
    transport = sequence.context.transport
    kernel = select_kernel(case.kernel, case.problem(device))
    mine = (*_compute(case, sequence.schedules, kernel, device, transport), *_transfer(case, sequence, device))
    columns = list(zip(*transport.gather_objects(mine), strict=True))
    known = [[value for value in column if value is not None] for column in columns]
    fallback = MACHINES[device.type]
    others = (
        fallback.flops_per_second,
        fallback.backward_factor,
        fallback.launch_seconds,
        fallback.link_bytes_per_second,
        fallback.latency_seconds,
    )
    flops, factor, launch, bandwidth, latency = (median(values) if values else other for values, other in zip(known, others, strict=True))
    return Machine(
        name="this machine",
        flops_per_second=flops,
        link_bytes_per_second=bandwidth,
        latency_seconds=latency,
        launch_seconds=launch,
        backward_factor=factor,
    )


def _compute(
    case: TraceCase, schedules: Schedules, kernel: Kernel, device: torch.device, transport: Transport
) -> tuple[float | None, float | None, float | None]:
    """(FLOP/s, backward over forward, seconds of a launch); None where this rank computes nothing. All ranks begin together."""
    grid, heads, kv_heads, owner = schedules.grid, case.heads, case.kv_heads, transport.rank
    if grid is not None:
        share = head_shares(heads, kv_heads, grid.degree)[grid.place(owner)]
        heads, kv_heads, owner = share.heads, share.kv_heads, grid.group(owner)
    layout, mask = schedules.layout, case.parsed_mask
    found = [part for keys in range(layout.num_ranks) for tile in tiles(layout, mask, owner, keys) for part in lowered(tile, kernel.shapes)]
    transport.gather_objects(None)
    if not found or not heads:
        return None, None, None
    largest = max(found, key=lambda tile: tile.pairs)
    few = Tile(0, _FEW_ROWS, 0, _FEW_ROWS)
    seconds = [_kernel_seconds(case, kernel, tile, heads, kv_heads, device) for tile in (largest, few)]
    launch = seconds[1][0]
    flops = 4 * largest.pairs * heads * case.head_dim * case.batch
    # What a launch takes is priced apart.
    work = [max(both - launch, both / 10) for both in seconds[0]]
    return flops / work[0], work[1] / work[0], launch


def _kernel_seconds(case: TraceCase, kernel: Kernel, tile: Tile, heads: int, kv_heads: int, device: torch.device) -> tuple[float, float]:
    """(forward, backward) of one tile."""
    dtype = DTYPES[case.dtype]
    q, dout = (torch.randn(case.batch, tile.num_queries, heads, case.head_dim, device=device, dtype=dtype) for _ in range(2))
    k, v = (torch.randn(case.batch, tile.num_keys, kv_heads, case.head_dim, device=device, dtype=dtype) for _ in range(2))
    scores = Scores(tile, case.head_dim**-0.5)
    out, lse = kernel.forward(q, k, v, scores)
    out = out.to(dtype)
    return (
        _seconds(lambda: kernel.forward(q, k, v, scores), device),
        _seconds(lambda: kernel.backward(dout, q, k, v, out, lse, None, scores), device),
    )


def _transfer(case: TraceCase, sequence: Sequence, device: torch.device) -> tuple[float | None, float | None]:
    """(bytes/s, latency) from each rank to the next; None for a rank that is alone."""
    transport = sequence.context.transport
    if transport.size == 1:
        return None, None
    following, before = (transport.rank + 1) % transport.size, (transport.rank - 1) % transport.size
    # As large on every rank: a shard of keys and values on average.
    large = max(_LEAST_BYTES, case.length * case.sizes.of("kv") // transport.size)
    seconds = []
    for size in (_SMALL_BYTES, large):
        sent, received = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))

        def move(sent: torch.Tensor = sent, received: torch.Tensor = received) -> None:
            transport.exchange([Parcel(sent, following)], [Parcel(received, before)]).wait()

        transport.gather_objects(None)
        seconds.append(_seconds(move, device))
    latency = seconds[0]
    return (large - _SMALL_BYTES) / max(seconds[1] - latency, seconds[1] / 10), latency


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """The median of a few runs after one that does not count."""
    work()
    found = []
    for _ in range(_REPEATS):
        _synchronise(device)
        began = time.perf_counter()
        work()
        _synchronise(device)
        found.append(time.perf_counter() - began)
    return median(found)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
