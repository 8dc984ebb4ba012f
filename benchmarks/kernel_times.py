"""Where the device's time goes: every kernel and copy of one forward and backward, on one device and over the ranks.

    torchrun --nproc-per-node 2 benchmarks/kernel_times.py --lengths 2048,8192 --kernel flash4 --strategies ring,direct
    torchrun --nproc-per-node 2 benchmarks/kernel_times.py --lengths 8192 --heads 32/32 --graph --timeline

Each length is tokens per GPU. Times are microseconds a call on rank 0, summed over launches of the same name; what overlaps counts twice.
With `--timeline` each rank lists what one call does in the order in which it begins, and with `--python` rank 0 says in which functions the
host is while it launches.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import time
from collections import defaultdict

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

import ringspan
from ringspan.bench.graph import captured

REPEATS = 5
PYTHON_REPEATS, MOST_FUNCTIONS = 50, 40
SHORTEST_US = 1.5
"""What is shorter is left out of a timeline."""


def show(title: str, work, rank: int, timeline: bool) -> None:
    """Prints the kernels of `work`, the longest first, or in order."""
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    dist.barrier()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(REPEATS):
            work()
        torch.cuda.synchronize()
    spans = sorted((event for event in recorded.events() if event.device_time_total > 0), key=lambda event: event.time_range.start)
    length = (max(event.time_range.end for event in spans) - spans[0].time_range.start) / REPEATS
    said = [f"\n{title}: {length:,.0f} us from the first kernel to the last, a call"]
    if timeline:
        # The calls follow each other: the middle one, by count.
        each = len(spans) // REPEATS
        calls = [spans[number * each : (number + 1) * each] for number in range(REPEATS)]
        took = [max(event.time_range.end for event in call) - call[0].time_range.start for call in calls]
        said.append("  each call: " + ", ".join(f"{us:,.0f}" for us in took) + " us; the middle one:")
        call = calls[REPEATS // 2]
        zero = call[0].time_range.start
        said += [
            f"  {event.time_range.start - zero:9,.1f} {event.device_time_total:9,.1f} us  {event.name[:70]}"
            for event in call
            if event.device_time_total >= SHORTEST_US
        ]
    else:
        totals: dict[str, list[float]] = defaultdict(list)
        for event in spans:
            totals[event.name].append(event.device_time_total)
        said += [
            f"  {sum(times) / REPEATS:10,.1f} us  {len(times) / REPEATS:5.1f} x  {name[:120]}"
            for name, times in sorted(totals.items(), key=lambda entry: -sum(entry[1]))[:14]
        ]
    for speaker in range(dist.get_world_size() if timeline else 1):
        dist.barrier()
        if rank == speaker:
            print("\n".join([f"rank {rank}", *said] if timeline else said), flush=True)


def show_python(title: str, work, rank: int) -> None:
    """Prints where the host's time goes in calls that are launched one after the other, microseconds a call."""
    dist.barrier()
    torch.cuda.synchronize()
    profiler = cProfile.Profile()
    began = time.perf_counter()
    profiler.enable()
    for _ in range(PYTHON_REPEATS):
        work()
    profiler.disable()
    took = (time.perf_counter() - began) / PYTHON_REPEATS * 1e6
    torch.cuda.synchronize()
    if rank == 0:
        print(f"\n{title}: {took:,.0f} us of the host a call, itself and with what it calls")
        stats: dict = pstats.Stats(profiler).stats  # pyright: ignore[reportAttributeAccessIssue]
        for (file, line, name), (_, calls, own, whole, _) in sorted(stats.items(), key=lambda entry: -entry[1][2])[:MOST_FUNCTIONS]:
            each, where = 1e6 / PYTHON_REPEATS, "/".join(file.split("/")[-2:])
            print(f"  {own * each:8.1f} {whole * each:8.1f} us {calls / PYTHON_REPEATS:6.1f} x  {where}:{line} {name}"[:150])


def main() -> None:
    """Profiles each strategy at each length."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--strategies", default="ring")
    parser.add_argument("--transport", default="auto")
    parser.add_argument("--kernel", default="auto")
    parser.add_argument("--lengths", default="8192")
    parser.add_argument("--heads", default="32/8", help="query/KV heads")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--graph", action="store_true", help="replay a CUDA graph")
    parser.add_argument("--timeline", action="store_true")
    parser.add_argument("--python", action="store_true", help="where the host's time goes, launched eagerly")
    arguments = parser.parse_args()
    heads, kv_heads = map(int, arguments.heads.split("/"))
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    alone = ringspan.ContextParallel(dist.new_group([rank], use_local_synchronization=True), layout="contiguous", kernel=arguments.kernel)
    for per_rank in map(int, arguments.lengths.split(",")):
        length = per_rank * ranks
        contexts = {"one device": alone}
        for strategy in arguments.strategies.split(","):
            named, *options = strategy.split(":")
            values = {key: int(value) for key, value in (option.split("=") for option in options)}
            contexts[strategy] = ringspan.ContextParallel(strategy=named, kernel=arguments.kernel, transport=arguments.transport, **values)
        for name, context in contexts.items():
            sequence = context.sequence(length)
            torch.manual_seed(0)
            q, k, v, dout = (
                torch.randn(1, sequence.shard_length, number, arguments.head_dim, device=device, dtype=torch.bfloat16)
                for number in (heads, kv_heads, kv_heads, heads)
            )
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]

            def forward(sequence=sequence, tensors=(q, k, v)) -> tuple[torch.Tensor, ...]:
                with torch.no_grad():
                    return (sequence.attention(*tensors),)

            def both(sequence=sequence, leaves=leaves, dout=dout) -> tuple[torch.Tensor, ...]:
                return torch.autograd.grad(sequence.attention(*leaves), leaves, dout)

            for what, work in (("forward", forward), ("forward + backward", both)):
                call = captured(work) if arguments.graph else work
                title = f"{name}, {per_rank} tokens a GPU, {arguments.heads} heads of {arguments.head_dim}, {what}"
                show(title, call, rank, arguments.timeline)
                if arguments.python:
                    show_python(title, work, rank)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
