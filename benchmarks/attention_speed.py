"""Times one attention layer over the ranks of a process group against one device doing its share of the same work.

    torchrun --nproc-per-node 2 benchmarks/attention_speed.py --strategies ring,all_gather --lengths 8192,32768 --json speed.json

Each length is tokens per GPU. Ratio 1 is the one-device kernel on the same total length at N times the speed. Results are checked against
that kernel before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

import ringspan


def milliseconds(work: Callable[[], object], warmup: int, samples: int) -> list[float]:
    """Each sample's device time, warm-up left out."""
    for _ in range(warmup):
        work()
    times = []
    for _ in range(samples):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        dist.barrier()
        torch.cuda.synchronize()
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return times


def tensors(length: int, arguments: argparse.Namespace) -> list[torch.Tensor]:
    """q, k, v and dO of a whole sequence, the same on every rank."""
    torch.manual_seed(length)
    heads = (arguments.heads, arguments.kv_heads, arguments.kv_heads, arguments.heads)
    return [torch.randn(1, length, count, arguments.head_dim, device="cuda", dtype=torch.bfloat16) for count in heads]


def passes(sequence: ringspan.Sequence, whole: list[torch.Tensor]) -> tuple[Callable[[], object], Callable[[], object]]:
    """(forward alone, forward and backward) of a sequence's attention."""
    q, k, v, dout = (sequence.shard(x) for x in whole)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]

    def forward() -> object:
        with torch.no_grad():
            return sequence.attention(q, k, v)

    def both() -> object:
        return torch.autograd.grad(sequence.attention(*leaves), leaves, dout)

    return forward, both


def main() -> None:
    """Times every strategy at every length and writes JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--strategies", default="ring,all_gather,direct,ulysses")
    parser.add_argument("--layout", default="zigzag")
    parser.add_argument("--kernel", default="auto")
    parser.add_argument("--lengths", default="2048,8192,32768,131072")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    alone = ringspan.ContextParallel(dist.new_group([rank], use_local_synchronization=True), layout="contiguous", kernel=arguments.kernel)
    results = []
    for per_rank in map(int, arguments.lengths.split(",")):
        length = per_rank * ranks
        whole = tensors(length, arguments)
        exact = alone.sequence(length).attention(*whole[:3])
        base = [statistics.median(milliseconds(work, 3, arguments.samples)) for work in passes(alone.sequence(length), whole)]
        for strategy in arguments.strategies.split(","):
            sequence = ringspan.ContextParallel(strategy=strategy, layout=arguments.layout, kernel=arguments.kernel).sequence(length)
            ours = sequence.attention(*(sequence.shard(x) for x in whole[:3]))
            wanted = sequence.shard(exact)
            error = float((ours.float() - wanted.float()).norm() / wanted.float().norm())
            assert error < 1e-2, f"{strategy} at {length} is off by {error}"
            torch.cuda.reset_peak_memory_stats()
            samples = [milliseconds(work, 3, arguments.samples) for work in passes(sequence, whole)]
            ours_ms = [statistics.median(times) for times in samples]
            # Causal FLOPs only: 2 products of 2·d a pair, half of the pairs; the backward is 2.5 forwards.
            flops = 2 * length * length * arguments.heads * arguments.head_dim / ranks
            results.append(
                {
                    "strategy": strategy,
                    "tokens_per_gpu": per_rank,
                    "error_against_one_device": error,
                    "samples_ms": samples,
                    "one_device_share_ms": [time / ranks for time in base],
                    "median_ms": ours_ms,
                    "ratio": [alone_ms / ranks / ms for alone_ms, ms in zip(base, ours_ms, strict=True)],
                    "tflops": [flops / ours_ms[0] / 1e9, 3.5 * flops / ours_ms[1] / 1e9],
                    "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
                }
            )
            if rank == 0:
                row = results[-1]
                print(
                    f"{strategy:16} {per_rank:7} per GPU  forward {row['tflops'][0]:5.0f} TFLOP/s ratio {row['ratio'][0]:.2f}"
                    f"  both {row['tflops'][1]:5.0f} TFLOP/s ratio {row['ratio'][1]:.2f}  peak {row['peak_gib']:.1f} GiB",
                    flush=True,
                )
        del whole, exact
    if rank == 0 and arguments.json:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
        about = {"commit": commit, "torch": torch.__version__, "gpu": torch.cuda.get_device_name(), "ranks": ranks, **vars(arguments)}
        Path(arguments.json).write_text(json.dumps({"about": about, "results": results}, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
