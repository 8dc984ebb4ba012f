"""Puts together what the ranks recorded: their parts on one time axis, and every transfer from both of its ends."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ringspan.attention.observe import AFTER, BEFORE, Swap
from ringspan.attention.program import Batch, Launch
from ringspan.geometry import HeadShare, head_shares
from ringspan.schedule import Combine, Piece, PieceBytes
from ringspan.schedule.draw import is_result, visitor
from ringspan.strategies import Machine, Schedules
from ringspan.trace.recorder import Mark
from ringspan.trace.timeline import DIRECTIONS, Event, Flight, Timeline

_BLOCKED_SECONDS = 50e-6
"""A wait shorter than this may be the call itself: what was waited for had come before."""


@dataclass(frozen=True)
class RankRecord:
    """What one rank observed.

    Attributes:
        rank: whose.
        members: for each rank that its schedules speak of, which rank of all it is: others only where positions are exchanged for heads.
        marks: everything.
        ahead: how far its clock is ahead of rank 0's, in seconds.
    """

    rank: int
    members: tuple[int, ...]
    marks: tuple[Mark, ...]
    ahead: float = 0.0


@dataclass(frozen=True)
class _End:
    """One end of a transfer: posting it began at `begun` and was done at `posted`."""

    begun: float
    posted: float
    over: float
    arrived: float | None
    batch: int
    size: int
    step: int
    owner: int
    home: bool


_Key = tuple[str, str, int, int]
"""(direction, piece, source, target)."""


def measured_timeline(
    records: list[RankRecord], schedules: Schedules, sizes: PieceBytes, machine: Machine, *, copied: bool = False
) -> Timeline:
    """The timeline of what `records` (of all ranks, in order) say.

    Args:
        records: one of each rank.
        schedules: what ran.
        sizes: of attention's tensors, with all heads.
        machine: tells how long a transfer takes that had arrived before anybody waited for it.
        copied: whether the receiver itself fetches what was sent, while it waits: ranks that are threads of one process.
    """
    steps = {"forward": schedules.forward.num_steps, "backward": schedules.backward.num_steps}
    zero = {
        direction: min(
            (mark.start - record.ahead for record in records for mark in record.marks if mark.direction == direction), default=0.0
        )
        for direction in DIRECTIONS
    }
    events: list[Event] = []
    ends: dict[bool, dict[_Key, list[_End]]] = {True: defaultdict(list), False: defaultdict(list)}
    for record in records:
        widths = _share(schedules, sizes, record.rank)
        begun = {(mark.direction, mark.batch): mark.start for mark in record.marks if mark.kind == "post"}
        for mark in record.marks:
            shift = record.ahead + zero[mark.direction]
            step = {BEFORE: -1, AFTER: steps[mark.direction]}.get(mark.step, mark.step)
            if mark.kind != "transfer":
                events.append(_event(record, mark, step, shift))
                continue
            arrived = None if mark.arrived is None else mark.arrived - shift
            for sent, label, owner, home, peer, size in _parcels(record, mark, widths):
                first = begun.get((mark.direction, mark.batch), mark.start)
                end = _End(first - shift, mark.start - shift, mark.stop - shift, arrived, mark.batch, size, step, owner, home)
                source, target = (record.rank, peer) if sent else (peer, record.rank)
                ends[sent][(mark.direction, label, source, target)].append(end)
    events.sort(key=lambda event: (event.direction != "forward", event.start, event.rank))
    waits = {(event.direction, event.rank, event.batch): event for event in events if event.kind == "wait"}
    flights = []
    for key, received in ends[False].items():
        # Where one piece goes the same way twice, the first is the first.
        for out, into in zip(ends[True][key], received, strict=True):
            flights.append(_flight(key, out, into, waits.get((key[0], key[3], into.batch)), machine, copied))
    flights.sort(key=lambda flight: (flight.direction != "forward", flight.ready, flight.target))
    return Timeline(len(records), steps, tuple(events), tuple(flights))


def _event(record: RankRecord, mark: Mark, step: int, shift: float) -> Event:
    label, owner, pairs = "", None, 0
    if isinstance(mark.what, Launch):
        tile, members = mark.what.tile, record.members
        q = Piece("q", members[mark.what.q_owner], tile.q_start, tile.q_stop)
        keys = [_renamed(piece, members) for piece in mark.what.keys]
        label, owner, pairs = f"{q}×{'+'.join(map(str, keys))}", visitor(record.rank, q, keys[0]).owner, mark.what.pairs
    elif isinstance(mark.what, Combine):
        piece = _renamed(mark.what.piece, record.members)
        label, owner = f"+{piece}←{record.members[mark.what.peer]}", piece.owner
    elif isinstance(mark.what, Batch):
        moving = [(f"{_renamed(send.piece, record.members)}→{record.members[send.peer]}") for send in mark.what.sends]
        moving += [(f"{_renamed(receive.piece, record.members)}←{record.members[receive.peer]}") for receive in mark.what.receives]
        label = " ".join(moving)
    elif isinstance(mark.what, Swap):
        label = "positions for heads"
    batch = mark.batch if mark.kind == "wait" else -1
    return Event(mark.direction, record.rank, step, mark.kind, label, owner, mark.start - shift, mark.stop - shift, pairs, batch)


def _renamed(piece: Piece, members: tuple[int, ...]) -> Piece:
    return Piece(piece.kind, members[piece.owner], piece.start, piece.stop)


def _parcels(record: RankRecord, mark: Mark, sizes: PieceBytes) -> Iterator[tuple[bool, str, int, bool, int, int]]:
    """(sent, label, owner, home, peer, bytes) of everything in a transfer."""
    if isinstance(mark.what, Swap):
        for sent, parcels in ((True, mark.what.sends), (False, mark.what.receives)):
            for peer, size in parcels:
                yield sent, "heads", record.rank if sent else peer, mark.step == AFTER, peer, size
    elif isinstance(mark.what, Batch):
        for sent, transfers in ((True, mark.what.sends), (False, mark.what.receives)):
            for transfer in transfers:
                piece = _renamed(transfer.piece, record.members)
                size = len(piece) * (sizes.of_single if transfer in mark.what.singles else sizes.of)(piece.kind)
                yield sent, str(piece), piece.owner, is_result(piece.kind), record.members[transfer.peer], size


def _share(schedules: Schedules, sizes: PieceBytes, rank: int) -> PieceBytes:
    """What a position weighs with the heads that `rank` computes."""
    if schedules.grid is None:
        return sizes
    share: HeadShare = head_shares(sizes.heads, sizes.kv_heads, schedules.grid.degree)[schedules.grid.place(rank)]
    return replace(sizes, heads=share.heads, kv_heads=share.kv_heads)


def _flight(key: _Key, out: _End, into: _End, wait: Event | None, machine: Machine, copied: bool) -> Flight:
    """When a transfer was under way, as well as it can be told.

    It begins when both ends have posted it; what had come before the sender was back from posting it, when both had begun to. Where a GPU
    told when it had come, that is its end; where the receiver was blocked, the end of its wait is. Else it had come at some time before,
    and what it should take by the machine's rates is taken for what it took.
    """
    direction, label, source, target = key
    ready = max(out.posted, into.posted)
    start, stop = ready, into.over
    priced = machine.latency_seconds + into.size / machine.link_bytes_per_second
    if copied:
        start = max(ready, wait.start) if wait is not None else ready
    elif into.arrived is not None:
        stop = into.arrived
    elif wait is not None and wait.seconds <= max(_BLOCKED_SECONDS, priced / 10):
        stop = min(wait.start, ready + priced)
    if stop < ready:
        ready = start = min(stop, max(out.begun, into.begun))
    return Flight(
        direction, out.step, label, into.owner, source, target, into.size, ready, start, max(stop, start), into.home, out.batch, into.batch
    )
