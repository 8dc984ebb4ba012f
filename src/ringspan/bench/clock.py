"""Time: device events on CUDA, the process's clock elsewhere; the slowest rank counts, sample by sample."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from ringspan.transport import Transport

SHORTEST_SAMPLE_MS = 5.0
"""Shorter work is repeated within a sample, back to back, so that neither the clock nor the ranks' common start is what is timed."""

MOST_REPEATS = 50


@dataclass(frozen=True)
class Timing:
    """What was timed.

    Attributes:
        by_rank_ms: of each rank its samples: milliseconds of one call, each the mean over `repeats` calls in a row.
        repeats: calls a sample.
    """

    by_rank_ms: tuple[tuple[float, ...], ...]
    repeats: int

    @property
    def samples_ms(self) -> tuple[float, ...]:
        """Of each sample the slowest rank's."""
        return slowest(self.by_rank_ms)

    @property
    def rank_medians_ms(self) -> tuple[float, ...]:
        """Each rank's median: one that is always the slowest is another matter than ranks that are slow by turns."""
        return tuple(map(statistics.median, self.by_rank_ms))

    @property
    def median_ms(self) -> float:
        """The median sample."""
        return statistics.median(self.samples_ms)

    def with_more(self, others: Timing) -> Timing:
        """All samples together."""
        return replace(self, by_rank_ms=tuple((*mine, *more) for mine, more in zip(self.by_rank_ms, others.by_rank_ms, strict=True)))


@dataclass(frozen=True)
class Clock:
    """Times work that all ranks do together.

    Args:
        device: where it is done.
        transport: of all ranks.
        warmup: calls before the first sample, 1 at least.
        samples: how many.
    """

    device: torch.device
    transport: Transport
    warmup: int
    samples: int

    @property
    def half(self) -> Clock:
        """Of half as many samples, one more where they are odd: for what is timed at other times too."""
        return replace(self, samples=(self.samples + 1) // 2)

    def time(self, work: Callable[[], object]) -> Timing:
        """Warms up, finds out in the last call of that how often to repeat, and takes the samples. Collective."""
        return self.in_turns(work)[0]

    def in_turns(self, *works: Callable[[], object]) -> tuple[Timing, ...]:
        """The same of several, a sample of each in turn. Collective.

        A GPU at its power limit slows down and recovers within tenths of a second, by a tenth and more: what is to be compared must meet it
        in the same states.
        """
        repeats = [self._repeats(work) for work in works]
        mine = [[self._sample(work, number) for work, number in zip(works, repeats, strict=True)] for _ in range(self.samples)]
        by_rank = self.transport.gather_objects(mine)
        return tuple(
            Timing(tuple(tuple(sample[place] for sample in samples) for samples in by_rank), number) for place, number in enumerate(repeats)
        )

    def _repeats(self, work: Callable[[], object]) -> int:
        """How often to call `work` in a sample; warms up."""
        for _ in range(self.warmup - 1):
            work()
        once = max(self.transport.gather_objects(self._sample(work, 1)))
        return min(MOST_REPEATS, max(1, math.ceil(SHORTEST_SAMPLE_MS / max(once, 1e-6))))

    def _sample(self, work: Callable[[], object], repeats: int) -> float:
        """Milliseconds of a call. The ranks start together, devices as soon as all are there; what each does after that is its own."""
        self.synchronize()
        self.transport.all_reduce(torch.zeros(1, device=self.device))
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(repeats):
                work()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / repeats
        began = time.perf_counter()
        for _ in range(repeats):
            work()
        return (time.perf_counter() - began) * 1e3 / repeats

    def synchronize(self) -> None:
        """Waits for this rank's device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def slowest(by_rank: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """For each sample the slowest rank's time."""
    return tuple(max(times) for times in zip(*by_rank, strict=True))
