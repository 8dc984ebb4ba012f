"""The observer that keeps times: by the host's clock on a CPU, by events on the streams of a GPU, read when all is over."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ringspan.transport import Pending, works


class Clock(Protocol):
    """Marks moments and, afterwards, tells when they were."""

    def start(self) -> None:
        """All that was queued before is over; marks are counted from here."""
        ...

    def mark(self) -> Any:
        """This moment in the work of the rank."""
        ...

    def arrival(self, pending: Pending | None) -> Any:
        """The moment at which `pending` will be over, where the device can tell; else None, and the end of the wait has to do."""
        ...

    def finish(self) -> None:
        """Waits until every mark can be read."""
        ...

    def seconds(self, mark: Any) -> float:
        """When `mark` was, in the host's monotonic seconds."""
        ...


class HostClock:
    """A rank computes where it is called."""

    def start(self) -> None:
        """Nothing is queued on a CPU."""

    def mark(self) -> float:
        """Now."""
        return time.perf_counter()

    def arrival(self, pending: Pending | None) -> None:
        """Not known before it is waited for."""

    def finish(self) -> None:
        """Nothing is queued on a CPU."""

    def seconds(self, mark: float) -> float:
        """The mark itself."""
        return mark


class CudaClock:
    """Events on the current stream; and for each transfer one on a stream of its own, which does nothing but wait for it.

    Args:
        device: the rank's GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._probe = torch.cuda.Stream(device)
        self._base = torch.cuda.Event(enable_timing=True)
        self._host = 0.0

    def start(self) -> None:
        """See `Clock.start`."""
        torch.cuda.synchronize(self._device)
        self._base = torch.cuda.Event(enable_timing=True)
        self._base.record(torch.cuda.current_stream(self._device))
        torch.cuda.synchronize(self._device)
        self._host = time.perf_counter()

    def mark(self) -> torch.cuda.Event:
        """An event that is reached when all that was queued on the current stream is done."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def arrival(self, pending: Pending | None) -> torch.cuda.Event | None:
        """An event behind the transfer, where it can be waited for twice: by this stream, and by the one that reads it."""
        under_way = () if pending is None else works(pending)
        if not under_way:
            return None
        event = torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(self._probe):
            for work in under_way:
                work.wait()
            event.record(self._probe)
        return event

    def finish(self) -> None:
        """See `Clock.finish`."""
        torch.cuda.synchronize(self._device)

    def seconds(self, mark: torch.cuda.Event) -> float:
        """See `Clock.seconds`."""
        return self._host + self._base.elapsed_time(mark) / 1e3


def clock_for(device: torch.device) -> Clock:
    """The clock of tensors on `device`."""
    return CudaClock(device) if device.type == "cuda" else HostClock()


@dataclass(frozen=True, slots=True)
class Mark:
    """One part that was observed: a rank's own words, to be put together with those of the others.

    `arrived` is when a transfer was over, where that is known apart from the wait for it. `batch` numbers the transfers that were posted
    together; a transfer, its post and its wait share it.
    """

    direction: str
    step: int
    kind: str
    what: object
    start: float
    stop: float
    arrived: float | None
    batch: int


@dataclass(slots=True)
class _Entry:
    direction: str
    step: int
    kind: str
    what: object
    start: Any
    arrival: Any = None
    stop: Any = None


class Recorder:
    """An `Observer` that remembers. One for each rank.

    Args:
        clock: of the rank's device.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock, self._entries, self._direction = clock, [], ""

    def start(self, direction: str) -> None:
        """What follows belongs to `direction`. Nothing may be under way."""
        self._direction = direction
        self._clock.start()

    def begin(self, step: int, kind: str, what: object, pending: Pending | None = None) -> _Entry | None:
        """See `Observer.begin`. What stands around or outside a schedule's parts is not remembered."""
        if kind in ("whole", "reduce"):
            return None
        entry = _Entry(self._direction, step, kind, what, self._clock.mark())
        if pending is not None:
            entry.arrival = self._clock.arrival(pending)
        self._entries.append(entry)
        return entry

    def end(self, token: _Entry | None) -> None:
        """See `Observer.end`."""
        if token is not None:
            token.stop = self._clock.mark()

    def finish(self) -> tuple[Mark, ...]:
        """Everything of the direction that was started last, and forgets it."""
        self._clock.finish()
        batches: dict[int, int] = {}
        marks = []
        for entry in self._entries:
            # The same object is posted, under way and waited for; `_entries` keeps it alive, so that its id stays its own.
            joint = entry.kind in ("post", "transfer", "wait")
            batch = batches.setdefault(id(entry.what), len(batches)) if joint else -1
            arrived = None if entry.arrival is None else self._clock.seconds(entry.arrival)
            start, stop = self._clock.seconds(entry.start), self._clock.seconds(entry.stop)
            marks.append(Mark(entry.direction, entry.step, entry.kind, entry.what, start, stop, arrived, batch))
        self._entries = []
        return tuple(marks)
