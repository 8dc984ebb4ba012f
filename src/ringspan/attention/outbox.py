"""Where in peer memory each transfer of a schedule lies, and who tells whom that it is there: integers alone, the same on every rank.

Every rank has an outbox that the others read. A rank writes what it sends into its outbox and signals `ready` to each reader; a reader
copies it out and signals `free`. All of it follows from the schedule: no rank asks another where something lies. One message is what
one batch brings from one rank to another; each has a signal of its own, so that none waits for another.

Inputs that a rank owns (kv, q, do) have one place for the whole pass, whoever reads them. What is passed on and results have a place
from the step in which they are posted to that in which they are due, and then others may have it, once its readers are done.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ringspan.attention.program import LANES, Batch, rank_batches, sent_spans
from ringspan.schedule import Piece, Schedule

ALIGNMENT = 256
"""Places begin at multiples of so many bytes: copy engines and kernels like it."""

RowBytes = Mapping[str, tuple[int, ...]]
"""For each kind of piece the bytes of one row of each of its components, as it travels."""


@dataclass(frozen=True)
class Place:
    """Rows of one component of one piece: `nbytes` from `offset` on, in the outbox of the rank that sends it."""

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
        awaited: messages whose readers must be done before anything is written.
        written: for each send the places of its components.
        ready: messages that are then there.
        read: messages to be read, each with, for each of its receives, the index in the batch and the places in the sender's outbox.
    """

    awaited: tuple[Message, ...]
    written: tuple[tuple[Place, ...], ...]
    ready: tuple[Message, ...]
    read: tuple[tuple[Message, tuple[tuple[int, tuple[Place, ...]], ...]], ...]


@dataclass(frozen=True)
class Outbox:
    """One rank's part of a pass through peer memory.

    Attributes:
        nbytes: the size of the largest outbox of any rank.
        messages: the largest number of messages from one rank to another.
        own: where this rank's own inputs lie, by kind: the first row of the span, and the places of its components.
        postings: by index of the batch.
        awaited: messages whose readers must be done before the pass is over.
    """

    nbytes: int
    messages: int
    own: Mapping[str, tuple[int, tuple[Place, ...]]]
    postings: tuple[Posting, ...]
    awaited: tuple[Message, ...]


@dataclass(frozen=True)
class _Taken:
    start: int
    stop: int
    due: int
    message: Message


@dataclass(frozen=True)
class _Side:
    """What one rank writes: the places of each send by (batch, piece, peer), and what it waits for."""

    batches: tuple[Batch, ...]
    places: Mapping[tuple[int, Piece, int], tuple[Place, ...]]
    own: Mapping[str, tuple[int, tuple[Place, ...]]]
    messages: Mapping[tuple[int, int], int]
    awaited: Mapping[int, tuple[Message, ...]]
    left: tuple[Message, ...]
    nbytes: int


def outbox(schedule: Schedule, rank: int, row_bytes: RowBytes, single_row_bytes: RowBytes | None = None) -> Outbox:
    """The part of `rank` in a pass of `schedule` through peer memory; `single_row_bytes` are those of results of one attend."""
    sides = [_side(schedule, other, row_bytes, single_row_bytes or row_bytes) for other in range(schedule.num_ranks)]
    mine = sides[rank]
    postings = []
    met: Counter[int] = Counter()
    for batch in mine.batches:
        written = tuple(mine.places[(batch.index, send.piece, send.peer)] for send in batch.sends)
        targets = sorted({send.peer for send in batch.sends})
        ready = tuple(Message(peer, mine.messages[(batch.index, peer)]) for peer in targets)
        read = []
        for source in sorted({receive.peer for receive in batch.receives}):
            index, met[source] = met[source], met[source] + 1
            theirs = next(number for (number, peer), message in sides[source].messages.items() if (peer, message) == (rank, index))
            parts = tuple(
                (position, sides[source].places[(theirs, receive.piece, rank)])
                for position, receive in enumerate(batch.receives)
                if receive.peer == source
            )
            read.append((Message(source, index), parts))
        postings.append(Posting(mine.awaited.get(batch.index, ()), written, ready, tuple(read)))
    most = max((message + 1 for side in sides for message in side.messages.values()), default=0)
    return Outbox(max(side.nbytes for side in sides), most, mine.own, tuple(postings), mine.left)


def _side(schedule: Schedule, rank: int, row_bytes: RowBytes, single_row_bytes: RowBytes) -> _Side:
    actions = schedule.programs[rank]
    by_step = rank_batches(actions)
    end = 0
    own: dict[str, tuple[int, tuple[Place, ...]]] = {}
    for kind, (start, stop) in sorted(sent_spans(actions, rank).items()):
        places, end = _laid_out(end, stop - start, row_bytes[kind])
        own[kind] = (start, places)
    taken: list[_Taken] = []
    places_of: dict[tuple[int, Piece, int], tuple[Place, ...]] = {}
    messages: dict[tuple[int, int], int] = {}
    awaited: dict[int, tuple[Message, ...]] = {}
    sent: Counter[int] = Counter()
    open_messages: dict[Message, None] = {}
    nbytes = end
    for step, batches in sorted(by_step.items()):
        for batch in batches:
            waits: list[Message] = []
            for peer in sorted({send.peer for send in batch.sends}):
                messages[(batch.index, peer)] = sent[peer]
                sent[peer] += 1
            for send in batch.sends:
                message = Message(send.peer, messages[(batch.index, send.peer)])
                piece = send.piece
                if piece.owner == rank and LANES[piece.kind] == 0:
                    first, whole = own[piece.kind]
                    parts = zip(whole, row_bytes[piece.kind], strict=True)
                    places = tuple(Place(part.offset + (piece.start - first) * size, len(piece) * size) for part, size in parts)
                else:
                    widths = (single_row_bytes if (rank, send) in schedule.singles else row_bytes)[piece.kind]
                    size = _laid_out(0, len(piece), widths)[1]
                    start = _free_place(end, size, [entry for entry in taken if entry.due > step])
                    for entry in taken:
                        if entry.due <= step and entry.start < start + size and start < entry.stop and entry.message in open_messages:
                            waits.append(entry.message)
                            del open_messages[entry.message]
                    taken.append(_Taken(start, start + size, batch.due, message))
                    places, _ = _laid_out(start, len(piece), widths)
                    nbytes = max(nbytes, start + size)
                places_of[(batch.index, piece, send.peer)] = places
            for peer in sorted({send.peer for send in batch.sends}):
                open_messages[Message(peer, messages[(batch.index, peer)])] = None
            awaited[batch.index] = tuple(waits)
    flat = tuple(batch for _, batches in sorted(by_step.items()) for batch in batches)
    return _Side(flat, places_of, own, messages, awaited, tuple(open_messages), nbytes)


def _laid_out(start: int, rows: int, row_bytes: tuple[int, ...]) -> tuple[tuple[Place, ...], int]:
    """The places of the components of `rows` rows from `start` on, and where they end."""
    places = []
    for size in row_bytes:
        places.append(Place(start, rows * size))
        start += -(-rows * size // ALIGNMENT) * ALIGNMENT
    return tuple(places), start


def _free_place(base: int, size: int, taken: list[_Taken]) -> int:
    """The lowest place of `size` bytes from `base` on that meets none of `taken`."""
    start = base
    for stop in _stops(base, taken):
        if all(entry.stop <= stop or stop + size <= entry.start for entry in taken):
            return stop
        start = max(start, stop)
    raise AssertionError("behind everything that is taken there is room")


def _stops(base: int, taken: list[_Taken]) -> Iterator[int]:
    yield base
    yield from sorted(entry.stop for entry in taken)
