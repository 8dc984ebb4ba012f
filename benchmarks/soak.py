"""Consecutive steps of random lengths with ranks that start apart: nothing hangs, memory does not grow, no result is wrong.

torchrun --nproc-per-node 2 benchmarks/soak.py --steps 1000
"""

from __future__ import annotations

import argparse
import os
import random
import time

import torch
import torch.distributed as dist

import ringspan

MOST_APART_SECONDS = 0.05


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    """‖found − exact‖ / ‖exact‖."""
    return float((found.float() - exact.float()).norm() / exact.float().norm().clamp(min=1e-30))


def main() -> None:
    """Runs the steps; exit status 1 where a result is wrong or memory grows."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--longest", type=int, default=4096, help="tokens in all")
    parser.add_argument("--strategies", default="ring,direct")
    arguments = parser.parse_args()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    rank = dist.get_rank()
    common, own = random.Random(0), random.Random(rank)
    contexts = [ringspan.ContextParallel(strategy=strategy) for strategy in arguments.strategies.split(",")]
    alone = ringspan.ContextParallel(dist.new_group([rank], use_local_synchronization=True), layout="contiguous")
    lengths = [common.randint(1, arguments.longest) for _ in range(100)]
    worst, held, began = 0.0, 0, time.monotonic()
    for step in range(arguments.steps):
        length, context = common.choice(lengths), common.choice(contexts)
        torch.manual_seed(step)
        whole = [torch.randn(1, length, heads, 128, device=device, dtype=torch.bfloat16) for heads in (8, 2, 2, 8)]
        sequence = context.sequence(length)
        leaves = [sequence.shard(x).requires_grad_() for x in whole[:3]]
        time.sleep(own.uniform(0, MOST_APART_SECONDS))
        out = sequence.attention(*leaves)
        found = [out.detach(), *torch.autograd.grad(out, leaves, sequence.shard(whole[3]))]
        exact_leaves = [x.requires_grad_() for x in whole[:3]]
        exact_out = alone.sequence(length).attention(*exact_leaves)
        exact = [exact_out.detach(), *torch.autograd.grad(exact_out, exact_leaves, whole[3])]
        if found[0].numel():
            errors = [relative(ours, sequence.shard(theirs)) for ours, theirs in zip(found, exact, strict=True)]
            worst = max(worst, *errors)
            # Both sides round to bfloat16 a few times.
            assert max(errors) < 2e-2, f"step {step}, length {length}: {errors}"
        del whole, leaves, out, found, exact_leaves, exact_out, exact
        if step == min(300, arguments.steps // 2):
            held = torch.cuda.memory_allocated()
    grown = torch.cuda.memory_allocated() - held
    if rank == 0:
        print(
            f"{arguments.steps} steps in {time.monotonic() - began:.0f} s, ranks up to {MOST_APART_SECONDS * 1e3:.0f} ms apart, "
            f"{len(set(lengths))} lengths up to {arguments.longest}: worst difference from one device {worst:.1e}, "
            f"memory {'did not grow' if grown <= 1 << 20 else f'grew by {grown} bytes'} after the first {min(300, arguments.steps // 2)}"
        )
    assert grown <= 1 << 20, grown
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
