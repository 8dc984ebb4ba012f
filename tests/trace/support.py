"""Timelines and traces made by hand, and ranks whose transport is held up."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from ringspan.strategies import Machine, make_schedules
from ringspan.trace import Event, Flight, Setting, Timeline, Trace, TraceCase, predicted_timeline, put_together
from ringspan.trace.run import context_for, observe_rank
from ringspan.transport import InProcessTransport, Parcel, run_in_process

MACHINE = Machine(name="this machine", flops_per_second=1e12, link_bytes_per_second=1e10, latency_seconds=1e-5, launch_seconds=1e-6)
DEVICES = Setting(device="cpu", transport="gloo", kernel="torch_cpu", cores=64, local_ranks=1, devices=0, torch_version=torch.__version__)
"""Ranks that share nothing."""


def timeline(num_ranks: int, events: Sequence[Event], flights: Sequence[Flight] = (), num_steps: int = 2) -> Timeline:
    """Of these parts."""
    return Timeline(num_ranks, {"forward": num_steps, "backward": num_steps}, tuple(events), tuple(flights))


def does(
    rank: int, step: int, kind: str, start: float, stop: float, *, pairs: int = 0, batch: int = -1, direction: str = "forward"
) -> Event:
    """One event; an attend of the rank's own."""
    label = f"q{rank}[0:4]×kv{rank}[0:4]" if kind == "attend" else ""
    return Event(direction, rank, step, kind, label, rank if kind == "attend" else None, start, stop, pairs, batch)


def flies(source: int, target: int, ready: float, stop: float, *, size: int = 1000, batch: int = 0, direction: str = "forward") -> Flight:
    """One flight, under way from the moment when it was ready."""
    return Flight(direction, 0, f"kv{source}[0:4]", source, source, target, size, ready, ready, stop, False, -1, batch)


def traced(measured: Timeline, case: TraceCase | None = None, setting: Setting = DEVICES, machine: Machine = MACHINE) -> Trace:
    """A trace that measured `measured`, and predicted what the case's schedules foretell."""
    case = case or TraceCase(num_ranks=measured.num_ranks, length=64)
    layout, mask = case.make_layout(), case.parsed_mask
    schedules = make_schedules(case.strategy, layout, mask, **case.options)
    predicted = predicted_timeline(schedules, layout, mask, case.sizes, machine)
    return Trace(case=case, setting=setting, machine=machine, measured=measured, predicted=predicted, schedules=schedules)


class HeldUp(InProcessTransport):
    """A rank of `like` whose every `exchange` takes `late_seconds` longer, or to which what `slow_from` sends comes `slow_seconds` late."""

    def __init__(self, like: InProcessTransport, *, late_seconds: float = 0.0, slow_from: int = -1, slow_seconds: float = 0.0) -> None:
        super().__init__(like.world, like.rank)
        self._late, self._slow_from, self._slow = late_seconds, slow_from, slow_seconds

    def exchange(self, sends: Sequence[Parcel], receives: Sequence[Parcel], lane: int = 0):
        """Posts late, or hands out what comes late."""
        time.sleep(self._late if sends or receives else 0.0)
        pending = super().exchange(sends, receives, lane)
        if any(parcel.peer == self._slow_from for parcel in receives):
            return _Slow(pending, self._slow)
        return pending


class _Slow:
    def __init__(self, pending, seconds: float) -> None:
        self._pending, self._seconds = pending, seconds

    def wait(self) -> None:
        self._pending.wait()
        time.sleep(self._seconds)


def trace_with(case: TraceCase, transport: Callable[[InProcessTransport], InProcessTransport], setting: Setting | None = None) -> Trace:
    """`case` over in-process ranks, each with the transport that `transport` makes of its own. The rates are given, not measured."""
    device = torch.device("cpu")
    observed = run_in_process(case.num_ranks, lambda group: observe_rank(case, context_for(case, transport(group)), device, MACHINE), 60.0)
    found = put_together(case, [each.record for each in observed], observed[0], device, "in-process")
    return found if setting is None else replace(found, setting=setting)
