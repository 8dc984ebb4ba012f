"""Peer memory between ranks that are threads of one process: the memory that they share anyway."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from ringspan.errors import RankFailure
from ringspan.transport.in_process import InProcessTransport
from ringspan.transport.peers import Passes, Work
from ringspan.transport.protocol import Pending


class _WhenNeeded:
    def __init__(self, arrive: Work) -> None:
        self._arrive = arrive

    def wait(self) -> None:
        self._arrive()


class SharedMemory:
    """Peer memory between in-process ranks, which are threads.

    Args:
        transport: this rank's.
        device: of the tensors.
    """

    channels = 1 << 16

    def __init__(self, transport: InProcessTransport, device: torch.device) -> None:
        self._transport, self._device = transport, device
        self._inboxes: list[Tensor] = []
        self._passes = Passes()
        # The ranks share the first one's lock and signals.
        self._changed, self._set = transport.gather_objects((threading.Condition(), set()))[0]

    def reserve(self, nbytes: int) -> None:
        """See `PeerMemory.reserve`."""
        if not self._inboxes or self._inboxes[0].numel() < nbytes:
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

    def end(self) -> None:
        """See `PeerMemory.end`."""
        self._passes.end()

    def leave(self) -> None:
        """See `PeerMemory.leave`."""
        self._passes.leave()

    def signal(self, peer: int, channel: int) -> None:
        """See `PeerMemory.signal`; one that is still set is an error here, since no message is sent twice before it is read."""
        word = (self._transport.rank, peer, channel)
        with self._changed:
            assert word not in self._set, f"signal {word} was not cleared"
            self._set.add(word)
            self._changed.notify_all()

    def wait(self, peer: int, channel: int) -> None:
        """See `PeerMemory.wait`."""
        world, word = self._transport.world, (peer, self._transport.rank, channel)
        with self._changed:
            deadline = time.monotonic() + world.timeout_seconds
            while word not in self._set:
                if world.failed is not None or peer in world.ended or time.monotonic() > deadline:
                    found = f"rank {world.failed[0]} failed: {world.failed[1]}" if world.failed else f"rank {peer} did not signal"
                    raise RankFailure(f"rank {word[1]} waited for a signal of rank {peer}", found)
                self._changed.wait(0.05)
            self._set.remove(word)

    def aside(self, lane: int, writes: Sequence[Work], arrive: Work) -> Pending:
        """See `PeerMemory.aside`: a thread writes at once, and waits when it needs what arrives."""
        for write in writes:
            write()
        return _WhenNeeded(arrive)
