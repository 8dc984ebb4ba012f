"""What moments without work cost a GPU besides their own time: attention back to back, and with a pause after each forward and backward.

    python3 benchmarks/pauses.py --length 131072 --heads 8 --pauses 0.3,1,4

One GPU, one kernel each way over all heads. Passes are CUDA graphs, replayed for `--seconds`, with and without pauses in turns. `lost` is
what a pass takes longer than the one without pauses and the pauses themselves: where it is not near 0, the GPU is slower after a pause.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch

from ringspan.bench.graph import captured
from ringspan.geometry import Tile
from ringspan.kernels import KERNELS, Scores

WIDTH, SAMPLES, CYCLES = 128, 7, 1_000_000


def milliseconds(replay: Callable[[], object], seconds: float = 0.0) -> float:
    """Of one replay, of as many as fit into `seconds`, one at least."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    replay()
    end.record()
    end.synchronize()
    repeats = int(seconds * 1e3 / start.elapsed_time(end))
    if repeats < 2:
        return start.elapsed_time(end)
    start.record()
    for _ in range(repeats):
        replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats


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
    usual = captured(lambda: both(0))
    a_million = statistics.median(milliseconds(captured(lambda: pause(CYCLES))) for _ in range(SAMPLES))
    for asked in map(float, arguments.pauses.split(",")):
        cycles = int(asked / a_million * CYCLES)
        own = statistics.median(milliseconds(captured(lambda cycles=cycles: pause(cycles))) for _ in range(SAMPLES))
        paused = captured(lambda cycles=cycles: both(cycles))
        pairs = [(milliseconds(usual, arguments.seconds), milliseconds(paused, arguments.seconds)) for _ in range(SAMPLES)]
        lost = [longer - shorter - 2 * own for shorter, longer in pairs]
        shortest = statistics.median(shorter for shorter, _ in pairs)
        print(
            f"a pass {shortest:.3f} ms, with pauses of {own:.3f} ms {statistics.median(longer for _, longer in pairs):.3f} ms: lost "
            f"{statistics.median(lost):.3f} ms [{min(lost):.3f} to {max(lost):.3f}], {statistics.median(lost) / shortest:.1%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
