"""Peer memory between the GPUs of one host: PyTorch's symmetric memory, over NVLink.

Copies into a peer's memory are made by copy engines on a stream of their own and take no multiprocessor from attention. Signals are one
word each. No multicast.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ringspan.errors import RingspanError
from ringspan.kernels import signal_kernels
from ringspan.transport.peers import Passes, Words, Work
from ringspan.transport.process_group import ProcessGroupTransport
from ringspan.transport.protocol import Pending

BRANCHES = (2, 1)
"""How many messages of each lane are written at a time in a CUDA graph: while one waits for its signals the link carries another. With what
arrives on both, attention's own and the calls beside it there are seven branches; they share eight queues of the hardware, and one that
queues before what it waits for waits for ever."""


class _Aside:
    """What streams do beside the current one, which is done at all `events`."""

    def __init__(self, events: list[torch.cuda.Event], index: int) -> None:
        self._events, self._index = events, index

    @property
    def works(self) -> list[Pending]:
        """Itself: any stream may wait for it as well, any number of times."""
        return [self]

    def wait(self) -> None:
        current = torch.cuda.current_stream(self._index)
        for event in self._events:
            current.wait_event(event)


class SymmetricMemory:
    """Peer memory between the GPUs of one host.

    Args:
        transport: the process group.
        device: this rank's GPU.
        links_rest: see `PeerMemory`.
    """

    def __init__(self, transport: ProcessGroupTransport, device: torch.device, links_rest: bool) -> None:
        import torch.distributed._symmetric_memory as symmetric_memory

        self._module, self.links_rest = symmetric_memory, links_rest
        self._transport, self._device, self._size = transport, device, transport.size
        # As a number: torch takes some microseconds to read it off a device, and short sequences are launched in few.
        self._index = torch.cuda.current_device() if device.index is None else device.index
        # One is for meetings alone: where NVLink multicast is on, torch may count in its words who has come.
        self.channels = symmetric_memory.get_signal_pad_size() // (4 * transport.size) - 1
        self._inboxes: list[Tensor] = []
        self._addresses: dict[tuple[str, tuple[tuple[int, int], ...]], Tensor] = {}
        self._mine: Any = None
        self._handle: Any = None
        self._nbytes = 0
        # Inboxes that a captured CUDA graph reads and writes live as long as this: it may be replayed.
        self._captured, self._retired = False, []
        self._streams: dict[str, torch.cuda.Stream] = {}
        self._before: torch.cuda.Stream | None = None
        self._passes = Passes()
        self._timeout_ms = transport.timeout_ms
        self.reserve(1 << 21)

    def reserve(self, nbytes: int) -> None:
        """See `PeerMemory.reserve`."""
        if self._inboxes and self._inboxes[0].numel() >= nbytes:
            return
        # Nobody writes to an old inbox any more: a pass ends when all has come, and all ranks are between passes.
        torch.cuda.synchronize(self._device)
        before, held = self._nbytes, (self._mine, self._handle, self._inboxes, self._addresses) if self._captured else None
        try:
            # By a quarter at least, so that lengths that rise slowly do not bring a new one each; the old one goes first.
            self._make_inboxes(max(nbytes, before + before // 4))
        except RingspanError:
            # What was planned before relies on what there was: whoever is refused may go on with that.
            if held is not None:
                (self._mine, self._handle, self._inboxes, self._addresses), self._nbytes, self._captured = held, before, True
            elif before:
                self._make_inboxes(before)
            raise
        if held is not None:
            self._retired.append(held)

    def _make_inboxes(self, nbytes: int) -> None:
        self._inboxes, self._mine, self._handle, self._captured, self._nbytes = [], None, None, False, 0
        self._addresses = {}
        nbytes, problem = -(-nbytes >> 21) << 21, None
        try:
            self._mine = self._module.empty(nbytes, dtype=torch.uint8, device=self._device)
        except RuntimeError as error:
            problem = str(error).splitlines()[0]
        # Whoever has none must not leave the others in the rendezvous.
        for rank, reason in enumerate(self._transport.gather_objects(problem)):
            if reason is not None:
                self._mine = None
                rule = "Every rank has an inbox of the same size"
                raise RingspanError(f"{nbytes:,} bytes of peer memory", f"rank {rank}: {reason}", rule, "transport='process_group'")
        self._handle = self._module.rendezvous(self._mine, self._transport.group)
        self._inboxes = [self._handle.get_buffer(rank, (nbytes,), torch.uint8) for rank in range(self._size)]
        self._nbytes = nbytes

    def inbox(self, rank: int) -> Tensor:
        """See `PeerMemory.inbox`."""
        return self._inboxes[rank]

    def rank_of(self, member: int) -> int:
        """See `PeerMemory.rank_of`: itself."""
        return member

    def begin(self) -> None:
        """See `PeerMemory.begin`. Whoever replays a captured graph orders it among the passes around it."""
        self._passes.begin()
        if torch.cuda.is_current_stream_capturing():
            self._captured = True
            return
        current = torch.cuda.current_stream(self._index)
        if self._before is not None and self._before != current:
            current.wait_stream(self._before)
        self._before = current

    def end(self) -> None:
        """See `PeerMemory.end`."""
        self._passes.end()

    def leave(self, held: object) -> None:
        """See `PeerMemory.leave`."""
        self._passes.leave(held)

    def signal(self, words: Words) -> None:
        """See `PeerMemory.signal`."""
        if (addresses := self._all_at_once("put", words)) is not None:
            with torch.cuda.device(self._index):
                signal_kernels().fused_set(addresses, self._timeout_ms)
            return
        for peer, channel in words:
            self._handle.put_signal(peer, channel, self._timeout_ms)

    def wait(self, words: Words) -> None:
        """See `PeerMemory.wait`. A peer that does not answer within the group's time-out ends this rank's CUDA context with an error."""
        if (addresses := self._all_at_once("wait", words)) is not None:
            with torch.cuda.device(self._index):
                signal_kernels().fused_await(addresses, self._timeout_ms)
            return
        for peer, channel in words:
            self._handle.wait_signal(peer, channel, self._timeout_ms)

    def _all_at_once(self, what: str, words: Words) -> Tensor | None:
        """The addresses of several words for one kernel, on this GPU; None where torch's own signals do, one after the other."""
        if len(words) < 2 or signal_kernels() is None:
            return None
        key = what, tuple(words)
        if key not in self._addresses:
            if torch.cuda.is_current_stream_capturing():
                # They would be copied by the graph, from memory that is no more.
                return None
            # Where torch's signals are: the pad of who waits has, for each channel, a word for each rank that sets it.
            pads, mine = self._handle.signal_pad_ptrs, self._transport.rank
            ends = [(peer, mine) if what == "put" else (mine, peer) for peer, _ in words]
            found = [pads[at] + 4 * (self._size * channel + by) for (at, by), (_, channel) in zip(ends, words, strict=True)]
            self._addresses[key] = torch.tensor(found, dtype=torch.int64, device=self._device)
        return self._addresses[key]

    def meet(self) -> None:
        """See `PeerMemory.meet`. One launch, which signals to all and waits for all at once."""
        self._handle.barrier(self.channels, self._timeout_ms)

    def aside(self, lane: int, room: Work, writes: Sequence[Work], arrive: Work) -> Pending:
        """See `PeerMemory.aside`."""
        # On streams of their own: what a lane sends next does not wait for what it is still to receive.
        return _Aside([self._on(f"write {lane}", room, writes, BRANCHES[lane]), self._on(f"arrive {lane}", arrive, [], 1)], self._index)

    def beside(self, lane: str, work: Work, after: Sequence[Pending] = ()) -> Pending:
        """See `PeerMemory.beside`: each lane is a stream."""
        stream, done = self._stream(f"beside, {lane}"), torch.cuda.Event()
        stream.wait_stream(torch.cuda.current_stream(self._index))
        with torch.cuda.stream(stream):
            for pending in after:
                pending.wait()
            work()
            done.record(stream)
        return _Aside([done], self._index)

    def _on(self, name: str, first: Work, works: Sequence[Work], most: int) -> torch.cuda.Event:
        stream, done, current = self._stream(name), torch.cuda.Event(), torch.cuda.current_stream(self._index)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            first()
        # In a graph, where they cost the host nothing.
        branches = most if torch.cuda.is_current_stream_capturing() else 1
        streams = [stream, *(self._stream(f"{name}, {branch}") for branch in range(1, min(branches, len(works))))]
        for other in streams[1:]:
            other.wait_stream(stream)
        for branch, other in enumerate(streams):
            with torch.cuda.stream(other):
                for work in works[branch :: len(streams)]:
                    work()
        for other in streams[1:]:
            stream.wait_stream(other)
        done.record(stream)
        return done

    def _stream(self, name: str) -> torch.cuda.Stream:
        if name not in self._streams:
            # Its few words of work must not queue behind the blocks of an attention kernel, whatever its priority.
            _, highest = torch.cuda.Stream.priority_range()  # pyright: ignore[reportCallIssue]
            self._streams[name] = torch.cuda.Stream(self._device, priority=highest)
        return self._streams[name]
