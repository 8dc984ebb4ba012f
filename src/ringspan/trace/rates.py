"""The rates of this machine, measured by all ranks at once: what a prediction for it rests on."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

from ringspan.attention import Sequence
from ringspan.geometry import Tile, head_shares, tiles
from ringspan.kernels import Kernel, Scores, lowered
from ringspan.strategies import MACHINES, Machine, Schedules
from ringspan.trace.case import TraceCase
from ringspan.transport import Parcel, Transport
from ringspan.verify import DTYPES

_REPEATS = 5
_SMALL_BYTES, _LEAST_BYTES = 1024, 2**18
_FEW_ROWS = 16


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
    kernel = sequence.kernel
    assert kernel is not None, "attention has run once"
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
    if not found or not heads:
        # The others time three things together.
        for _ in range(3):
            _seconds(lambda: None, device, transport)
        return None, None, None
    largest = max(found, key=lambda tile: tile.pairs)
    run, run_back = _kernel_calls(case, kernel, largest, heads, kv_heads, device)
    few, _ = _kernel_calls(case, kernel, Tile(0, _FEW_ROWS, 0, _FEW_ROWS), heads, kv_heads, device)
    forward, backward, launch = (_seconds(call, device, transport) for call in (run, run_back, few))
    flops = 4 * largest.pairs * heads * case.head_dim * case.batch
    # What a launch takes is priced apart.
    forward, backward = (max(both - launch, both / 10) for both in (forward, backward))
    return flops / forward, backward / forward, launch


def _kernel_calls(
    case: TraceCase, kernel: Kernel, tile: Tile, heads: int, kv_heads: int, device: torch.device
) -> tuple[Callable[[], object], Callable[[], object]]:
    """The forward and the backward of one tile."""
    dtype = DTYPES[case.dtype]
    q, dout = (torch.randn(case.batch, tile.num_queries, heads, case.head_dim, device=device, dtype=dtype) for _ in range(2))
    k, v = (torch.randn(case.batch, tile.num_keys, kv_heads, case.head_dim, device=device, dtype=dtype) for _ in range(2))
    scores = Scores(tile, case.head_dim**-0.5)
    out, lse = kernel.forward(q, k, v, scores)
    out = out.to(dtype)
    return lambda: kernel.forward(q, k, v, scores), lambda: kernel.backward(dout, q, k, v, out, lse, None, scores)


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

        seconds.append(_seconds(move, device, transport))
    latency = seconds[0]
    return (large - _SMALL_BYTES) / max(seconds[1] - latency, seconds[1] / 10), latency


def _seconds(work: Callable[[], object], device: torch.device, transport: Transport) -> float:
    """What a call takes, the mean of a few after two that do not count, while every rank does the same. Collective.

    The mean: of ranks that share cores each runs undisturbed by turns, and a median would tell of that alone.
    """
    for _ in range(2):
        work()
    _synchronise(device)
    transport.gather_objects(None)
    began = time.perf_counter()
    for _ in range(_REPEATS):
        work()
    _synchronise(device)
    return (time.perf_counter() - began) / _REPEATS


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
