"""A trace in Chrome's trace event format, which Perfetto and chrome://tracing open.

A process a rank, measured and below it predicted; a thread for what the rank does, and one for each thing that is on its way to it at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ringspan.trace.run import Trace
from ringspan.trace.timeline import DIRECTIONS, Event, Flight, Timeline

_GAP = 0.05
"""Between the forward and the backward, as a part of the longer of the two forwards."""


def backward_offset(measured: Timeline, predicted: Timeline) -> float:
    """When the backward is drawn to begin, in seconds: measured and predicted begin it together."""
    return (1 + _GAP) * max(measured.seconds["forward"], predicted.seconds["forward"])


def chrome_trace(trace: Trace) -> dict[str, Any]:
    """`trace` as an object for `json.dumps`: microseconds; pid = rank, and ranks + rank for the predicted ones."""
    offsets = dict(zip(DIRECTIONS, (0.0, backward_offset(trace.measured, trace.predicted)), strict=True))
    events: list[dict[str, Any]] = []
    for index, (name, timeline) in enumerate((("", trace.measured), (" predicted", trace.predicted))):
        for rank in range(timeline.num_ranks):
            pid = index * timeline.num_ranks + rank
            events += _named(pid, 0, "process_name", f"rank {rank}{name}")
            events.append({"ph": "M", "name": "process_sort_index", "pid": pid, "tid": 0, "args": {"sort_index": 2 * rank + index}})
            events += _lanes(timeline, rank, pid, offsets)
    case = trace.case
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {"what": case.title, "ranks": case.num_ranks, "length": case.length, "device": trace.setting.device},
    }


def _lanes(timeline: Timeline, rank: int, pid: int, offsets: dict[str, float]) -> list[dict[str, Any]]:
    own = [event for event in timeline.events if event.rank == rank]
    coming = [flight for flight in timeline.flights if flight.target == rank]
    found: list[dict[str, Any]] = []
    tid = 0
    for name, parts in (("compute", own), ("arrivals", coming)):
        row_of = rows_of([(offsets[part.direction] + part.start, offsets[part.direction] + part.stop) for part in parts])
        rows = max(row_of, default=-1) + 1
        for row in range(rows):
            found += _named(pid, tid + row, "thread_name", name if rows == 1 else f"{name} {row + 1}")
        for part, row in zip(parts, row_of, strict=True):
            # Ends are rounded, not lengths: what follows on another does not overlap it.
            start, stop = (round((offsets[part.direction] + moment) * 1e9) for moment in (part.start, part.stop))
            shape = {"ph": "X", "pid": pid, "tid": tid + row, "ts": start / 1e3, "dur": (stop - start) / 1e3}
            found.append(shape | (_event(part) if isinstance(part, Event) else _flight(part)))
        tid += rows
    return found


def rows_of(intervals: Sequence[tuple[float, float]]) -> list[int]:
    """A row for each interval, so that none of a row overlap; as few rows as there are intervals at once."""
    ends: list[float] = []
    rows = [0] * len(intervals)
    for index in sorted(range(len(intervals)), key=lambda index: intervals[index]):
        start, stop = intervals[index]
        row = next((row for row, end in enumerate(ends) if end <= start), len(ends))
        ends[row : row + 1] = [stop]
        rows[index] = row
    return rows


def _event(event: Event) -> dict[str, Any]:
    name = event.label if event.kind == "attend" else f"{event.kind} {event.label}".strip()
    args: dict[str, Any] = {"step": event.step, "direction": event.direction}
    if event.pairs:
        args["pairs"] = event.pairs
    return {"name": name, "cat": event.kind, "args": args}


def _flight(flight: Flight) -> dict[str, Any]:
    args = {"step": flight.step, "direction": flight.direction, "bytes": flight.size, "from": flight.source, "to": flight.target}
    return {"name": f"{flight.label} from rank {flight.source}", "cat": "transfer", "args": args}


def _named(pid: int, tid: int, kind: str, name: str) -> list[dict[str, Any]]:
    return [{"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}}]
