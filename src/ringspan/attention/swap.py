"""Every rank of a group gives messages to every other, all at once: by sends and receives, or written into the receiver's memory."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ringspan.attention.inbox import ALIGNMENT
from ringspan.attention.observe import Observer, Swap, watch
from ringspan.transport import Parcel, PeerMemory, Transport

_READY, _FREE = 0, 1
"""The two signals of a message: it is there, and it may come."""


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
        fill: (target, index, tensors): writes what this rank sends there, its index-th message.
    """

    messages: Callable[[int, int], Sequence[Message]]
    fill: Callable[[int, int, list[Tensor]], None]


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
        group = self._group
        found, sends, receives = {}, [], []
        for other in group.others:
            arriving = [(message, _room(message, device)) for message in mail.messages(other, group.place)]
            found[other] = [message.views(room) for message, room in arriving]
            receives += [Parcel(room, group.members[other]) for _, room in arriving if room.numel()]
            for index, message in enumerate(mail.messages(group.place, other)):
                room = _room(message, device)
                mail.fill(other, index, message.views(room))
                sends += [Parcel(room, group.members[other])] if room.numel() else []
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
        """See `Swapper`. A message is written once its receiver is done with what lay there before, and read once all of it is there."""
        group, memory = self._group, self._memory
        swap = None if observer is None else group.sizes(mail)
        memory.begin()
        token = None if observer is None else observer.begin(step, "transfer", swap, _Nothing())
        with watch(observer, step, "post", swap):
            arriving = [other for other in group.others if any(message.nbytes for message in mail.messages(other, group.place))]
            memory.signal([(group.members[other], _FREE) for other in arriving])
            for other in group.others:
                messages, rank = mail.messages(group.place, other), group.members[other]
                if any(message.nbytes for message in messages):
                    memory.wait([(rank, _FREE)])
                    for index, tensors in enumerate(self._views(mail, group.place, other)):
                        mail.fill(other, index, tensors)
                    memory.signal([(rank, _READY)])
                    self._sent[rank] += sum(message.nbytes for message in messages)
        with watch(observer, step, "wait", swap):
            memory.wait([(group.members[other], _READY) for other in arriving])
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


def copy_(target: Tensor, source: Tensor) -> None:
    """`target.copy_(source)`, eight bytes at a time where both let themselves be read so: a fourth of the loads of bfloat16."""
    if target.dtype == source.dtype and _is_in_eights(target) and _is_in_eights(source):
        target, source = target.view(torch.int64), source.view(torch.int64)
    target.copy_(source)


def _is_in_eights(tensor: Tensor) -> bool:
    size = tensor.element_size()
    if size >= 8 or not tensor.numel() or tensor.stride(-1) != 1:
        return False
    steps = (tensor.shape[-1], tensor.storage_offset(), *tensor.stride()[:-1])
    return all(step * size % 8 == 0 for step in steps) and tensor.data_ptr() % 8 == 0


def _room(message: Message, device: torch.device) -> Tensor:
    return torch.empty(message.nbytes, dtype=torch.uint8, device=device)
