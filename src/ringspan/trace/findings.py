"""What a timeline tells, in numbers: how much of the communication was hidden, who waited, and for whom."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from ringspan.trace.timeline import COMPUTING, DIRECTIONS, Event, Flight, Timeline, common, length, union


@dataclass(frozen=True, order=True)
class Culprit:
    """Who held a rank up: rank `source` itself where `target` is None, else the link from `source` to `target`."""

    source: int
    target: int | None = None

    def __str__(self) -> str:
        return f"rank {self.source}" if self.target is None else f"the link from rank {self.source} to rank {self.target}"


@dataclass(frozen=True)
class Findings:
    """Of one timeline, forward and backward together. Seconds are added up over ranks unless said otherwise.

    Attributes:
        seconds: by direction, until the last rank is done: not added up.
        computing: in which ranks worked.
        waiting: in which ranks waited for what the next step needed.
        idle: in which ranks were done and others were not.
        in_flight: in which something was on its way to a rank.
        hidden: of these, in which that rank worked.
        blames: for whom ranks waited or, being done, were idle; the longest first.
        waits: by rank, how long it waited.
    """

    seconds: dict[str, float]
    computing: float
    waiting: float
    idle: float
    in_flight: float
    hidden: float
    blames: dict[Culprit, float]
    waits: tuple[float, ...]

    @property
    def hidden_share(self) -> float | None:
        """Time in flight while the rank worked / time in flight; None where nothing travels."""
        return self.hidden / self.in_flight if self.in_flight else None

    @property
    def total(self) -> float:
        """Of all ranks, from beginning to end."""
        return sum(self.seconds.values()) * len(self.waits)

    def share(self, seconds: float) -> float:
        """`seconds` as a part of the ranks' time."""
        return seconds / self.total if self.total else 0.0


def find(timeline: Timeline) -> Findings:
    """What `timeline` tells."""
    computing = idle = in_flight = hidden = 0.0
    waits = [0.0] * timeline.num_ranks
    blames: dict[Culprit, float] = defaultdict(float)
    for direction in DIRECTIONS:
        watch = _Blame(timeline, direction)
        dones = [max((event.stop for event in timeline.of(direction, rank)), default=0.0) for rank in range(timeline.num_ranks)]
        last = max(range(timeline.num_ranks), key=lambda rank: dones[rank])
        for rank in range(timeline.num_ranks):
            events = timeline.of(direction, rank)
            busy = union([(event.start, event.stop) for event in events if event.kind in COMPUTING])
            arriving = union([(flight.start, flight.stop) for flight in timeline.flights if _is_to(flight, direction, rank)])
            computing += length(busy)
            in_flight += length(arriving)
            hidden += common(busy, arriving)
            for event in events:
                if event.kind == "wait":
                    waits[rank] += event.seconds
                    for culprit, seconds in watch.of(rank, event.start, event.stop).items():
                        blames[culprit] += seconds
            if dones[rank] < dones[last]:
                idle += dones[last] - dones[rank]
                for culprit, seconds in watch.of(last, dones[rank], dones[last], frozenset({rank})).items():
                    blames[culprit] += seconds
    ordered = dict(sorted(blames.items(), key=lambda item: (-item[1], item[0].source, item[0].target or -1)))
    return Findings(timeline.seconds, computing, sum(waits), idle, in_flight, hidden, ordered, tuple(waits))


def _is_to(flight: Flight, direction: str, rank: int) -> bool:
    return flight.direction == direction and flight.target == rank


class _Blame:
    """Follows a wait to its cause.

    Until both ends have posted the last transfer of what a rank waits for, it waits for the other end: for that rank itself while it
    works, and while it waits for whoever that waits for. From then on it waits for the link.
    """

    def __init__(self, timeline: Timeline, direction: str) -> None:
        self._waits: dict[int, list[Event]] = defaultdict(list)
        for event in timeline.of(direction):
            if event.kind == "wait":
                self._waits[event.rank].append(event)
        # (rank, batch) -> the transfers that this rank's wait is for.
        self._awaited: dict[tuple[int, int], list[Flight]] = defaultdict(list)
        for flight in timeline.flights:
            if flight.direction == direction:
                self._awaited[(flight.target, flight.target_batch)].append(flight)
                self._awaited[(flight.source, flight.source_batch)].append(flight)

    def of(self, rank: int, start: float, stop: float, seen: frozenset[int] = frozenset()) -> dict[Culprit, float]:
        """For whom `rank` waits from `start` to `stop`: seconds by culprit. What it does besides waiting is its own."""
        found: dict[Culprit, float] = defaultdict(float)
        mine = stop - start
        for wait in self._waits[rank]:
            low, high = max(start, wait.start), min(stop, wait.stop)
            if high <= low:
                continue
            mine -= high - low
            flight = self._last(rank, wait)
            if flight is None:
                continue
            other = flight.source if flight.target == rank else flight.target
            until = min(max(flight.ready, low), high)
            if until > low:
                # Two ranks that wait for each other cannot be told apart; it is laid to the one that was asked first.
                deeper = {Culprit(other): until - low} if other in seen else self.of(other, low, until, seen | {rank})
                for culprit, seconds in deeper.items():
                    found[culprit] += seconds
            if high > until:
                found[Culprit(flight.source, flight.target)] += high - until
        if mine > 0 and seen:
            found[Culprit(rank)] += mine
        return found

    def _last(self, rank: int, wait: Event) -> Flight | None:
        """The transfer of a wait that was ready last; what arrives goes before what leaves.

        A send may be over before its receiver stands ready, where the transport keeps it for him: then nobody waited for that.
        """
        awaited = self._awaited[(rank, wait.batch)] if wait.batch >= 0 else []
        found = [flight for flight in awaited if flight.target == rank or flight.ready <= wait.stop]
        return max(found, key=lambda flight: (flight.target == rank, flight.ready, flight.stop), default=None)
