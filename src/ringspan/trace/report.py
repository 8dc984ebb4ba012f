"""A trace as plain values: everything that was measured and predicted, and what was made of it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ringspan.trace.findings import Findings
from ringspan.trace.run import Trace
from ringspan.trace.timeline import DIRECTIONS, Timeline
from ringspan.trace.words import Story


def as_json(trace: Trace, story: Story) -> dict[str, Any]:
    """For `json.dumps`. Seconds are counted from the beginning of each direction."""
    return {
        "case": {**asdict(trace.case), "options": dict(trace.case.options)},
        "setting": {**asdict(trace.setting), "shared": trace.setting.shared},
        "machine": asdict(trace.machine),
        "reason": trace.reason,
        "words": {name: getattr(story, name) for name in ("hidden", "waiting", "held_up", "change", "caveats")},
        "measured": _timeline(trace.measured, story.measured),
        "predicted": _timeline(trace.predicted, story.predicted),
    }


def _timeline(timeline: Timeline, findings: Findings) -> dict[str, Any]:
    return {
        "seconds": timeline.seconds,
        "step_seconds": {direction: timeline.step_seconds(direction) for direction in DIRECTIONS},
        "computing_seconds": findings.computing,
        "waiting_seconds": findings.waiting,
        "idle_seconds": findings.idle,
        "in_flight_seconds": findings.in_flight,
        "hidden_seconds": findings.hidden,
        "hidden_share": findings.hidden_share,
        "waits_by_rank": findings.waits,
        "held_up_by": {str(culprit): seconds for culprit, seconds in findings.blames.items()},
        "events": [asdict(event) for event in timeline.events],
        "flights": [asdict(flight) for flight in timeline.flights],
    }
