"""What a transport is: how shards move between ranks, and how ranks agree before they move."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch.distributed as dist
from torch import Tensor

from ringspan.errors import RingspanError


class Parcel(NamedTuple):
    """A contiguous tensor to send to `peer`, or to fill with what comes from `peer`."""

    tensor: Tensor
    peer: int


class Pending(Protocol):
    """Transfers under way."""

    def wait(self) -> None:
        """Returns when what was to be received may be read by work queued from here on, and what was sent may be overwritten.

        Raises:
            RankFailure: where a peer died or did not answer in time.
        """
        ...


class WhenWaited:
    """What is done where it is waited for, a `Pending`."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work

    def wait(self) -> None:
        """Does it."""
        self._work()


def works(pending: Pending) -> Sequence[Pending]:
    """What of `pending` on a GPU any other stream may wait for as well, any number of times; nothing where the transport has no such."""
    return getattr(pending, "works", ())


class Transport(Protocol):
    """N ranks that can reach one another.

    Between two ranks and on one lane, tensors arrive in the order in which they were sent. Lanes are independent: what waits on one holds
    up nothing on another.

    Attributes:
        rank: this rank.
        size: the number of ranks.
    """

    rank: int
    size: int

    @property
    def bytes_sent(self) -> Counter[int]:
        """How many bytes this rank has sent to each peer through `exchange`."""
        ...

    @property
    def devices(self) -> frozenset[str]:
        """The types of device whose tensors can be exchanged."""
        ...

    def exchange(self, sends: Sequence[Parcel], receives: Sequence[Parcel], lane: int = 0) -> Pending:
        """Starts all these transfers and returns at once."""
        ...

    def gather_objects(self, mine: object) -> list:
        """Every rank's small picklable object, in rank order."""
        ...

    def all_reduce(self, tensor: Tensor, operation: str = "sum") -> None:
        """The `sum` or the `max` of `tensor` over the ranks, in place."""
        ...

    def broadcast(self, tensor: Tensor, source: int = 0) -> None:
        """Copies the tensor of rank `source` to every rank, in place."""
        ...


def agree(transport: Transport, what: str, mine: object, problem: RingspanError | None = None) -> None:
    """Every rank says what it was asked for, and whether it is wrong; then all go on, or all raise.

    Raises:
        RingspanError: this rank's own `problem`, or that of the first rank that has one, or the first disagreement, naming the ranks.
    """
    said = transport.gather_objects((mine, problem))
    if problem is not None:
        raise problem
    for rank, (_, other) in enumerate(said):
        if other is not None:
            raise RingspanError(f"rank {rank} was asked for something else than it can do", str(other))
    for rank, (theirs, _) in enumerate(said):
        if theirs != said[0][0]:
            raise RingspanError(
                f"{what} on {transport.size} ranks",
                f"rank 0 has {said[0][0]}, rank {rank} has {theirs}",
                "All ranks of a group ask for the same",
                "the same arguments on every rank",
            )


def agree_again(transport: Transport, what: str, mine: Callable[[], object], problem: RingspanError | None = None) -> None:
    """`agree` at a call that may be known already, if `TORCH_DISTRIBUTED_DEBUG=DETAIL` asks for it, as torch then compares collectives.

    Otherwise ranks say nothing to each other, which is quick; and a rank that makes another call than the others is not found out.

    Raises:
        RingspanError: as `agree` does.
    """
    if transport.size > 1 and dist.is_available() and dist.get_debug_level() == dist.DebugLevel.DETAIL:
        agree(transport, what, mine(), problem)
