"""Where the device's time goes: every kernel and copy of one forward and backward, on one device and over the ranks.

    torchrun --nproc-per-node 2 benchmarks/kernel_times.py --lengths 2048,8192 --kernel flash4 --strategies ring,direct

Each length is tokens per GPU. Times are microseconds a call on rank 0, summed over launches of the same name; what overlaps counts twice.
"""

from __future__ import annotations

import argparse
import os
from collections import defaultdict

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

import ringspan

REPEATS = 5


def show(title: str, work, rank: int) -> None:
    """Prints the kernels of `work`, the longest first."""
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    dist.barrier()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(REPEATS):
            work()
        torch.cuda.synchronize()
    spans = [event for event in recorded.events() if event.device_time_total > 0]
    totals: dict[str, list[float]] = defaultdict(list)
    for event in spans:
        totals[event.name].append(event.device_time_total)
    if rank == 0:
        length = (max(event.time_range.end for event in spans) - min(event.time_range.start for event in spans)) / REPEATS
        print(f"\n{title}: {length:,.0f} us from the first kernel to the last, a call")
        for name, times in sorted(totals.items(), key=lambda entry: -sum(entry[1]))[:14]:
            print(f"  {sum(times) / REPEATS:10,.1f} us  {len(times) / REPEATS:5.1f} x  {name[:120]}")


def main() -> None:
    """Profiles each strategy at each length."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--strategies", default="ring")
    parser.add_argument("--transport", default="auto")
    parser.add_argument("--kernel", default="auto")
    parser.add_argument("--lengths", default="8192")
    arguments = parser.parse_args()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    alone = ringspan.ContextParallel(dist.new_group([rank], use_local_synchronization=True), layout="contiguous", kernel=arguments.kernel)
    for per_rank in map(int, arguments.lengths.split(",")):
        length = per_rank * ranks
        contexts = {"one device": alone}
        for strategy in arguments.strategies.split(","):
            contexts[strategy] = ringspan.ContextParallel(strategy=strategy, kernel=arguments.kernel, transport=arguments.transport)
        for name, context in contexts.items():
            sequence = context.sequence(length)
            torch.manual_seed(0)
            q, k, v, dout = (
                torch.randn(1, sequence.shard_length, heads, 128, device=device, dtype=torch.bfloat16) for heads in (32, 8, 8, 32)
            )
            leaves = [x.requires_grad_() for x in (q, k, v)]

            def forward(sequence=sequence, tensors=(q, k, v)) -> object:
                with torch.no_grad():
                    return sequence.attention(*tensors)

            def both(sequence=sequence, leaves=leaves, dout=dout) -> object:
                return torch.autograd.grad(sequence.attention(*leaves), leaves, dout)

            show(f"{name}, {per_rank} tokens a GPU, forward", forward, rank)
            show(f"{name}, {per_rank} tokens a GPU, forward + backward", both, rank)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
