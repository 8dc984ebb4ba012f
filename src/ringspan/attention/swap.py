"""Every rank of a group gives messages to every other, all at once: by sends and receives, or written into the receiver's memory."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ringspan.attention.inbox import ALIGNMENT
from ringspan.attention.observe import Observer, Swap, watch
from ringspan.kernels import Copy, copy_all
from ringspan.transport import Parcel, PeerMemory, Transport


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


class Swapper(Protocol):
    """Carries a `Mail`. Every member of the group comes here."""

    def swap(self, mail: Mail, device: torch.device, observer: Observer | None, step: int) -> Found:
        """What came for this rank."""
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

    def swap(self, mail: Mail, device: torch.device, observer: Observer | None, step: int) -> Found:
        """See `Swapper`. Nothing is sent of what is empty."""
        found = self._exchanged(mail, device, observer, step)
        # There is room for it where what was sent has been.
        copy_all([*mail.own()])
        return found

    def _exchanged(self, mail: Mail, device: torch.device, observer: Observer | None, step: int) -> Found:
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
        with watch(observer, step, "wait", swap):
            pending.wait()
        if observer is not None:
            observer.end(token)
        return found


class PeerSwapper:
    """Through peer memory: a sender writes into the receiver's inbox, and packs nothing.

    Args:
        memory: of all ranks of the transport, with room in every inbox for what comes.
        sent: counts the bytes that go to each rank.
        group: who swaps.
    """

    def __init__(self, memory: PeerMemory, sent: Counter[int], group: Group) -> None:
        self._memory, self._sent, self._group = memory, sent, group

    def swap(self, mail: Mail, device: torch.device, observer: Observer | None, step: int) -> Found:
        """See `Swapper`. What others get is written once all are done with what lay there before, and read once all of it is there.

        All ranks meet for that, those of other groups too, which swap at the same time: a launch each. To wait for each other rank by
        itself would take one a rank, and the last of them is waited for in any case.
        """
        group, memory = self._group, self._memory
        swap = None if observer is None else group.sizes(mail)
        memory.begin()
        token = None if observer is None else observer.begin(step, "transfer", swap, _Nothing())
        with watch(observer, step, "post", swap):
            memory.meet()
            copies: list[Copy] = []
            for other in group.others:
                for index, tensors in enumerate(self._views(mail, group.place, other)):
                    copies += mail.copies(other, index, tensors)
                if nbytes := sum(message.nbytes for message in mail.messages(group.place, other)):
                    self._sent[group.members[other]] += nbytes
            copy_all([*copies, *mail.own()])
        with watch(observer, step, "wait", swap):
            memory.meet()
        memory.end()
        if observer is not None:
            observer.end(token)
        return {other: self._views(mail, other, group.place) for other in group.others}

    def _views(self, mail: Mail, source: int, target: int) -> list[list[Tensor]]:
        """What `source` has sent to `target`, where it lies: after what those of lower places have."""
        inbox, offset, views = self._memory.inbox(self._group.members[target]), 0, []
        for place in range(source + 1):
            for message in mail.messages(place, target) if place != target else ():
                if place == source:
                    views.append(message.views(inbox[offset:]))
                offset += aligned(message.nbytes)
        assert offset <= inbox.numel(), f"{offset} bytes in an inbox of {inbox.numel()}"
        return views


class _Nothing:
    def wait(self) -> None:
        """Nothing is under way."""


def aligned(nbytes: int) -> int:
    """Where the next message begins."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _room(message: Message, device: torch.device) -> Tensor:
    return torch.empty(message.nbytes, dtype=torch.uint8, device=device)
