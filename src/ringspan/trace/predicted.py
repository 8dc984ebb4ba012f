"""The timeline that the schedule and the machine's rates foretell, in the terms in which a run is measured."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from itertools import count

from ringspan.geometry import Layout, Mask
from ringspan.schedule import Action, Attend, Combine, Piece, PieceBytes, Receive, Schedule, Send
from ringspan.schedule.draw import is_result, pairs_between, visitor
from ringspan.strategies import Forecast, Machine, Prices, Schedules, forecast_layer, prices_of
from ringspan.trace.timeline import Event, Flight, Timeline


def predicted_timeline(schedules: Schedules, layout: Layout, mask: Mask, sizes: PieceBytes, machine: Machine) -> Timeline:
    """What one layer of `schedules` should take.

    Args:
        schedules: what runs.
        layout: of all ranks.
        mask: what a query sees.
        sizes: of attention's tensors, with all heads.
        machine: the rates.
    """
    layer = forecast_layer(schedules, layout, mask, sizes, machine)
    events: list[Event] = []
    flights: list[Flight] = []
    halves = ((schedules.forward, layer.forward, layer.exchanges[:2]), (schedules.backward, layer.backward, layer.exchanges[2:]))
    for schedule, half, (there, back) in halves:
        prices = prices_of(schedule, schedules.layout, mask, layer.sizes, machine)
        for members in _context_groups(schedules, layout.num_ranks):
            _add(events, flights, schedule, half, prices, members, there)
        if schedules.grid is not None and there:
            for rank in range(layout.num_ranks):
                # The schedule ends for all together here, as it is priced.
                after = there + half.seconds
                parts = ((-1, 0.0, there), (schedule.num_steps, after, after + back))
                for step, start, stop in parts:
                    events.append(Event(schedule.direction, rank, step, "wait", "positions for heads", None, start, stop))
                    for peer in schedules.grid.head_group(schedules.grid.group(rank)):
                        if peer != rank:
                            # What one position weighs differs from rank to rank; the time is that of the widest.
                            flights.append(Flight(schedule.direction, step, "heads", peer, peer, rank, 0, start, start, stop, step >= 0))
    events.sort(key=lambda event: (event.direction != "forward", event.start, event.rank))
    flights.sort(key=lambda flight: (flight.direction != "forward", flight.ready, flight.target))
    steps = {"forward": schedules.forward.num_steps, "backward": schedules.backward.num_steps}
    return Timeline(layout.num_ranks, steps, tuple(events), tuple(flights))


def _context_groups(schedules: Schedules, num_ranks: int) -> list[tuple[int, ...]]:
    if schedules.grid is None:
        return [tuple(range(num_ranks))]
    return [schedules.grid.context_group(place) for place in range(schedules.grid.degree)]


def _add(
    events: list[Event], flights: list[Flight], schedule: Schedule, half: Forecast, prices: Prices, members: tuple[int, ...], begin: float
) -> None:
    """The events and flights of the ranks `members`, which run `schedule` from `begin` on."""
    cells: dict[tuple[int, int], list[Action]] = defaultdict(list)
    for rank, program in enumerate(schedule.programs):
        for action in program:
            cells[(rank, action.step)].append(action)
    arriving: dict[tuple[int, int], list[str]] = defaultdict(list)
    for flight in half.transfers:
        arriving[(flight.target, flight.due)].append(f"{_renamed(flight.piece, members)}←{members[flight.source]}")
    numbers = [count() for _ in members]
    batches: dict[tuple[int, int], int] = {}

    def batch(rank: int, due: int) -> int:
        if (rank, due) not in batches:
            batches[(rank, due)] = next(numbers[rank])
        return batches[(rank, due)]

    for step, (starts, ends) in enumerate(zip(half.starts, half.ends, strict=True)):
        later = half.starts[step + 1] if step + 1 < len(half.starts) else half.done
        for rank in range(len(members)):
            now = begin + starts[rank]
            for action in sorted(cells[(rank, step)], key=lambda action: isinstance(action, Attend)):
                seconds = prices.seconds(action)
                if isinstance(action, Attend):
                    events += _attends(schedule.direction, members, rank, action, now, seconds, prices)
                elif seconds and isinstance(action, Combine):
                    label = f"+{_renamed(action.piece, members)}←{members[action.peer]}"
                    events.append(Event(schedule.direction, members[rank], action.step, "merge", label, None, now, now + seconds))
                elif seconds:
                    events.append(_posting(schedule.direction, members, rank, action, now, now + seconds))
                now += seconds
            if later[rank] > ends[rank]:
                label = " ".join(arriving[(rank, step + 1)])
                events.append(
                    Event(
                        schedule.direction, members[rank], step, "wait", label, None, begin + ends[rank], begin + later[rank],
                        batch=batch(rank, step + 1),
                    )
                )  # fmt: skip
    for flight in half.transfers:
        piece = _renamed(flight.piece, members)
        flights.append(
            Flight(
                schedule.direction, flight.step, str(piece), piece.owner, members[flight.source], members[flight.target],
                flight.size, begin + flight.ready, begin + flight.ready, begin + flight.arrives,
                is_result(piece.kind), -1, batch(flight.target, flight.due),
            )
        )  # fmt: skip


def _renamed(piece: Piece, members: tuple[int, ...]) -> Piece:
    return Piece(piece.kind, members[piece.owner], piece.start, piece.stop)


def _attends(
    direction: str, members: tuple[int, ...], rank: int, attend: Attend, start: float, seconds: float, prices: Prices
) -> Iterator[Event]:
    """An event for each piece of keys, which share the attend's time by their pairs."""
    pairs = [pairs_between(prices.layout, prices.mask, attend.q, kv) for kv in attend.kvs]
    q = _renamed(attend.q, members)
    for kv, own in zip(attend.kvs, pairs, strict=True):
        stop = start + seconds * own / max(1, sum(pairs))
        named = _renamed(kv, members)
        owner = visitor(members[rank], q, named).owner
        yield Event(direction, members[rank], attend.step, "attend", f"{q}×{named}", owner, start, stop, own)
        start = stop


def _posting(direction: str, members: tuple[int, ...], rank: int, action: Action, start: float, stop: float) -> Event:
    assert isinstance(action, (Send, Receive))
    arrow = "→" if isinstance(action, Send) else "←"
    label = f"{_renamed(action.piece, members)}{arrow}{members[action.peer]}"
    return Event(direction, members[rank], action.step, "post", label, None, start, stop)
