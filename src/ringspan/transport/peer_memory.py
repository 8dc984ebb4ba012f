"""Memory that every rank of one host can write: PyTorch's symmetric memory over NVLink, and the memory that threads share anyway.

Beside attention copies into a peer's memory are made by copy engines on a stream of their own and take no multiprocessor from it; between
passes, where heads are exchanged, by a kernel. Signals are one word each. No multicast is needed.
"""

from __future__ import annotations

import importlib.util
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ringspan.errors import RankFailure, RingspanError
from ringspan.kernels import signal_kernels
from ringspan.transport.in_process import InProcessTransport
from ringspan.transport.process_group import ProcessGroupTransport
from ringspan.transport.protocol import Pending, Transport

Work = Callable[[], None]
Words = Sequence[tuple[int, int]]
"""Signals, each as (peer, channel)."""
BRANCHES = (2, 1)
"""How many messages of each lane are written at a time in a CUDA graph: while one waits for its signals the link carries another. With what
arrives on both, attention's own and the calls beside it there are seven branches; they share eight queues of the hardware, and one that
queues before what it waits for waits for ever."""


class PeerMemory(Protocol):
    """One rank's view of the inboxes of all ranks, and of the signals between them.

    A signal is a word that one rank sets and another waits for and clears; setting one that is still set waits.

    Attributes:
        channels: how many signals there are from each rank to each other.
    """

    channels: int

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

    def leave(self) -> None:
        """An error ends what is done in several passes between two of them: whoever else is in the next would take another for it."""
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


class _Passes:
    """Whether a pass is under way: one that an error has left keeps its signals set, and the next would take them for its own."""

    def __init__(self) -> None:
        self._under_way = False

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

    def leave(self) -> None:
        self._under_way = True


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
    """

    def __init__(self, transport: ProcessGroupTransport, device: torch.device) -> None:
        import torch.distributed._symmetric_memory as symmetric_memory

        self._module = symmetric_memory
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
        self._passes = _Passes()
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

    def leave(self) -> None:
        """See `PeerMemory.leave`."""
        self._passes.leave()

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
        self._meetings = 0
        self._passes = _Passes()
        # The ranks share the first one's lock, and signals that are set, each with what it comes after on a GPU.
        self._changed, self._set = transport.gather_objects((threading.Condition(), {}))[0]

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

    def signal(self, words: Words) -> None:
        """See `PeerMemory.signal`; one that is still set is an error here, since no message is sent twice before it is read."""
        with self._changed:
            done = torch.cuda.current_stream(self._device).record_event() if self._device.type == "cuda" else None
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
        if done is not None:
            torch.cuda.current_stream(self._device).wait_event(done)

    def meet(self) -> None:
        """See `PeerMemory.meet`."""
        # Whoever is at the next may be there before all others have seen that it was at this one: of two signals each has its turn.
        self._meetings += 1
        channel, others = self.channels + self._meetings % 2, [r for r in range(self._transport.size) if r != self._transport.rank]
        self.signal([(other, channel) for other in others])
        self.wait([(other, channel) for other in others])

    def aside(self, lane: int, room: Work, writes: Sequence[Work], arrive: Work) -> Pending:
        """See `PeerMemory.aside`: a thread writes at once, and waits when it needs what arrives."""
        room()
        for write in writes:
            write()
        return _WhenNeeded(arrive)


class SomePeers:
    """The peer memory of some ranks, counted from 0, within that of all: nobody else takes part in their passes.

    Args:
        whole: of all ranks.
        members: ranks of `whole`, this one among them, in the order in which they are counted.
    """

    def __init__(self, whole: PeerMemory, members: Sequence[int]) -> None:
        self._whole, self._members, self.channels = whole, tuple(members), whole.channels

    def reserve(self, nbytes: int) -> None:
        """Not offered: every inbox is as large as all others."""
        raise NotImplementedError("room is made in the inboxes of all ranks")

    def inbox(self, rank: int) -> Tensor:
        """See `PeerMemory.inbox`."""
        return self._whole.inbox(self._members[rank])

    def rank_of(self, member: int) -> int:
        """See `PeerMemory.rank_of`."""
        return self._whole.rank_of(self._members[member])

    def begin(self) -> None:
        """See `PeerMemory.begin`."""
        self._whole.begin()

    def end(self) -> None:
        """See `PeerMemory.end`."""
        self._whole.end()

    def leave(self) -> None:
        """See `PeerMemory.leave`."""
        self._whole.leave()

    def signal(self, words: Words) -> None:
        """See `PeerMemory.signal`."""
        self._whole.signal([(self._members[peer], channel) for peer, channel in words])

    def wait(self, words: Words) -> None:
        """See `PeerMemory.wait`."""
        self._whole.wait([(self._members[peer], channel) for peer, channel in words])

    def meet(self) -> None:
        """Not offered: it is for all ranks."""
        raise NotImplementedError("the ranks of all passes meet")

    def aside(self, lane: int, room: Work, writes: Sequence[Work], arrive: Work) -> Pending:
        """See `PeerMemory.aside`."""
        return self._whole.aside(lane, room, writes, arrive)


def peer_memory(transport: Transport, device: torch.device) -> PeerMemory | str:
    """The one peer memory of `transport`, or why there is none, the same answer on every rank. Collective at the first call."""
    # With the transport it goes: a table beside it would hold both for ever, since the memory knows its transport.
    kept = vars(transport)
    if "_peer_memory" not in kept:
        kept["_peer_memory"] = _make(transport, device)
    return kept["_peer_memory"]


def _make(transport: Transport, device: torch.device) -> PeerMemory | str:
    if isinstance(transport, InProcessTransport):
        return SharedMemory(transport, device)
    reasons = transport.gather_objects(_refusal(transport, device))
    for rank, reason in enumerate(reasons):
        if reason is not None:
            return f"rank {rank}: {reason}"
    assert isinstance(transport, ProcessGroupTransport)
    places = transport.gather_objects(_place(device))
    # A rank knows what its own GPU reaches: the others must hear of it before they meet.
    for rank, reason in enumerate(transport.gather_objects(_unreachable(device, places))):
        if reason is not None:
            return f"rank {rank}: {reason}"
    try:
        memory, problem = SymmetricMemory(transport, device), None
    except (RuntimeError, RingspanError) as error:
        memory, problem = None, str(error).splitlines()[0]
    for rank, reason in enumerate(transport.gather_objects(problem)):
        if reason is not None:
            return f"rank {rank}: symmetric memory: {reason}"
    assert memory is not None
    return memory


def _refusal(transport: Transport, device: torch.device) -> str | None:
    if not isinstance(transport, ProcessGroupTransport):
        return f"{type(transport).__name__} has no memory that its ranks share"
    if device.type != "cuda":
        return f"processes share no memory for tensors on {device.type}"
    if not dist.is_nccl_available() or "cuda" not in transport.devices:
        return "the group has no NCCL for tensors on cuda"
    if importlib.util.find_spec("torch.distributed._symmetric_memory") is None:
        return "this PyTorch has no symmetric memory"
    return None


def _place(device: torch.device) -> tuple[str, int]:
    """(host, GPU) of this rank; visible devices are assumed to be numbered alike on one host."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip(), device.index or 0


def _unreachable(device: torch.device, places: list[tuple[str, int]]) -> str | None:
    """What keeps this rank's GPU from the memory of all others."""
    own = _place(device)
    for rank, (host, index) in enumerate(places):
        if host != own[0]:
            return f"it is on another host than rank {rank}"
        if index != own[1] and not torch.cuda.can_device_access_peer(device, index):
            return f"GPU {own[1]} does not reach the memory of GPU {index}"
    return None
