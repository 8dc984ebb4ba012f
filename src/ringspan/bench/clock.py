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

    def time(self, work: Callable[[], object], least_ms: float = SHORTEST_SAMPLE_MS) -> Timing:
        """Warms up, finds out in the last call of that how often to repeat, and takes the samples, of `least_ms` and more. Collective."""
        return self.in_turns(work, least_ms=least_ms)[0]

    def in_turns(self, *works: Callable[[], object], least_ms: float = SHORTEST_SAMPLE_MS) -> tuple[Timing, ...]:
        """The same of several, a sample of each in turn, all samples of one length. Collective.

        A GPU at its power limit slows down and recovers within tenths of a second, by a tenth and more: what is to be compared must meet it
        in the same states, and for as long. A short sample may be over before it slows down, or have nothing but that.
        """
        once = [self._once(work) for work in works]
        span = max(SHORTEST_SAMPLE_MS, least_ms, *once)
        # As often as fits best: less than half a call too long or too short.
        repeats = [min(MOST_REPEATS, max(round(span / each), math.ceil(SHORTEST_SAMPLE_MS / each))) for each in once]
        mine = [[self._sample(work, number) for work, number in zip(works, repeats, strict=True)] for _ in range(self.samples)]
        by_rank = self.transport.gather_objects(mine)
        return tuple(
            Timing(tuple(tuple(sample[place] for sample in samples) for samples in by_rank), number) for place, number in enumerate(repeats)
        )

    def _once(self, work: Callable[[], object]) -> float:
        """Milliseconds of a call, the last of those that warm up, on the slowest rank."""
        for _ in range(self.warmup - 1):
            work()
        return max(1e-6, *self.transport.gather_objects(self._sample(work, 1)))

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
