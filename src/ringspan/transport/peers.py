"""What peer memory is: an inbox of each rank that all others write to, and signals between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from ringspan.errors import RingspanError
from ringspan.transport.protocol import Pending

Work = Callable[[], None]
Words = Sequence[tuple[int, int]]
"""Signals, each as (peer, channel)."""


class PeerMemory(Protocol):
    """One rank's view of the inboxes of all ranks, and of the signals between them.

    A signal is a word that one rank sets and another waits for and clears; setting one that is still set waits.

    Attributes:
        channels: how many signals there are from each rank to each other.
        links_rest: whether links join the ranks that take less power when nobody uses them for a while: NVLink's.
    """

    channels: int
    links_rest: bool

    def reserve(self, nbytes: int) -> None:
        """Makes every inbox at least so large. Collective, with the same number on every rank, and between passes."""
        ...

    def inbox(self, rank: int) -> Tensor:
        """The inbox of `rank`, uint8. Others write where it has said that they may."""
        ...

    def rank_of(self, member: int) -> int:
        """The rank of the transport that `member` is here."""
        ...

    def begin(self) -> None:
        """A pass begins on the current stream: after the one before, whose stream may have been another.

        Raises:
            RingspanError: where the one before did not come to its end.
        """
        ...

    def end(self) -> None:
        """The pass is over: all its signals have been set and cleared, or are about to be."""
        ...

    def leave(self, held: object) -> None:
        """An error ends a pass, or what is done in several between two of them: whoever else is in the next would take another for it.

        What is done aside and beside goes on, whenever peers let it. `held`: what it reads and writes, which is kept for good.
        """
        ...

    def signal(self, words: Words) -> None:
        """Sets a signal to each peer, after what the current stream has done until here."""
        ...

    def wait(self, words: Words) -> None:
        """Holds up the current stream until the signals from these peers are set, and clears them."""
        ...

    def meet(self) -> None:
        """All ranks come here, and none goes on before what all others' current streams have done until here."""
        ...

    def aside(self, lane: int, room: Work, writes: Sequence[Work], arrive: Work) -> Pending:
        """Has all done beside what follows; what it returns waits until they are.

        Args:
            lane: what is written by several calls on the same one is written in turn, and what arrives is awaited in turn.
            room: before all writes: waits for room that peers give without waiting for `arrive`.
            writes: none waits for another.
            arrive: waits for what peers write.
        """
        ...

    def beside(self, lane: str, work: Work, after: Sequence[Pending] = ()) -> Pending:
        """Has `work` done beside what follows, on every rank in the same order. What it returns waits until it is done.

        It comes after what the current stream has done until here, `after`, and all work before it on the same lane; and it goes
        before the blocks of a kernel that have not begun.
        """
        ...


class Passes:
    """Whether a pass is under way: one that an error has left keeps its signals set, and the next would take them for its own."""

    def __init__(self) -> None:
        self._under_way = False
        self._held: list[object] = []

    def begin(self) -> None:
        if self._under_way:
            raise RingspanError(
                "attention through peer memory",
                "an error left the attention before this one in the middle, and what it signalled to other ranks still stands",
                "A pass relies on the signals of its own alone",
                "a new process group on every rank (torch.distributed.new_group), or transport='process_group'",
            )
        self._under_way = True

    def end(self) -> None:
        self._under_way = False

    def leave(self, held: object) -> None:
        self._under_way = True
        self._held.append(held)
