"""Every rank of a group gives something to every other, all at once: what it gives, and how it goes by sends and receives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from ringspan.attention.landing import Landing, Message
from ringspan.attention.observe import AFTER, BEFORE, Observer, Swap, watch
from ringspan.kernels import Copy, copy_all
from ringspan.transport import Parcel, Pending, Transport, WhenWaited

nothing = WhenWaited(lambda: None)
"""Nothing is under way."""


class Mail(NamedTuple):
    """What goes round.

    Attributes:
        messages: (source, target) to what goes from one to the other, by their places in the group: known to all of them.
        copies: (target, index, tensors) to what fills these with what this rank sends there, its index-th message.
        own: to what this rank gives itself: copied along with what others get.
        room: the first byte in every inbox.
    """

    messages: Callable[[int, int], Sequence[Message]]
    copies: Callable[[int, int, list[Tensor]], Iterable[Copy]]
    own: Callable[[], Iterable[Copy]]
    room: int


Found = dict[int, list[list[Tensor]]]
"""By place of the sender the tensors of its messages, to be read before the next swap."""


Arrived = Callable[[Found, bool], None]
"""Reads what came, as `copy_all` does: by few multiprocessors or not."""

Leaving = Literal["together", "beside", "last"]
"""When something leaves: with the next that does not, beside what is computed next, or when nothing is computed any more."""

Keeping = Literal["beside", "last"]
"""When what landed is kept as well: beside what is computed next, or beside what leaves last."""


@dataclass
class Landed:
    """What a `Landing` has put together.

    Attributes:
        tensors: where they lie until the pass is over; there once `pending` has been waited for.
        kept: the same in this rank's own memory, where that was asked for; there once `keeping` has been waited for, and a swap that
            leaves last.
        pending: what it waits for.
        keeping: what the copies wait for.
    """

    tensors: list[Tensor]
    kept: list[Tensor]
    pending: Pending
    keeping: Pending


class Swapper(Protocol):
    """Carries landings and mails. Every member of the group comes here, with the landings of a pass before its mails."""

    def land(self, stages: Sequence[Sequence[Landing]], keeping: Sequence[Keeping], observer: Observer | None) -> list[list[Landed]]:
        """Sends off what this rank has, what is in the first of `stages` first of all. `keeping`: of each stage, or empty."""
        ...

    def swap(self, mail: Mail, arrived: Arrived, device: torch.device, observer: Observer | None, leaves: Leaving) -> Pending:
        """Sends off what this rank gives. What it returns waits until what came for this rank has been read by `arrived`.

        `leaves`: when, the same on every rank; what leaves together is waited for once the next has been given that does not.
        """
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

    def sizes(self, messages: Callable[[int, int], Sequence[Message]]) -> Swap:
        """What is moved, for who looks on."""
        ways = (
            [(self.members[other], message.nbytes) for other in self.others for message in messages(*pair(other)) if message.nbytes]
            for pair in (lambda other: (self.place, other), lambda other: (other, self.place))
        )
        return Swap(*map(tuple, ways))


class TransportSwapper:
    """By sends and receives of any transport: packed here, and read there where it was received."""

    def __init__(self, transport: Transport, group: Group) -> None:
        self._transport, self._group = transport, group

    def land(self, stages: Sequence[Sequence[Landing]], keeping: Sequence[Keeping], observer: Observer | None) -> list[list[Landed]]:
        """See `Swapper`. What lands is this rank's own."""
        return [[self._land(landing, observer) for landing in stage] for stage in stages]

    def _land(self, landing: Landing, observer: Observer | None) -> Landed:
        place, device, wholes = self._group.place, landing.mine[0].device, []

        def own() -> list[Copy]:
            message = landing.whole(place)
            wholes.extend(torch.empty(shape, dtype=message.dtype, device=device) for shape in message.shapes)
            return landing.put(wholes, place, landing.pieces(place))

        def arrived(found: Found, few: bool) -> None:
            copy_all([copy for source, (came,) in found.items() for copy in landing.put(wholes, source, came)], few)

        mail = Mail(
            lambda source, target: (landing.part(source, target),),
            lambda target, _, segments: list(zip(segments, landing.pieces(target), strict=True)),
            own,
            landing.room,
        )
        pending = self._swap(mail, arrived, device, observer, BEFORE)
        return Landed(wholes, wholes, pending, nothing)

    def swap(self, mail: Mail, arrived: Arrived, device: torch.device, observer: Observer | None, leaves: Leaving) -> Pending:
        """See `Swapper`. Nothing is sent of what is empty."""
        return self._swap(mail, arrived, device, observer, AFTER)

    def _swap(self, mail: Mail, arrived: Arrived, device: torch.device, observer: Observer | None, step: int) -> Pending:
        exchanged = self._exchange(mail, device, observer, step)

        def wait() -> None:
            found = exchanged()
            # There is room for it where what was sent has been.
            copy_all([*mail.own()])
            arrived(found, False)

        return WhenWaited(wait)

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
        swap = None if observer is None else group.sizes(mail.messages)
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


def _room(message: Message, device: torch.device) -> Tensor:
    return torch.empty(message.nbytes, dtype=torch.uint8, device=device)
