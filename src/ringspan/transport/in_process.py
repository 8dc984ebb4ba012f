"""N ranks as threads of one process: for laptops, for tests, and to verify ring sizes that no one here owns."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ringspan.errors import RankFailure, RingspanError
from ringspan.transport.protocol import Parcel

Result = TypeVar("Result")


def recorded(device: torch.device) -> torch.cuda.Event | None:
    """What tells when all is done that the current stream of `device` has been given; None where nothing is ever left to do."""
    if device.type != "cuda":
        return None
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(device))
    return done


def follow(done: torch.cuda.Event | None, device: torch.device) -> None:
    """What the current stream of `device` does from here on comes after `done`, be it another stream's."""
    if done is not None:
        torch.cuda.current_stream(device).wait_event(done)


@dataclass(frozen=True)
class _Copy:
    """A copy of a tensor for another rank, whose current stream may be another."""

    tensor: Tensor
    done: torch.cuda.Event | None

    @classmethod
    def of(cls, tensor: Tensor) -> _Copy:
        return cls(tensor.detach().clone(), recorded(tensor.device))

    def taken(self) -> Tensor:
        """For the current stream: its memory is not given out again before that has read it."""
        if self.done is not None:
            follow(self.done, self.tensor.device)
            self.tensor.record_stream(torch.cuda.current_stream(self.tensor.device))
        return self.tensor


class _World:
    """What the ranks share: mailboxes, a meeting point, and the first failure."""

    def __init__(self, size: int, timeout_seconds: float) -> None:
        self.size, self.timeout_seconds = size, timeout_seconds
        self.lock = threading.Lock()
        # A condition a rank: news for one rank does not wake the other 63.
        self.news = [threading.Condition(self.lock) for _ in range(size)]
        # (source, target, lane, how many went before on that way): a receive is for one certain send, whatever it is waited for after.
        self.mail: dict[tuple[int, int, int, int], _Copy] = {}
        self.tables: dict[int, dict[int, object]] = defaultdict(dict)
        self.failed: tuple[int, BaseException] | None = None
        self.ended: set[int] = set()

    def fail(self, rank: int, error: BaseException) -> None:
        with self.lock:
            if self.failed is None or (isinstance(self.failed[1], RankFailure) and not isinstance(error, RankFailure)):
                self.failed = (rank, error)
            self.wake(range(self.size))

    def wake(self, ranks: Iterable[int]) -> None:
        """Lets `ranks` look again at what they wait for. The caller holds `lock`."""
        for rank in ranks:
            self.news[rank].notify_all()

    def wait_for(self, rank: int, ready: Callable[[], bool], waited_for: str, peers: Sequence[int]) -> None:
        """Waits under `lock`, which the caller holds."""

        def over() -> bool:
            return ready() or self.failed is not None or any(peer in self.ended for peer in peers)

        in_time = self.news[rank].wait_for(over, self.timeout_seconds)
        if ready():
            return
        if self.failed is not None:
            raise RankFailure(f"rank {rank} waited for {waited_for}", f"rank {self.failed[0]} failed: {self.failed[1]}")
        gone = [peer for peer in peers if peer in self.ended]
        found = f"rank {gone[0]} has ended" if gone and in_time else f"nothing came in {self.timeout_seconds:g} s"
        raise RankFailure(f"rank {rank} waited for {waited_for}", found, "All ranks make the same calls in the same order")


class _Arrivals:
    def __init__(self, transport: InProcessTransport, receives: list[tuple[Parcel, tuple[int, int, int, int]]]) -> None:
        self._transport, self._receives = transport, receives

    def wait(self) -> None:
        world, rank = self._transport.world, self._transport.rank
        for (tensor, peer), ticket in self._receives:
            with world.lock:
                world.wait_for(
                    rank, lambda ticket=ticket: ticket in world.mail, f"a tensor of {tuple(tensor.shape)} from rank {peer}", [peer]
                )
                arrived = world.mail.pop(ticket).taken()
            if arrived.shape != tensor.shape or arrived.dtype != tensor.dtype:
                raise RankFailure(
                    f"rank {rank} expected {tuple(tensor.shape)} {tensor.dtype} from rank {peer}",
                    f"{tuple(arrived.shape)} {arrived.dtype} came",
                    "All ranks make the same calls in the same order",
                )
            tensor.copy_(arrived)
        self._receives = []


class InProcessTransport:
    """One rank of `run_in_process`. What is sent is copied at once, as a wire would."""

    def __init__(self, world: _World, rank: int) -> None:
        self.world, self.rank, self.size = world, rank, world.size
        self._bytes_sent: Counter[int] = Counter()
        self._meetings = 0
        self._sent: Counter[tuple[int, int]] = Counter()
        self._received: Counter[tuple[int, int]] = Counter()

    @property
    def bytes_sent(self) -> Counter[int]:
        """See `Transport.bytes_sent`, counted as tensors are handed over."""
        return self._bytes_sent

    @property
    def devices(self) -> frozenset[str]:
        """See `Transport.devices`: one process reaches all of them."""
        return frozenset({"cpu", "cuda"})

    def exchange(self, sends: Sequence[Parcel], receives: Sequence[Parcel], lane: int = 0) -> _Arrivals:
        """See `Transport.exchange`."""
        parcels = [(_Copy.of(tensor), peer) for tensor, peer in sends]
        with self.world.lock:
            for copy, peer in parcels:
                self.world.mail[(self.rank, peer, lane, self._sent[(peer, lane)])] = copy
                self._sent[(peer, lane)] += 1
                self._bytes_sent[peer] += copy.tensor.numel() * copy.tensor.element_size()
            self.world.wake({peer for _, peer in sends})
        tickets = []
        for parcel in receives:
            tickets.append((parcel, (parcel.peer, self.rank, lane, self._received[(parcel.peer, lane)])))
            self._received[(parcel.peer, lane)] += 1
        return _Arrivals(self, tickets)

    def gather_objects(self, mine: object) -> list:
        """See `Transport.gather_objects`."""
        self._meetings += 1
        world, meeting = self.world, self._meetings
        with world.lock:
            table = world.tables[meeting]
            table[self.rank] = mine
            if len(table) == self.size:
                world.wake(range(self.size))
            others = [rank for rank in range(self.size) if rank not in table]
            world.wait_for(self.rank, lambda: len(table) == self.size, "all ranks to agree", others)
            world.tables.pop(meeting - 2, None)
        return [table[rank] for rank in range(self.size)]

    def all_reduce(self, tensor: Tensor, operation: str = "sum") -> None:
        """See `Transport.all_reduce`. Summed in rank order, so the same on every rank and run."""
        every = torch.stack([each.taken() for each in self.gather_objects(_Copy.of(tensor))])
        tensor.copy_(every.sum(0) if operation == "sum" else every.amax(0))

    def broadcast(self, tensor: Tensor, source: int = 0) -> None:
        """See `Transport.broadcast`."""
        tensor.copy_(self.gather_objects(_Copy.of(tensor))[source].taken())


class SingleRank(InProcessTransport):
    """The transport of a rank that is alone: no thread, no process group."""

    def __init__(self) -> None:
        super().__init__(_World(1, 1.0), 0)


def run_in_process(num_ranks: int, function: Callable[[InProcessTransport], Result], timeout_seconds: float = 300.0) -> list[Result]:
    """Runs `function(group)` on `num_ranks` in-process ranks, each a thread, and returns their results in rank order.

    On a GPU a rank computes on its thread's current stream, which may be its own: results made on another than the default one
    are to be waited for.

    Args:
        num_ranks: how many ranks.
        function: takes the rank's `group`, which `ContextParallel` accepts.
        timeout_seconds: how long a rank waits for another before it gives up.

    Raises:
        RingspanError: for a number of ranks below 1.
        Exception: the first error of any rank, with a note that names the rank.
    """
    if type(num_ranks) is not int or num_ranks < 1:
        raise RingspanError(f"{num_ranks!r} in-process ranks", "", "There is at least one rank, and a whole number of them", "num_ranks=1")
    world = _World(num_ranks, timeout_seconds)
    results: list = [None] * num_ranks

    def run(rank: int) -> None:
        # The backward must run on this thread: torch's own threads are one a device, and the ranks wait for one another.
        torch.autograd.set_multithreading_enabled(False)
        try:
            results[rank] = function(InProcessTransport(world, rank))
        except BaseException as error:
            world.fail(rank, error)
        finally:
            with world.lock:
                world.ended.add(rank)
                world.wake(range(num_ranks))

    threads = [threading.Thread(target=run, args=(rank,), name=f"rank {rank}", daemon=True) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if world.failed is not None:
        rank, error = world.failed
        error.add_note(f"on in-process rank {rank} of {num_ranks}")
        raise error
    return results
