"""What moments without work cost a GPU besides their own time: attention back to back, and with a pause after each forward and backward.

    python3 benchmarks/pauses.py --length 131072 --heads 8 --pauses 0.3,1,4

One GPU, one kernel each way over all heads. Passes are CUDA graphs, replayed for `--seconds`, with and without pauses in turns. `lost` is
what a pass takes longer than the one without pauses and the pauses themselves: where it is not near 0, the GPU is slower after a pause.
"""

from __future__ import annotations

import argparse
import statistics

import torch

from ringspan.bench.clock import Clock
from ringspan.bench.graph import captured
from ringspan.geometry import Tile
from ringspan.kernels import KERNELS, Scores
from ringspan.transport import SingleRank

WIDTH, SAMPLES, CYCLES = 128, 7, 1_000_000


def main() -> None:
    """Times each pause."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--length", type=int, default=131072)
    parser.add_argument("--heads", default="8/8", help="query/KV heads")
    parser.add_argument("--kernel", default="flash4")
    parser.add_argument("--pauses", default="0.3,1,4", help="milliseconds")
    parser.add_argument("--seconds", type=float, default=1.0)
    arguments = parser.parse_args()
    heads, kv_heads = map(int, arguments.heads.split("/"))
    kernel, length = KERNELS[arguments.kernel], arguments.length
    q, dout = (torch.randn(1, length, heads, WIDTH, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    k, v = (torch.randn(1, length, kv_heads, WIDTH, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    scores = Scores(Tile(0, length, 0, length, 0, None), WIDTH**-0.5)

    def pause(cycles: int) -> tuple[()]:
        if cycles:
            torch.cuda._sleep(cycles)
        return ()

    def both(cycles: int) -> tuple[()]:
        out, lse = kernel.forward(q, k, v, scores)
        pause(cycles)
        kernel.backward(dout, q, k, v, out, lse, None, scores)
        return pause(cycles)

    print(torch.__version__, torch.cuda.get_device_name(), arguments.kernel)
    clock = Clock(torch.device("cuda"), SingleRank(), 2, SAMPLES)
    usual = captured(lambda: both(0))
    a_million = clock.time(captured(lambda: pause(CYCLES))).median_ms
    for asked in map(float, arguments.pauses.split(",")):
        cycles = int(asked / a_million * CYCLES)
        own = clock.time(captured(lambda cycles=cycles: pause(cycles))).median_ms
        without, paused = clock.in_turns(usual, captured(lambda cycles=cycles: both(cycles)), least_ms=arguments.seconds * 1e3)
        lost = [longer - shorter - 2 * own for shorter, longer in zip(without.samples_ms, paused.samples_ms, strict=True)]
        middle = statistics.median(lost)
        print(
            f"a pass {without.median_ms:.3f} ms, with pauses of {own:.3f} ms {paused.median_ms:.3f} ms: lost {middle:.3f} ms "
            f"[{min(lost):.3f} to {max(lost):.3f}], {middle / without.median_ms:.1%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
