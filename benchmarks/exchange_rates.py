"""How fast positions are exchanged for heads: all that a rank writes into the inboxes of others and copies for itself, in one launch.

    torchrun --nproc-per-node 4 benchmarks/exchange_rates.py --tokens 32768 --head-dim 64
    python3 benchmarks/exchange_rates.py --ranks 4 --tokens 2048

Over the GPUs of one host by peer memory, or with one process as much within one GPU: what the launch costs without a link. Each kind of
exchange of a pass of `ulysses` (zigzag) is written as `copy_all` does it, and, where it is contiguous, by copy engines, which copy nothing
of the rank's own. Microseconds between two meetings of all ranks, as CUDA graphs, and GB/s of what goes to others; everything is compared
first. With several ranks, the gradients once more after pauses in which links may go to rest.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from itertools import pairwise, zip_longest
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ringspan.bench.graph import captured
from ringspan.kernels.copies import Copy, copy_all

HEADS, KV_HEADS = 32, 8
REPEATS, WARMUP = 5, 2
PAUSES_MS, CYCLES_PER_MS = (0, 80), 1_755_000


class Pattern(NamedTuple):
    """What is written into the memory of others, and into this rank's own."""

    remote: list[Copy]
    own: list[Copy]

    @property
    def mixed(self) -> list[Copy]:
        """One of each in turn, as a pass has them."""
        return [copy for pair in zip_longest(self.remote, self.own) for copy in pair if copy is not None]


class Ranks:
    """Those of a group of processes, a GPU each; or one process that plays one of several."""

    def __init__(self, several: int, nbytes: int) -> None:
        self.alone = "RANK" not in os.environ
        self.rank, self.size = (0, several) if self.alone else (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(self.device)
        if self.alone:
            self.inboxes = [torch.empty(nbytes, dtype=torch.uint8, device=self.device) for _ in range(self.size)]
            return
        import torch.distributed._symmetric_memory as symmetric_memory

        dist.init_process_group("nccl", device_id=self.device)
        world = dist.group.WORLD
        assert world is not None
        self._mine = symmetric_memory.empty(nbytes, dtype=torch.uint8, device=self.device)
        self._handle = symmetric_memory.rendezvous(self._mine, world)
        self.inboxes = [self._handle.get_buffer(rank, (nbytes,), torch.uint8) for rank in range(self.size)]

    def meet(self) -> None:
        """On the devices."""
        if not self.alone:
            self._handle.barrier(0, 60_000)

    def barrier(self) -> None:
        """Of the processes."""
        torch.cuda.synchronize()
        if not self.alone:
            dist.barrier()


class Exchanges:
    """The exchanges of one pass over `tokens` positions a rank, zigzag: two runs of rows each."""

    def __init__(self, ranks: Ranks, tokens: int, head_dim: int) -> None:
        self.ranks, self.tokens, self.head_dim = ranks, tokens, head_dim
        torch.manual_seed(ranks.rank)
        size = ranks.size
        self.q, self.k, self.v = (self._normal(tokens, heads) for heads in (HEADS, KV_HEADS, KV_HEADS))
        self.dq, self.dk, self.dv = (self._normal(tokens * size, heads // size) for heads in (HEADS, KV_HEADS, KV_HEADS))

    def patterns(self) -> dict[str, Pattern]:
        """All that are timed."""
        inputs, gradients = [self.q, self.k, self.v], [self.dq, self.dk, self.dv]
        first = self._out(inputs, 2)
        return {
            "inputs, one stage": self._out(inputs, 1),
            "inputs, first of two": Pattern(first.remote[: len(first.remote) // 2], first.own[: len(first.own) // 2]),
            "dO, one stage": self._out([self.q], 1),
            "out, one stage": self._home([self.dq], 1),
            "gradients, one stage": self._home(gradients, 1),
            "gradients, two stages": self._home(gradients, 2),
        }

    def _normal(self, rows: int, heads: int) -> Tensor:
        return torch.randn(1, rows, heads, self.head_dim, device=self.ranks.device, dtype=torch.bfloat16)

    def _lying(self, rank: int, first: int, rows: int, heads: int) -> Tensor:
        nbytes = rows * heads * self.head_dim * 2
        return self.ranks.inboxes[rank][first : first + nbytes].view(torch.bfloat16).view(1, rows, heads, self.head_dim)

    def _runs(self, rank: int) -> list[slice]:
        """Of the whole sequence the rows of `rank`."""
        half = self.tokens // 2
        return [slice(chunk * half, (chunk + 1) * half) for chunk in (rank, 2 * self.ranks.size - 1 - rank)]

    def _each(self) -> list[int]:
        return [(self.ranks.rank + hops) % self.ranks.size for hops in range(self.ranks.size)]

    def _out(self, tensors: list[Tensor], stages: int) -> Pattern:
        """From all heads of this rank's rows to all rows of each rank's heads."""
        found, size, half, offset = Pattern([], []), self.ranks.size, self.tokens // 2, 0
        for stage in range(stages):
            for tensor in tensors:
                heads = tensor.shape[2] // size // stages
                for rank in self._each():
                    there = self._lying(rank, offset, self.tokens * size, heads)
                    first = (rank * stages + stage) * heads
                    copies = [
                        (there[:, rows], tensor[:, run * half : (run + 1) * half, first : first + heads])
                        for run, rows in enumerate(self._runs(self.ranks.rank))
                    ]
                    (found.own if rank == self.ranks.rank else found.remote).extend(copies)
                offset += self.tokens * size * heads * self.head_dim * 2
        return found

    def _home(self, tensors: list[Tensor], stages: int) -> Pattern:
        """From all rows of this rank's heads to whose rows they are."""
        found, size, half, offset = Pattern([], []), self.ranks.size, self.tokens // 2, 0
        for stage in range(stages):
            for tensor in tensors:
                heads = tensor.shape[2] // stages
                nbytes = self.tokens * heads * self.head_dim * 2
                made = tensor[:, :, stage * heads : (stage + 1) * heads].contiguous()
                for rank in self._each():
                    there = self._lying(rank, offset + self.ranks.rank * nbytes, self.tokens, heads)
                    copies = [(there[:, run * half : (run + 1) * half], made[:, rows]) for run, rows in enumerate(self._runs(rank))]
                    (found.own if rank == self.ranks.rank else found.remote).extend(copies)
                offset += size * nbytes
        return found


def by_engines(copies: list[Copy], streams: list[torch.cuda.Stream]) -> None:
    """Each copy on one of the streams."""
    current = torch.cuda.current_stream()
    for stream in streams:
        stream.wait_stream(current)
    for number, (target, source) in enumerate(copies):
        with torch.cuda.stream(streams[number % len(streams)]):
            target.copy_(source)
    for stream in streams:
        current.wait_stream(stream)


def timed(ranks: Ranks, copies: list[Copy], work: Callable[[], None], samples: int) -> float:
    """Microseconds of `work` and the meetings before and after it, the median."""
    work()
    torch.cuda.synchronize()
    wrong = sum(not torch.equal(target, source) for target, source in copies)
    assert not wrong, f"{wrong} of {len(copies)} copies are wrong"
    ranks.barrier()

    def once() -> tuple[()]:
        ranks.meet()
        work()
        ranks.meet()
        return ()

    replay, found = captured(once), []
    for _ in range(WARMUP + samples):
        ranks.barrier()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(CYCLES_PER_MS // 10)
        start.record()
        for _ in range(REPEATS):
            replay()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / REPEATS * 1e3)
    return statistics.median(found[WARMUP:])


def after_a_pause(ranks: Ranks, copies: list[Copy], pause_ms: int, samples: int) -> tuple[float, float]:
    """Microseconds of the copies, and of waiting for the others' then, after links were not used for so long; medians."""
    found = []
    for _ in range(samples):
        ranks.barrier()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        torch.cuda._sleep(CYCLES_PER_MS * pause_ms + 1000)
        events[0].record()
        copy_all(copies)
        events[1].record()
        ranks.meet()
        events[2].record()
        events[2].synchronize()
        found.append([first.elapsed_time(second) * 1e3 for first, second in pairwise(events)])
    copying, waiting = (statistics.median(each) for each in zip(*found, strict=True))
    return copying, waiting


def main() -> None:
    """Times each kind of exchange."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, default=4, help="of whom a single process plays one")
    parser.add_argument("--tokens", type=int, default=32768, help="of each rank")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--samples", type=int, default=10)
    arguments = parser.parse_args()
    ranks = Ranks(arguments.ranks, arguments.tokens * (HEADS + 2 * KV_HEADS) * arguments.head_dim * 2)
    streams = [torch.cuda.Stream() for _ in range(3)]
    if ranks.rank == 0:
        within = "within one GPU" if ranks.alone else "over links"
        print(f"{HEADS}/{KV_HEADS} heads of {arguments.head_dim}, {arguments.tokens} tokens on each of {ranks.size} ranks, {within}")
    patterns = Exchanges(ranks, arguments.tokens, arguments.head_dim).patterns()
    for name, pattern in patterns.items():
        nbytes = sum(target.nbytes for target, _ in pattern.remote)
        took = {"one launch": timed(ranks, pattern.mixed, lambda pattern=pattern: copy_all(pattern.mixed), arguments.samples)}
        if name.startswith(("out", "gradients")):
            took["copy engines"] = timed(
                ranks, pattern.remote, lambda pattern=pattern: by_engines(pattern.remote, streams), arguments.samples
            )
        if ranks.rank == 0:
            said = "; ".join(f"{how} {us:7.1f} us, {nbytes / us / 1e3:5.0f} GB/s" for how, us in took.items())
            print(f"{name:22s} {len(pattern.mixed):3d} copies, {nbytes / 1e6:6.1f} MB to others: {said}", flush=True)
    for pause_ms in PAUSES_MS if not ranks.alone else ():
        copying, waiting = after_a_pause(ranks, patterns["gradients, one stage"].mixed, pause_ms, arguments.samples)
        print(
            f"rank {ranks.rank}: gradients of one stage after {pause_ms} ms: {copying:.0f} us, and {waiting:.0f} until all are there",
            flush=True,
        )
    if not ranks.alone:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
