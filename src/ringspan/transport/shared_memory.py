"""Peer memory between ranks that are threads of one process: the memory that they share anyway."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from ringspan.errors import RankFailure
from ringspan.transport.in_process import InProcessTransport, follow, recorded
from ringspan.transport.peers import Passes, Words, Work
from ringspan.transport.protocol import Pending, WhenWaited


class SharedMemory:
    """Peer memory between in-process ranks, which are threads.

    Args:
        transport: this rank's.
        device: of the tensors.
    """

    channels = 1 << 16
    links_rest = False
    """There are none."""

    def __init__(self, transport: InProcessTransport, device: torch.device) -> None:
        self._transport, self._device = transport, device
        self._inboxes: list[Tensor] = []
        self._meetings = 0
        self._passes = Passes()
        # Of the pass before, and of each lane: what else is done may be another stream's.
        self._over: torch.cuda.Event | None = None
        self._lanes: dict[int | str, torch.cuda.Event | None] = {}
        # The ranks share the first one's lock, and signals that are set, each with what it comes after on a GPU.
        self._changed, self._set = transport.gather_objects((threading.Condition(), {}))[0]

    def reserve(self, nbytes: int) -> None:
        """See `PeerMemory.reserve`."""
        if not self._inboxes or self._inboxes[0].numel() < nbytes:
            if self._device.type == "cuda":
                # What is still done with the old ones.
                torch.cuda.synchronize(self._device)
            self._inboxes = self._transport.gather_objects(torch.empty(nbytes, dtype=torch.uint8, device=self._device))

    def inbox(self, rank: int) -> Tensor:
        """See `PeerMemory.inbox`."""
        return self._inboxes[rank]

    def rank_of(self, member: int) -> int:
        """See `PeerMemory.rank_of`: itself."""
        return member

    def begin(self) -> None:
        """See `PeerMemory.begin`."""
        self._passes.begin()
        follow(self._over, self._device)

    def end(self) -> None:
        """See `PeerMemory.end`."""
        self._passes.end()
        self._over = recorded(self._device)

    def leave(self, held: object) -> None:
        """See `PeerMemory.leave`."""
        self._passes.leave(held)

    def signal(self, words: Words) -> None:
        """See `PeerMemory.signal`; one that is still set is an error here, since no message is sent twice before it is read."""
        with self._changed:
            done = recorded(self._device)
            for peer, channel in words:
                word = (self._transport.rank, peer, channel)
                assert word not in self._set, f"signal {word} was not cleared"
                self._set[word] = done
            self._changed.notify_all()

    def wait(self, words: Words) -> None:
        """See `PeerMemory.wait`."""
        for peer, channel in words:
            self._wait(peer, channel)

    def _wait(self, peer: int, channel: int) -> None:
        world, word = self._transport.world, (peer, self._transport.rank, channel)
        with self._changed:
            deadline = time.monotonic() + world.timeout_seconds
            while word not in self._set:
                if world.failed is not None or peer in world.ended or time.monotonic() > deadline:
                    found = f"rank {world.failed[0]} failed: {world.failed[1]}" if world.failed else f"rank {peer} did not signal"
                    raise RankFailure(f"rank {word[1]} waited for a signal of rank {peer}", found)
                self._changed.wait(0.05)
            done = self._set.pop(word)
        follow(done, self._device)

    def meet(self) -> None:
        """See `PeerMemory.meet`."""
        # Whoever is at the next may be there before all others have seen that it was at this one: of two signals each has its turn.
        self._meetings += 1
        channel, others = self.channels + self._meetings % 2, [r for r in range(self._transport.size) if r != self._transport.rank]
        self.signal([(other, channel) for other in others])
        self.wait([(other, channel) for other in others])

    def aside(self, lane: int, room: Work, writes: Sequence[Work], arrive: Work) -> Pending:
        """See `PeerMemory.aside`: a thread writes at once, and waits when it needs what arrives."""

        def write() -> None:
            room()
            for each in writes:
                each()

        return self._at_once(lane, write, arrive)

    def beside(self, lane: str, work: Work, after: Sequence[Pending] = ()) -> Pending:
        """See `PeerMemory.beside`: done at once."""
        for pending in after:
            pending.wait()
        return self._at_once(lane, work, lambda: None)

    def _at_once(self, lane: int | str, work: Work, arrive: Work) -> Pending:
        """`work()`, on the current stream; who waits, and what is next on the lane, comes after it."""
        follow(self._lanes.get(lane), self._device)
        work()
        done = self._lanes[lane] = recorded(self._device)

        def wait() -> None:
            follow(done, self._device)
            arrive()

        return WhenWaited(wait)
