"""Every rank of a group gives messages to every other, all at once: by sends and receives, or written into the receiver's memory."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ringspan.attention.inbox import ALIGNMENT
from ringspan.attention.mail import UnderWay
from ringspan.attention.observe import AFTER, BEFORE, Observer, Swap, watch
from ringspan.kernels import Copy, copy_all
from ringspan.transport import Parcel, PeerMemory, Pending, Transport


class Message(NamedTuple):
    """What one message holds: tensors of `shapes`, one after the other, all of `dtype`."""

    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Of all of them."""
        return sum(map(math.prod, self.shapes)) * self.dtype.itemsize

    def views(self, memory: Tensor) -> list[Tensor]:
        """The tensors in the first bytes of `memory`, uint8."""
        flat = memory[: self.nbytes].view(self.dtype)
        sizes = [math.prod(shape) for shape in self.shapes]
        return [part.view(shape) for part, shape in zip(flat.split(sizes), self.shapes, strict=True)]


class Mail(NamedTuple):
    """What goes round.

    Attributes:
        messages: (source, target) to what goes from one to the other, by their places in the group: known to all of them.
        copies: (target, index, tensors) to what fills these with what this rank sends there, its index-th message.
        own: to what this rank gives itself: copied along with what others get.
    """

    messages: Callable[[int, int], Sequence[Message]]
    copies: Callable[[int, int, list[Tensor]], Iterable[Copy]]
    own: Callable[[], Iterable[Copy]]


Found = dict[int, list[list[Tensor]]]
"""By place of the sender the tensors of its messages, to be read before the next swap."""


Arrived = Callable[[Found], None]
"""Reads what came."""


class Swapper(Protocol):
    """Carries a `Mail`. Every member of the group comes here."""

    def swap(self, mail: Mail, arrived: Arrived, device: torch.device, observer: Observer | None, step: int) -> Pending:
        """Sends off what this rank gives. What it returns waits until what came for this rank has been read by `arrived`."""
        ...


@dataclass(frozen=True)
class Group:
    """The ranks that swap.

    Attributes:
        members: ranks of the transport, by place.
        place: this rank's.
    """

    members: tuple[int, ...]
    place: int

    @property
    def others(self) -> list[int]:
        """The places of all others, beginning with the next: lest all write to one at a time."""
        return [(self.place + hops) % len(self.members) for hops in range(1, len(self.members))]

    def sizes(self, mail: Mail) -> Swap:
        """What a swap moves, for who looks on."""
        ways = (
            [(self.members[other], message.nbytes) for other in self.others for message in mail.messages(*pair(other)) if message.nbytes]
            for pair in (lambda other: (self.place, other), lambda other: (other, self.place))
        )
        return Swap(*map(tuple, ways))


class TransportSwapper:
    """By sends and receives of any transport: packed here, and read there where it was received."""

    def __init__(self, transport: Transport, group: Group) -> None:
        self._transport, self._group = transport, group

    def swap(self, mail: Mail, arrived: Arrived, device: torch.device, observer: Observer | None, step: int) -> Pending:
        """See `Swapper`. Nothing is sent of what is empty."""
        exchanged = self._exchange(mail, device, observer, step)

        def wait() -> None:
            found = exchanged()
            # There is room for it where what was sent has been.
            copy_all([*mail.own()])
            arrived(found)

        return _Waiting(wait)

    def _exchange(self, mail: Mail, device: torch.device, observer: Observer | None, step: int) -> Callable[[], Found]:
        """What waits for what came."""
        group = self._group
        found, copies, sends, receives = {}, [], [], []
        for other in group.others:
            arriving = [(message, _room(message, device)) for message in mail.messages(other, group.place)]
            found[other] = [message.views(room) for message, room in arriving]
            receives += [Parcel(room, group.members[other]) for _, room in arriving if room.numel()]
            for index, message in enumerate(mail.messages(group.place, other)):
                room = _room(message, device)
                copies += mail.copies(other, index, message.views(room))
                sends += [Parcel(room, group.members[other])] if room.numel() else []
        copy_all(copies)
        swap = None if observer is None else group.sizes(mail)
        with watch(observer, step, "post", swap):
            pending = self._transport.exchange(sends, receives)
        token = None if observer is None else observer.begin(step, "transfer", swap, pending)
        # What is sent must not be freed before it has left.
        under_way = [(sends, pending)]

        def exchanged() -> Found:
            with watch(observer, step, "wait", swap):
                under_way.pop()[1].wait()
            if observer is not None:
                observer.end(token)
            return found

        return exchanged


class PeerSwapper:
    """Through peer memory: a sender writes into the receiver's inbox, and packs nothing.

    Args:
        memory: of all ranks of the transport, with room in every inbox for what comes.
        sent: counts the bytes that go to each rank.
        group: who swaps.
        aside: whether swaps go on beside what is done meanwhile, one after the other.
        alone: the steps (`BEFORE`, `AFTER`) in which nothing is computed meanwhile: in the others a sender packs first, for copy engines.
    """

    def __init__(
        self, memory: PeerMemory, sent: Counter[int], group: Group, aside: bool = False, alone: Container[int] = (BEFORE, AFTER)
    ) -> None:  # fmt: skip
        self._memory, self._sent, self._group, self._aside, self._alone = memory, sent, group, aside, alone

    def swap(self, mail: Mail, arrived: Arrived, device: torch.device, observer: Observer | None, step: int) -> Pending:
        """See `Swapper`. What others get is written once all are done with what lay there before, and read once all of it is there.

        All ranks meet for that, those of other groups too, which swap at the same time: a launch each. To wait for each other rank by
        itself would take one a rank, and the last of them is waited for in any case.
        """
        # Memory for what came is the caller's stream's, who keeps it.
        own = [*mail.own()]
        if self._aside and observer is None:
            pending = self._memory.beside(partial(self._carry, mail, own, arrived, device, None, step))
            # What is read beside must not be freed before.
            return UnderWay(pending, [mail, own])
        self._memory.begin()
        self._carry(mail, own, arrived, device, observer, step)
        self._memory.end()
        return _Waiting(_nothing)

    def _carry(
        self, mail: Mail, own: list[Copy], arrived: Arrived, device: torch.device, observer: Observer | None, step: int
    ) -> None:  # fmt: skip
        group, memory = self._group, self._memory
        swap = None if observer is None else group.sizes(mail)
        token = None if observer is None else observer.begin(step, "transfer", swap, _Waiting(_nothing))
        with watch(observer, step, "post", swap):
            rooms = {other: self._room(mail, group.place, other) for other in group.others}
            # Beside a kernel, blocks that a link holds up would keep it from the multiprocessors: packed, copy engines can carry it.
            packed = rooms
            if step not in self._alone:
                packed = {other: torch.empty(room.numel(), dtype=torch.uint8, device=device) for other, room in rooms.items()}
            copies: list[Copy] = []
            for other, there in packed.items():
                for index, tensors in enumerate(_views(mail, group.place, other, there)):
                    copies += mail.copies(other, index, tensors)
                if nbytes := sum(message.nbytes for message in mail.messages(group.place, other)):
                    self._sent[group.members[other]] += nbytes
            if packed is rooms:
                memory.meet()
                copy_all([*copies, *own])
            else:
                copy_all([*copies, *own])
                memory.meet()
                for other, room in rooms.items():
                    if room.numel():
                        room.copy_(packed[other])
        with watch(observer, step, "wait", swap):
            memory.meet()
        if observer is not None:
            observer.end(token)
        arrived({other: _views(mail, other, group.place, self._room(mail, other, group.place)) for other in group.others})

    def _room(self, mail: Mail, source: int, target: int) -> Tensor:
        """For what `source` sends to `target`, where it is to lie: after what those of lower places send."""
        sizes = [sum(aligned(message.nbytes) for message in mail.messages(place, target)) for place in range(source + 1) if place != target]
        inbox, stop = self._memory.inbox(self._group.members[target]), sum(sizes)
        assert stop <= inbox.numel(), f"{stop} bytes in an inbox of {inbox.numel()}"
        return inbox[stop - sizes[-1] : stop]


def _views(mail: Mail, source: int, target: int, memory: Tensor) -> list[list[Tensor]]:
    """The tensors of what `source` sends to `target`, one message after the other in `memory`."""
    offset, views = 0, []
    for message in mail.messages(source, target):
        views.append(message.views(memory[offset:]))
        offset += aligned(message.nbytes)
    return views


class _Waiting:
    def __init__(self, wait: Callable[[], None]) -> None:
        self._wait = wait

    def wait(self) -> None:
        """Waits."""
        self._wait()


def _nothing() -> None:
    """Nothing is under way."""


def aligned(nbytes: int) -> int:
    """Where the next message begins."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _room(message: Message, device: torch.device) -> Tensor:
    return torch.empty(message.nbytes, dtype=torch.uint8, device=device)
