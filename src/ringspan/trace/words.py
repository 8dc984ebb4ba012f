"""What a trace tells, in sentences with their numbers."""

from __future__ import annotations

from dataclasses import dataclass

from ringspan.trace.advice import HIDDEN_ENOUGH, WORTH, advise
from ringspan.trace.findings import Findings, find
from ringspan.trace.numbers import count_text, percent, rate_text, seconds_text
from ringspan.trace.run import Trace
from ringspan.trace.timeline import DIRECTIONS

_NAMED = 3
"""How many culprits are named."""


@dataclass(frozen=True)
class Story:
    """A trace in words.

    Attributes:
        rates: what the prediction rests on.
        hidden: how much of the communication was hidden.
        waiting: how much time the ranks lost.
        held_up: who held the others up.
        change: what to change, each a sentence; or that nothing need be.
        caveats: what the measurement is not.
        measured: the numbers of what happened.
        predicted: the numbers of what was foretold.
    """

    rates: str
    hidden: str
    waiting: str
    held_up: str
    change: tuple[str, ...]
    caveats: tuple[str, ...]
    measured: Findings
    predicted: Findings


def tell(trace: Trace) -> Story:
    """`trace` in words."""
    measured, predicted = find(trace.measured), find(trace.predicted)
    return Story(
        rates=_rates(trace),
        hidden=_hidden(trace, measured, predicted),
        waiting=_waiting(measured, predicted),
        held_up=_held_up(measured),
        change=_change(trace, measured, predicted),
        caveats=_caveats(trace),
        measured=measured,
        predicted=predicted,
    )


def _rates(trace: Trace) -> str:
    machine = trace.machine
    return (
        f"{machine.name}: {rate_text(machine.flops_per_second, 'FLOP')} a rank, {machine.backward_factor:.2g} times as long backward; "
        f"{rate_text(machine.link_bytes_per_second, 'B')} a link after {seconds_text(machine.latency_seconds)}; "
        f"{seconds_text(machine.launch_seconds)} a launch"
    )


def _hidden(trace: Trace, measured: Findings, predicted: Findings) -> str:
    if measured.hidden_share is None:
        return "nothing travels"
    foretold = "" if predicted.hidden_share is None else f" (predicted: {percent(predicted.hidden_share)})"
    copied = "; threads fetch what was sent while they wait for it, so that none of it can hide" if _copied(trace) else ""
    return (
        f"{percent(measured.hidden_share)} of the time in flight was under computing{foretold}: {seconds_text(measured.hidden)} of "
        f"{seconds_text(measured.in_flight)}, added up over the ranks{copied}"
    )


def _waiting(measured: Findings, predicted: Findings) -> str:
    longest = max(range(len(measured.waits)), key=lambda rank: measured.waits[rank])
    named = f", rank {longest} longest with {seconds_text(measured.waits[longest])}" if measured.waits[longest] else ""
    return (
        f"the ranks waited {percent(measured.share(measured.waiting))} of their time{named}, and {percent(measured.share(measured.idle))} "
        f"they were done before the last (predicted: {percent(predicted.share(predicted.waiting))} and "
        f"{percent(predicted.share(predicted.idle))})"
    )


def _held_up(measured: Findings) -> str:
    lost = measured.waiting + measured.idle
    if not measured.blames or measured.share(lost) < 0.01:
        return "nobody: the ranks lost less than 1% of their time to one another"
    named = [
        f"{culprit} for {seconds_text(seconds)} ({percent(seconds / lost)})"
        for culprit, seconds in list(measured.blames.items())[:_NAMED]
        if seconds >= lost / 20
    ]
    return f"of {seconds_text(lost)} that ranks stood still, they stood for {', '.join(named) or 'many, none of them for long'}"


def _change(trace: Trace, measured: Findings, predicted: Findings) -> tuple[str, ...]:
    advice = advise(trace, measured, predicted)
    if advice:
        return tuple(each.text for each in advice)
    lost = measured.share(measured.waiting + measured.idle)
    if lost < WORTH:
        why = "nothing travels"
        if measured.hidden_share is not None:
            why = f"{percent(measured.hidden_share)} of what travels is hidden" if measured.hidden_share >= HIDDEN_ENOUGH else ""
        return (f"nothing: {why or 'what is not hidden costs little'}, and the ranks stood still {percent(lost)} of their time",)
    foretold = predicted.share(predicted.waiting + predicted.idle)
    stood = f"the ranks stood still {percent(lost)} of the time, where the schedule and the rates foretell {percent(foretold)}"
    if trace.setting.shared:
        return (f"nothing that this run could tell: {stood}, and what they share explains the rest",)
    return (f"look at the timeline: {stood}, and neither work, launches nor links explain the rest",)


def _copied(trace: Trace) -> bool:
    return trace.setting.transport == "in-process"


def _caveats(trace: Trace) -> tuple[str, ...]:
    found = []
    if trace.setting.shared:
        found.append(
            f"{trace.setting.shared}: this shows the order of the schedule and its waits, and not the time that as many devices would take"
        )
    if trace.machine.name != "this machine":
        found.append(f"the prediction is for {trace.machine.name}, not for what was measured here")
    return tuple(found)


def step_rows(trace: Trace) -> list[tuple[str, list[tuple[float, float]]]]:
    """For the table: (step, [(measured, predicted) seconds for each direction]), and a last row for all.

    A step's time is its mean over the ranks, with the wait for what the next one needs; that of all is until the last rank is done.
    """
    columns = [(trace.measured.step_seconds(direction), trace.predicted.step_seconds(direction)) for direction in DIRECTIONS]
    last = max(trace.measured.num_steps.values())
    rows = []
    for step in range(-1, last + 1):
        pairs = []
        for direction, (measured, predicted) in zip(DIRECTIONS, columns, strict=True):
            # What comes after the last step stands in the last row, whatever the number of steps of this direction.
            steps = trace.measured.num_steps[direction]
            key = steps if step == last else step if step < steps else None
            pairs.append((0.0, 0.0) if key is None else (measured.get(key, 0.0), predicted.get(key, 0.0)))
        if any(max(pair) > 0 for pair in pairs):
            rows.append(({-1: "before", last: "after"}.get(step, count_text(step)), pairs))
    total = [(trace.measured.seconds[direction], trace.predicted.seconds[direction]) for direction in DIRECTIONS]
    return [*rows, ("all", total)]
