"""Why a pass over ranks takes longer than one device's share of it: more cycles, or slower ones.

    torchrun --nproc-per-node 4 benchmarks/clocks.py --strategies ulysses:stages=8 --sent 65536,100663296 --heads 32/32 --lengths 32768
    torchrun --nproc-per-node 1 benchmarks/clocks.py --pauses 0.3,1 --fills 0.3 --heads 8/8 --lengths 131072

Each length is tokens per GPU. Passes are CUDA graphs of a forward with its backward, replayed for `--seconds` in turns: `share`, one device
with its share of the heads over the whole length; the same with a pause without work, or with other work for as long (`filled`), after the
forward and after the backward; a call for each head, and the same with bytes sent to the next rank beside each call, or with those of all
calls sent at the start of the forward and of the backward; each strategy. Any use keeps NVLink's links awake, and awake they take power
(`nvidia-smi nvlink -gLowPwrInfo` tells after how long they rest). Meanwhile NVML says every few milliseconds what clock the multiprocessors
have and what holds it down. `lost` is what a pass takes longer than the share and its pauses; `cycles` is time by clock, beside the
share's: where they are the same and the time is not, it is the clock.
"""

from __future__ import annotations

import argparse
import importlib
import os
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory

import ringspan
from ringspan.bench.case import parse_strategy
from ringspan.bench.clock import Clock, Timing
from ringspan.bench.graph import captured
from ringspan.geometry import Tile
from ringspan.kernels import KERNELS, Scores
from ringspan.transport import make_transport

Nothing = tuple[()]
FILLER = 2048
"""Rows and columns of the matrices that fill a pause."""
EVERY_SECONDS = 0.004
REASONS = {0x4: "power", 0x8: "slowdown", 0x20: "warm", 0x40: "hot", 0x80: "brake"}
"""Of NVML's reasons for a clock below the highest, those that are none of the user's."""


@dataclass
class Watch:
    """What NVML says of this rank's GPU while something runs."""

    nvml: Any
    handle: Any
    clocks: list[int] = field(default_factory=list)
    reasons: list[int] = field(default_factory=list)
    millijoules: int = 0
    seconds: float = 0.0

    def during(self, work: Callable[[], Timing]) -> Timing:
        """What `work` returns; meanwhile a thread listens."""
        over = threading.Event()

        def listen() -> None:
            while not over.wait(EVERY_SECONDS):
                self.clocks.append(self.nvml.nvmlDeviceGetClockInfo(self.handle, self.nvml.NVML_CLOCK_SM))
                self.reasons.append(self.nvml.nvmlDeviceGetCurrentClocksThrottleReasons(self.handle))

        before, began = self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle), time.perf_counter()
        thread = threading.Thread(target=listen)
        thread.start()
        result = work()
        over.set()
        thread.join()
        self.millijoules += self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle) - before
        self.seconds += time.perf_counter() - began
        return result

    def said(self) -> str:
        """Mean clock, mean power, and how often each reason."""
        held = [f"{name} {sum(bool(each & bit) for each in self.reasons) / len(self.reasons):.0%}" for bit, name in REASONS.items()]
        return f"{statistics.mean(self.clocks):7.1f} MHz {self.millijoules / 1e3 / self.seconds:6.1f} W  " + " ".join(
            each for each in held if not each.endswith(" 0%")
        )


class Passes:
    """What is timed, of one length: by name a replay of a CUDA graph, and the milliseconds of it that are none of attention's."""

    def __init__(self, arguments: argparse.Namespace, clock: Clock, length: int) -> None:
        self.clock, self.length, self.arguments = clock, length, arguments
        self.heads, self.kv_heads = map(int, arguments.heads.split("/"))
        self.calls: dict[str, Callable[[], object]] = {}
        self.own: dict[str, float] = {}

    def normal(self, rows: int, heads: int) -> torch.Tensor:
        """Of standard normal numbers `[1, rows, heads, head_dim]`."""
        return torch.randn(1, rows, heads, self.arguments.head_dim, device=self.clock.device, dtype=torch.bfloat16)

    def add_share(self, name: str = "share", between: Callable[[], Nothing] = tuple) -> None:
        """One device with its share of the heads, and `between` after the forward and after the backward."""
        ranks, kernel = self.clock.transport.size, KERNELS[self.arguments.kernel]
        q, dout = (self.normal(self.length, self.heads // ranks) for _ in range(2))
        k, v = (self.normal(self.length, self.kv_heads // ranks) for _ in range(2))
        scores = Scores(Tile(0, self.length, 0, self.length, 0, None), self.arguments.head_dim**-0.5)

        def both() -> Nothing:
            out, lse = kernel.forward(q, k, v, scores)
            between()
            kernel.backward(dout, q, k, v, out, lse, None, scores)
            return between()

        self.calls[name] = captured(both)
        self.own[name] = 0.0 if between is tuple else 2 * self.clock.time(captured(between)).median_ms

    def add_pauses(self) -> None:
        """The share with each pause that was asked for."""
        left, right = (torch.randn(FILLER, FILLER, device=self.clock.device, dtype=torch.bfloat16) for _ in range(2))

        def pause(cycles: int) -> Nothing:
            torch.cuda._sleep(cycles)
            return ()

        def fill(products: int) -> Nothing:
            for _ in range(products):
                torch.mm(left, right)
            return ()

        for name, amount, unit, asked in (
            ("pauses", pause, 1_000_000, self.arguments.pauses),
            ("filled", fill, 50, self.arguments.fills),
        ):
            for milliseconds in filter(None, asked.split(",")):
                units = float(milliseconds) / self.clock.time(captured(partial(amount, unit))).median_ms
                self.add_share(f"{name} {milliseconds} ms", partial(amount, max(1, round(units * unit))))

    def add_sent(self) -> None:
        """The share, a call for each of its heads: by itself, and with so many bytes sent to the next rank by a copy engine."""
        rank, ranks, kernel = self.clock.transport.rank, self.clock.transport.size, KERNELS[self.arguments.kernel]
        sizes = [int(size) for size in self.arguments.sent.split(",")]
        mine = symmetric_memory.empty(max(sizes), dtype=torch.uint8, device=self.clock.device)
        assert dist.group.WORLD is not None
        theirs = symmetric_memory.rendezvous(mine, dist.group.WORLD).get_buffer((rank + 1) % ranks, (max(sizes),), torch.uint8)
        source, side = torch.zeros_like(mine), torch.cuda.Stream(priority=-3)
        of_heads = [[self.normal(self.length, 1) for _ in range(4)] for _ in range(self.heads // ranks)]
        scores = Scores(Tile(0, self.length, 0, self.length, 0, None), self.arguments.head_dim**-0.5)

        def send(size: int, times: int) -> None:
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(times):
                    theirs[:size].copy_(source[:size])

        def both(size: int, at_once: bool) -> Nothing:
            results, heads = [], len(of_heads)
            for index, (q, k, v, _) in enumerate(of_heads):
                send(size, (heads * (index == 0) if at_once else 1) * bool(size))
                results.append(kernel.forward(q, k, v, scores))
            for index, ((q, k, v, dout), (out, lse)) in enumerate(zip(of_heads, results, strict=True)):
                send(size, (heads * (index == 0) if at_once else 1) * bool(size))
                kernel.backward(dout, q, k, v, out, lse, None, scores)
            torch.cuda.current_stream().wait_stream(side)
            return ()

        ways = [("a call a head", 0, False)] + [(f"{size} bytes a call", size, False) for size in sizes]
        for name, size, at_once in ways + [(f"{size} bytes, at first", size, True) for size in sizes]:
            self.calls[name], self.own[name] = captured(partial(both, size, at_once)), 0.0

    def add_strategy(self, text: str) -> None:
        """All ranks by a strategy."""
        strategy, options = parse_strategy(text)
        more: dict = dict(options)
        sequence = ringspan.ContextParallel(strategy=strategy, kernel=self.arguments.kernel, **more).sequence(self.length)
        q, k, v = (self.normal(sequence.shard_length, heads).requires_grad_() for heads in (self.heads, self.kv_heads, self.kv_heads))
        dout = self.normal(sequence.shard_length, self.heads)
        self.calls[text] = captured(lambda: torch.autograd.grad(sequence.attention(q, k, v), (q, k, v), dout))
        self.own[text] = 0.0


def measure(passes: Passes, watches: dict[str, Watch]) -> str:
    """A line for each pass."""
    clock, least_ms = passes.clock, passes.arguments.seconds * 1e3
    timings: dict[str, Timing] = {}
    # A sample of each in turn, watched with the calls that warm up.
    for _ in range(passes.arguments.samples):
        for name, call in passes.calls.items():
            made = watches[name].during(partial(clock.time, call, least_ms))
            timings[name] = timings[name].with_more(made) if name in timings else made
    own_ms = {name: timing.rank_medians_ms[clock.transport.rank] for name, timing in timings.items()}
    share_ms, share_clock = own_ms["share"], statistics.mean(watches["share"].clocks)
    lines = []
    for name, took in own_ms.items():
        lost = took - share_ms - passes.own[name]
        cycles = took * statistics.mean(watches[name].clocks) / (share_ms * share_clock) - 1
        lines.append(
            f"  {name:20s} {took:9.3f} ms  lost {lost:7.3f} ms {lost / share_ms:6.1%}  cycles {cycles:+6.1%}  {watches[name].said()}"
        )
    return "\n".join(lines)


def main() -> None:
    """Times and watches each kind of pass."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--strategies", default="", help="of ringspan, none by default")
    parser.add_argument("--pauses", default="", help="milliseconds without work")
    parser.add_argument("--fills", default="", help="milliseconds of matrix products in their place")
    parser.add_argument("--sent", default="", help="bytes beside each call for a head; as many key heads as query heads")
    parser.add_argument("--kernel", default="flash4")
    parser.add_argument("--lengths", default="32768")
    parser.add_argument("--heads", default="32/32", help="query/KV heads over all ranks")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--samples", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0, help="a sample")
    arguments = parser.parse_args()
    if arguments.sent and len(set(arguments.heads.split("/"))) > 1:
        parser.error(f"--sent calls a kernel for each head: as many key heads as query heads, not {arguments.heads}")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    transport = make_transport(None)
    nvml = importlib.import_module("pynvml")
    nvml.nvmlInit()
    handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode())
    for per_rank in map(int, arguments.lengths.split(",")):
        passes = Passes(arguments, Clock(device, transport, 2, 1), per_rank * transport.size)
        passes.add_share()
        passes.add_pauses()
        if arguments.sent:
            passes.add_sent()
        for strategy in filter(None, arguments.strategies.split(",")):
            passes.add_strategy(strategy)
        lines = measure(passes, {name: Watch(nvml, handle) for name in passes.calls})
        title = (
            f"{torch.cuda.get_device_name()}, {per_rank} tokens a GPU, {arguments.heads} heads of {arguments.head_dim}, {arguments.kernel}"
        )
        for rank, said in enumerate(transport.gather_objects(lines)):
            if transport.rank == 0:
                print(f"rank {rank}: {title}\n{said}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
