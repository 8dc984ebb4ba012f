"""What to change, from what was measured: each advice with the numbers that it rests on, and how much it could save."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from statistics import median

from ringspan.geometry import Workload, make_layout
from ringspan.trace.findings import Findings
from ringspan.trace.numbers import count_text, percent, rate_text, seconds_text
from ringspan.trace.run import Trace
from ringspan.trace.timeline import DIRECTIONS, Timeline

HIDDEN_ENOUGH = 0.95
"""From this share on nothing is to be gained by hiding more."""
WORTH = 0.05
"""Less than this part of the ranks' time is not worth a change."""
_UNEVEN, _SLOW_RANK, _SLOW_LINK, _LAUNCHES = 1.1, 0.8, 1.5, 0.3
_SHARED = 2.0
"""Where ranks share what they compute on, one is this much slower by turns: it takes so much more to accuse it."""


@dataclass(frozen=True)
class Advice:
    """One thing to change, and the part of the ranks' time that it is about."""

    share: float
    text: str


def advise(trace: Trace, measured: Findings, predicted: Findings) -> list[Advice]:
    """What to change, that which costs most first; empty where nothing is worth it."""
    found = [
        _uneven(trace, measured),
        _slow_rank(trace, measured),
        _slow_link(trace, measured),
        _launches(trace, measured),
        _exposed(trace, measured, predicted),
    ]
    return sorted((advice for advice in found if advice is not None and advice.share >= WORTH), key=lambda advice: -advice.share)


def pairs_per_rank(timeline: Timeline) -> list[int]:
    """What each rank computes, forward."""
    pairs = [0] * timeline.num_ranks
    for event in timeline.of("forward"):
        pairs[event.rank] += event.pairs
    return pairs


def speeds(timeline: Timeline, backward_factor: float) -> list[float | None]:
    """For each rank the pairs that it computes in a second of its attends, those of the backward weighed; None where it has none."""
    work, seconds = [0.0] * timeline.num_ranks, [0.0] * timeline.num_ranks
    for event in timeline.events:
        if event.kind == "attend":
            work[event.rank] += event.pairs * (1.0 if event.direction == "forward" else backward_factor)
            seconds[event.rank] += event.seconds
    return [done / taken if done and taken else None for done, taken in zip(work, seconds, strict=True)]


def _for_ranks(findings: Findings) -> float:
    return sum(seconds for culprit, seconds in findings.blames.items() if culprit.target is None)


def _for_links(findings: Findings) -> float:
    return sum(seconds for culprit, seconds in findings.blames.items() if culprit.target is not None)


def _uneven(trace: Trace, measured: Findings) -> Advice | None:
    """Work that the layout deals unevenly."""
    pairs = pairs_per_rank(trace.measured)
    imbalance = max(pairs) * len(pairs) / sum(pairs) if sum(pairs) else 1.0
    if imbalance < _UNEVEN:
        return None
    case, mask = trace.case, trace.case.parsed_mask
    others = {
        name: Workload(make_layout(name, case.length, case.num_ranks, None, mask), mask).imbalance
        for name in ("zigzag", "striped", "auto")
        if name != case.layout
    }
    best = min(others, key=lambda name: round(others[name], 2))
    if others[best] > imbalance - 0.05:
        return None
    heaviest = pairs.index(max(pairs))
    text = (
        f"layout {best} instead of {case.layout}: rank {heaviest} computes {imbalance:.2f} times the mean, and with {best} the busiest "
        f"would compute {others[best]:.2f} times; the ranks stand still "
        f"{percent(measured.share(_for_ranks(measured)))} of their time for one another"
    )
    return Advice(measured.share(_for_ranks(measured)), text)


def _slow_rank(trace: Trace, measured: Findings) -> Advice | None:
    """A rank that takes longer than the others for the same: in its kernel calls, or between them."""
    blamed = {culprit.source: seconds for culprit, seconds in measured.blames.items() if culprit.target is None}
    if trace.measured.num_ranks < 2 or not blamed:
        return None
    rank = max(blamed, key=lambda rank: blamed[rank])
    share = measured.share(blamed[rank])
    found = speeds(trace.measured, trace.machine.backward_factor)
    others = [speed for other, speed in enumerate(found) if other != rank and speed is not None]
    mine = found[rank]
    # Threads that share cores are slower and faster by turns: it says nothing about the rank.
    if mine is not None and others and mine < _SLOW_RANK * median(others) and not trace.setting.shared:
        weights = [1.0 if other != rank else mine / median(others) for other in range(trace.measured.num_ranks)]
        text = (
            f"rank {rank} computes at {percent(mine / median(others))} of the others' speed: look for what else runs there, or for lower "
            f"clocks; or give it less, by layout weighted with weights {','.join(f'{weight:.2g}' for weight in weights)}"
        )
        return Advice(share, text)
    beside = _beside_attends(trace.measured)
    usual = median(seconds for other, seconds in enumerate(beside) if other != rank)
    enough = 2 * (_SHARED if trace.setting.shared else 1.0)
    if beside[rank] - usual > blamed[rank] / (2 * trace.measured.num_ranks) and beside[rank] > enough * usual:
        text = (
            f"rank {rank} spends {seconds_text(beside[rank])} beside its kernel calls, posting and merging, where the others spend "
            f"{seconds_text(usual)}: look at what holds up its host thread"
        )
        return Advice(share, text)
    return None


def _beside_attends(timeline: Timeline) -> list[float]:
    seconds = [0.0] * timeline.num_ranks
    for event in timeline.events:
        if event.kind not in ("attend", "wait"):
            seconds[event.rank] += event.seconds
    return seconds


def _slow_link(trace: Trace, measured: Findings) -> Advice | None:
    """A link that takes longer for a byte than the others."""
    blamed = {culprit: seconds for culprit, seconds in measured.blames.items() if culprit.target is not None}
    carried: dict[tuple[int, int], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for flight in trace.measured.flights:
        link = carried[(flight.source, flight.target)]
        link[0] += flight.size
        link[1] += flight.stop - flight.start
    rates = {link: size / seconds for link, (size, seconds) in carried.items() if size and seconds}
    if not blamed or len(rates) < 2:
        return None
    culprit = max(blamed, key=lambda culprit: blamed[culprit])
    assert culprit.target is not None
    link = (culprit.source, culprit.target)
    others = [rate for other, rate in rates.items() if other != link]
    enough = _SLOW_LINK * (_SHARED if trace.setting.shared else 1.0)
    if link not in rates or rates[link] * enough > median(others):
        return None
    text = (
        f"{culprit} carries {rate_text(rates[link], 'B')}, the others {rate_text(median(others), 'B')}: look at how it is wired, or place "
        f"ranks {link[0]} and {link[1]} apart; over machines double_ring sends less across slow links"
    )
    return Advice(measured.share(blamed[culprit]), text)


def _launches(trace: Trace, measured: Findings) -> Advice | None:
    """Kernel calls so short that calling them is what takes the time."""
    counts = [0] * trace.measured.num_ranks
    for event in trace.measured.events:
        counts[event.rank] += event.kind == "attend"
    calls = max(counts)
    share = calls * trace.machine.launch_seconds / max(sum(measured.seconds.values()), 1e-12)
    if share < _LAUNCHES:
        return None
    steps = trace.measured.num_steps["forward"]
    instead = "kernels cannot be fewer with this mask and layout; longer sequences make them worth their launch"
    if trace.case.strategy != "all_gather" and trace.measured.num_ranks > 1:
        instead = f"strategy all_gather, which computes what {steps} steps compute here in 2"
    text = (
        f"{count_text(calls)} kernel calls of a rank take {seconds_text(trace.machine.launch_seconds)} each to launch, "
        f"{percent(share)} of the time: {instead}"
    )
    return Advice(share, text)


def _exposed(trace: Trace, measured: Findings, predicted: Findings) -> Advice | None:
    """Transfers that take longer than the computing beside them: a rank's computing grows with the square of its positions."""
    copied = trace.setting.transport == "in-process"
    timeline, findings = (trace.predicted, predicted) if copied else (trace.measured, measured)
    if findings.hidden_share is None or findings.hidden_share >= HIDDEN_ENOUGH:
        return None
    worst = max((_ratio(timeline, direction) for direction in DIRECTIONS), default=0.0)
    if worst <= 1:
        return None
    case = trace.case
    positions = case.length / case.num_ranks
    flops = 4 * case.head_dim * case.heads * case.batch
    factor = {"forward": 1.0, "backward": trace.machine.backward_factor}
    attends = [event for event in timeline.events if event.kind == "attend"]
    computed = sum(event.pairs * flops * factor[event.direction] for event in attends) / sum(event.seconds for event in attends)
    carried = [flight for flight in timeline.flights if flight.size]
    link = sum(flight.size for flight in carried) / max(sum(flight.stop - flight.start for flight in carried), 1e-12)
    needed = _rounded_up(positions * worst)
    text = (
        f"longer context per rank: at F = {rate_text(computed, 'FLOP')} a rank and B = {rate_text(link, 'B')} a link, a transfer takes "
        f"{worst:.2g} times the computing of a step; c ≥ F/B holds from about {count_text(needed)} positions a rank, "
        f"{count_text(needed * case.num_ranks)} in all (here {count_text(round(positions))} a rank)"
        + (", by the prediction: threads cannot show it" if copied else "")
    )
    return Advice(findings.share(_for_links(findings)), text)


def _rounded_up(number: float) -> int:
    """To two figures."""
    unit = 10 ** max(0, len(str(int(number))) - 2)
    return -int(-number // unit) * unit


def _ratio(timeline: Timeline, direction: str) -> float:
    """The mean time of a transfer over the mean computing of a rank in a step that computes; 0 where there is none of either."""
    attends: dict[tuple[int, int], float] = defaultdict(float)
    for event in timeline.of(direction):
        if event.kind == "attend":
            attends[(event.rank, event.step)] += event.seconds
    flights = [flight.stop - flight.start for flight in timeline.flights if flight.direction == direction]
    if not flights or not attends:
        return 0.0
    return (sum(flights) / len(flights)) / (sum(attends.values()) / len(attends))
