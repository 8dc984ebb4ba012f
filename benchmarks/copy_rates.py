"""What copies beside attention cost: alone, and how much longer kernels take that run meanwhile.

    python3 benchmarks/copy_rates.py --length 131072 --heads 8

One GPU. `whole`: three contiguous tensors of one head, as what a backward needs is kept; `parts`: a head of each of 18 runs of rows among
32 heads, as a stage of heads is sent. Each is copied by as many blocks as there are rows for (`many`), by few (`few`), and by
`torch.Tensor.copy_` (`torch`), twice for each of the forward kernels of one head that follow each other. All times are of CUDA graphs, in
microseconds a copy; kernels without copies are timed in turns, since they vary by some percent themselves.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch

from ringspan.bench.clock import Clock
from ringspan.bench.graph import captured
from ringspan.geometry import Tile
from ringspan.kernels import KERNELS, Scores
from ringspan.kernels.copies import Copy, copy_all
from ringspan.transport import SingleRank

WIDTH, OTHERS, RUNS = 128, 32, 18
SAMPLES, ALONE = 9, 4


def one_by_one(copies: list[Copy]) -> None:
    """By PyTorch."""
    for target, source in copies:
        target.copy_(source)


def main() -> None:
    """Times each way of each kind of copies."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--length", type=int, default=131072)
    parser.add_argument("--heads", type=int, default=8, help="kernels of one head each, one after the other")
    parser.add_argument("--kernel", default="flash4")
    arguments = parser.parse_args()
    kernel, length, heads = KERNELS[arguments.kernel], arguments.length, arguments.heads

    def normal(rows: int, of: int) -> torch.Tensor:
        return torch.randn(1, rows, of, WIDTH, device="cuda", dtype=torch.bfloat16)

    q, k, v = (normal(length, 1) for _ in range(3))
    scores = Scores(Tile(0, length, 0, length, 0, None), WIDTH**-0.5)
    sources, among = [normal(length, 1) for _ in range(3)], normal(length // 4, OTHERS)
    targets, rows = [torch.empty_like(source) for source in sources], length // 8
    parts = [
        (targets[run % 3][:, run // 3 * rows : (run // 3 + 1) * rows], among[:, run % 2 * rows : (run % 2 + 1) * rows, run : run + 1])
        for run in range(RUNS)
    ]
    # As lanes are: above all that computes.
    side = torch.cuda.Stream(priority=-3)

    def attention() -> tuple[()]:
        for _ in range(heads):
            kernel.forward(q, k, v, scores)
        return ()

    def beside(way: Callable[[list[Copy]], None], copies: list[Copy]) -> tuple[()]:
        side.wait_stream(torch.cuda.current_stream())
        attention()
        with torch.cuda.stream(side):
            for _ in range(2 * heads):
                way(copies)
        torch.cuda.current_stream().wait_stream(side)
        return ()

    def alone(way: Callable[[list[Copy]], None], copies: list[Copy]) -> tuple[()]:
        for _ in range(ALONE):
            way(copies)
        return ()

    print(torch.__version__, torch.cuda.get_device_name(), arguments.kernel)
    clock = Clock(torch.device("cuda"), SingleRank(), 2, SAMPLES)
    nothing = captured(attention)
    for name, copies in (("whole", list(zip(targets, sources, strict=True))), ("parts", parts)):
        size = sum(target.numel() * target.element_size() for target, _ in copies) / 1e6
        for called, way in (("many", copy_all), ("few", partial(copy_all, few=True)), ("torch", one_by_one)):
            by_itself, both = captured(partial(alone, way, copies)), captured(partial(beside, way, copies))
            took = clock.time(by_itself).median_ms * 1e3 / ALONE
            without, with_copies = clock.in_turns(nothing, both)
            pairs = zip(without.samples_ms, with_copies.samples_ms, strict=True)
            more = sorted((longer - shorter) * 1e3 / (2 * heads) for shorter, longer in pairs)
            middle = statistics.median(more)
            print(
                f"{name} {called:5s} {size:7.1f} MB: alone {took:7.1f}, beside {middle:7.1f} [{more[0]:.1f} to {more[-1]:.1f}], "
                f"kernels {without.median_ms:.3f} ms",
                flush=True,
            )


if __name__ == "__main__":
    main()
