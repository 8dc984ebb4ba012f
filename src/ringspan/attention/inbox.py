"""Where in peer memory each transfer of a schedule lands, and who tells whom that it is there: integers alone, the same on every rank.

Every rank has an inbox that the others write to. A rank signals `free` to a sender once a place may be written; the sender copies into it
what it has at hand and signals `ready`. All of it follows from the schedule: no rank asks another where something goes. One message is
what one batch brings from one rank to another; each has signals of its own, so that none waits for another.

A kernel reads what arrived where it lies. A place is taken from the step in which its piece is posted to the last in which that is read,
and for one step more: then the next sender need not wait for whoever has just read.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ringspan.attention.observe import BEFORE
from ringspan.attention.program import Batch, rank_batches
from ringspan.schedule import Piece, Receive, Schedule, Send, lifetimes
from ringspan.strategies.once import once

ALIGNMENT = 256
"""Places begin at multiples of so many bytes: copy engines and kernels like it."""

RowBytes = Mapping[str, tuple[int, ...]]
"""For each kind of piece the bytes of one row of each of its components, as it travels."""

_Items = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Place:
    """Rows of one component of one piece: `nbytes` from `offset` on, in the inbox of the rank that receives it."""

    offset: int
    nbytes: int


@dataclass(frozen=True)
class Message:
    """The `index`-th message between two ranks, one of which is `peer`."""

    peer: int
    index: int


@dataclass(frozen=True)
class Posting:
    """What one rank does to post one batch.

    Attributes:
        written: messages to be written once they are free, and then ready; each with, for each of its sends, the index in the batch and
            the places in the peer's inbox.
        places: for each receive the places in this rank's inbox.
        awaited: messages that are ready when all has arrived.
    """

    written: tuple[tuple[Message, tuple[tuple[int, tuple[Place, ...]], ...]], ...]
    places: tuple[tuple[Place, ...], ...]
    awaited: tuple[Message, ...]


@dataclass(frozen=True)
class Inbox:
    """One rank's part of a pass through peer memory.

    Attributes:
        nbytes: the size of the largest inbox of any rank.
        messages: the largest number of messages from one rank to another.
        postings: by index of the batch.
        freed: by step, and `BEFORE` the first, the messages that this rank lets come once it has done it.
    """

    nbytes: int
    messages: int
    postings: tuple[Posting, ...]
    freed: Mapping[int, tuple[Message, ...]]


@dataclass(frozen=True)
class _Taken:
    start: int
    stop: int
    last: int


@dataclass(frozen=True)
class _Side:
    """What one rank receives: places by (batch, sender, piece), messages by (batch, sender), and when it lets them come."""

    batches: tuple[Batch, ...]
    places: Mapping[tuple[int, int, Piece], tuple[Place, ...]]
    messages: Mapping[tuple[int, int], Message]
    batch_of: Mapping[Message, int]
    freed: Mapping[int, tuple[Message, ...]]
    nbytes: int


def inbox(schedule: Schedule, rank: int, row_bytes: RowBytes, single_row_bytes: RowBytes | None = None) -> Inbox:
    """The part of `rank` in a pass of `schedule` through peer memory; `single_row_bytes` are those of results of one attend."""
    sides = _sides(schedule, tuple(row_bytes.items()), tuple((single_row_bytes or row_bytes).items()))
    mine = sides[rank]
    postings = []
    sent: Counter[int] = Counter()
    for batch in mine.batches:
        written = []
        # Each rank begins with another, lest all write to one at a time.
        for target in sorted({send.peer for send in batch.sends}, key=lambda peer: (peer - rank) % schedule.num_ranks):
            message, sent[target] = Message(target, sent[target]), sent[target] + 1
            there = sides[target].batch_of[Message(rank, message.index)]
            parts = tuple(
                (position, sides[target].places[(there, rank, send.piece)])
                for position, send in enumerate(batch.sends)
                if send.peer == target
            )
            written.append((message, parts))
        places = tuple(mine.places[(batch.index, receive.peer, receive.piece)] for receive in batch.receives)
        awaited = tuple(mine.messages[(batch.index, source)] for source in sorted({receive.peer for receive in batch.receives}))
        postings.append(Posting(tuple(written), places, awaited))
    most = max((message.index + 1 for side in sides for message in side.messages.values()), default=0)
    return Inbox(max(side.nbytes for side in sides), most, tuple(postings), mine.freed)


@once(maxsize=64)
def _sides(schedule: Schedule, row_bytes: _Items, single_row_bytes: _Items) -> tuple[_Side, ...]:
    return tuple(_side(schedule, rank, dict(row_bytes), dict(single_row_bytes)) for rank in range(schedule.num_ranks))


def _side(schedule: Schedule, rank: int, row_bytes: RowBytes, single_row_bytes: RowBytes) -> _Side:
    actions = schedule.programs[rank]
    needed = dict(lifetimes(actions))
    taken: list[_Taken] = []
    places: dict[tuple[int, int, Piece], tuple[Place, ...]] = {}
    messages: dict[tuple[int, int], Message] = {}
    freed: dict[int, list[Message]] = defaultdict(list)
    met: Counter[int] = Counter()
    nbytes = 0
    flat = tuple(batch for _, batches in sorted(rank_batches(actions).items()) for batch in batches)
    for batch in flat:
        free_after: dict[int, int] = {}
        for members in ([batch.receives[index] for index in group] for group in batch.neighbours):
            widths = (single_row_bytes if _is_single(schedule, rank, members[0]) else row_bytes)[members[0].piece.kind]
            rows = [len(receive.piece) for receive in members]
            size = _laid_out(0, rows, widths)[1]
            start = _free_place(size, [entry for entry in taken if entry.last >= members[0].step - 1])
            before = max((entry.last for entry in taken if entry.start < start + size and start < entry.stop), default=BEFORE)
            for receive, laid_out in zip(members, _laid_out(start, rows, widths)[0], strict=True):
                free_after[receive.peer] = max(free_after.get(receive.peer, BEFORE), before)
                places[(batch.index, receive.peer, receive.piece)] = laid_out
            taken.append(_Taken(start, start + size, max(needed[receive] for receive in members)))
            nbytes = max(nbytes, start + size)
        for source, step in sorted(free_after.items()):
            message, met[source] = Message(source, met[source]), met[source] + 1
            messages[(batch.index, source)] = message
            freed[step].append(message)
    batch_of = {message: batch for (batch, _), message in messages.items()}
    return _Side(flat, places, messages, batch_of, {step: tuple(found) for step, found in freed.items()}, nbytes)


def _is_single(schedule: Schedule, rank: int, receive: Receive) -> bool:
    return (receive.peer, Send(receive.step, receive.piece, rank, receive.due)) in schedule.singles


def _laid_out(start: int, rows: Sequence[int], row_bytes: tuple[int, ...]) -> tuple[list[tuple[Place, ...]], int]:
    """From `start` on the places of the components of pieces of so many rows, all first ones, then all second; and where they end."""
    components = []
    for size in row_bytes:
        places = []
        for count in rows:
            places.append(Place(start, count * size))
            start += -(-count * size // ALIGNMENT) * ALIGNMENT
        components.append(places)
    return list(zip(*components, strict=True)), start


def _free_place(size: int, taken: list[_Taken]) -> int:
    """The lowest place of `size` bytes that meets none of `taken`."""
    return next(start for start in _starts(taken) if all(entry.stop <= start or start + size <= entry.start for entry in taken))


def _starts(taken: list[_Taken]) -> Iterator[int]:
    yield 0
    yield from sorted(entry.stop for entry in taken)
