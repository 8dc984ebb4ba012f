"""Ranks that are processes: gloo on CPUs, NCCL on GPUs, through torch.distributed."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from weakref import WeakKeyDictionary, ref

import torch
import torch.distributed as dist
from torch import Tensor

from ringspan.errors import RankFailure, RingspanError
from ringspan.transport.protocol import Parcel

NUM_LANES = 2
_POINT_TO_POINT = {("cpu", "gloo"), ("cpu", "mpi"), ("cuda", "nccl")}


_REPORT_SECONDS = 2.0
"""How long a rank whose transfer broke off listens to the others, to tell who is at the root of it."""


class _Works:
    """`peers[i]` are the ranks that `works[i]` exchanges with."""

    def __init__(self, transport: ProcessGroupTransport, works: list[dist.Work], peers: list[list[int]]) -> None:
        self._transport, self._works, self._peers = transport, works, peers

    @property
    def works(self) -> list[dist.Work]:
        """See `ringspan.transport.works`."""
        return self._works

    def wait(self) -> None:
        for work, peers in zip(self._works, self._peers, strict=True):
            try:
                work.wait()
            except RuntimeError as error:
                raise self._transport.failure(peers, error) from error
        self._works, self._peers = [], []


class ProcessGroupTransport:
    """A `torch.distributed` process group as a transport.

    Each lane but the first has a group of its own, so that gradients on their way home do not queue behind keys and values. Nothing here
    blocks the host on NCCL: `wait` makes the current stream wait.

    It holds its groups weakly: torch has them until `destroy_process_group()`, which ends gloo's threads only where nobody else has. One
    that is left, and lets go of a tensor as Python ends, aborts the process.

    Args:
        group: the group, of which this process is a member.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._bytes_sent: Counter[int] = Counter()
        self._members = dist.get_process_group_ranks(group)
        # "cpu:gloo,cuda:nccl": gloo moves tensors point to point on the CPU alone, whatever it is registered for.
        backends = dict(part.split(":") for part in str(dist.get_backend_config(group)).split(","))
        self._devices = frozenset(device for device, backend in backends.items() if (device, backend) in _POINT_TO_POINT)
        # A new group is made by its members alone, in the order of their calls; two lanes of one group therefore need no other rank.
        lanes = (_another(group, self._members) for _ in range(NUM_LANES - 1))
        self._groups = [ref(each) for each in (group, *lanes)]

    @property
    def group(self) -> dist.ProcessGroup:
        """The process group.

        Raises:
            RingspanError: where it has been destroyed.
        """
        return self._lane(0)

    def _lane(self, lane: int) -> dist.ProcessGroup:
        group = self._groups[lane]()
        if group is None:
            raise RingspanError(
                f"communication of rank {self.rank} with the {self.size} ranks of its process group",
                "the group has been destroyed",
                "A ContextParallel is of use as long as its process group",
                "destroy_process_group() at the end, or another ContextParallel after init_process_group()",
            )
        return group

    @property
    def timeout_ms(self) -> int:
        """How long the group waits for a rank; 0 where torch does not tell."""
        timeout = _timeout(self.group)
        return 0 if timeout is None else int(timeout.total_seconds() * 1000)

    @property
    def bytes_sent(self) -> Counter[int]:
        """See `Transport.bytes_sent`, counted as tensors are handed over."""
        return self._bytes_sent

    @property
    def devices(self) -> frozenset[str]:
        """See `Transport.devices`."""
        return self._devices

    def exchange(self, sends: Sequence[Parcel], receives: Sequence[Parcel], lane: int = 0) -> _Works:
        """See `Transport.exchange`."""
        group = self._lane(lane)
        for tensor, peer in sends:
            self._bytes_sent[peer] += tensor.numel() * tensor.element_size()
        peers = [parcel.peer for parcel in (*receives, *sends)]
        if not peers:
            return _Works(self, [], [])
        try:
            if (*receives, *sends)[0].tensor.is_cuda:
                # One group, so that sends and receives of a ring cannot wait for one another.
                batch = [dist.P2POp(dist.irecv, tensor, group=group, group_peer=peer) for tensor, peer in receives]
                batch += [dist.P2POp(dist.isend, tensor, group=group, group_peer=peer) for tensor, peer in sends]
                works = dist.batch_isend_irecv(batch)
                return _Works(self, works, [peers] * len(works))
            works = [dist.irecv(tensor, group=group, group_src=peer) for tensor, peer in receives]
            works += [dist.isend(tensor, group=group, group_dst=peer) for tensor, peer in sends]
        except RuntimeError as error:
            raise self.failure(peers, error) from error
        begun = [(work, [peer]) for work, peer in zip(works, peers, strict=True) if work is not None]
        return _Works(self, [work for work, _ in begun], [peer for _, peer in begun])

    def gather_objects(self, mine: object) -> list:
        """See `Transport.gather_objects`."""
        said: list = [None] * self.size
        group = self.group
        try:
            dist.all_gather_object(said, mine, group=group)
        except RuntimeError as error:
            raise self.failure(list(range(self.size)), error) from error
        return said

    def all_reduce(self, tensor: Tensor, operation: str = "sum") -> None:
        """See `Transport.all_reduce`."""
        group = self.group
        try:
            dist.all_reduce(tensor, dist.ReduceOp.SUM if operation == "sum" else dist.ReduceOp.MAX, group=group)
        except RuntimeError as error:
            raise self.failure(list(range(self.size)), error) from error

    def broadcast(self, tensor: Tensor, source: int = 0) -> None:
        """See `Transport.broadcast`."""
        group = self.group
        try:
            dist.broadcast(tensor, group=group, group_src=source)
        except RuntimeError as error:
            raise self.failure([source], error) from error

    def failure(self, peers: list[int], error: RuntimeError) -> RankFailure:
        """What torch said, and which ranks are at the root of it. A rank that fails takes with it those that wait for it."""
        others = sorted({peer for peer in peers if peer != self.rank})
        silent = self._silent(others)
        found = f"{_ranks(silent)} died or did not answer in time" if silent else "the transfer broke off or did not end in time"
        return RankFailure(
            f"rank {self.rank} exchanged with {_ranks(others)}",
            f"{found} ({str(error).splitlines()[0]})",
            "A rank that dies or waits elsewhere stops the others",
            "the first error among the ranks' logs, and a checkpoint to go on from",
        )

    def _silent(self, suspects: list[int]) -> list[int]:
        """Follows, from this rank, who waited for whom, to those who report nothing. Empty where all report, or no one can be asked."""
        try:
            store = dist.PrefixStore(f"ringspan broken {self.group.group_name}", dist.distributed_c10d._get_default_store())
            store.set(str(self.rank), " ".join(map(str, suspects)))
            deadline = time.monotonic() + _REPORT_SECONDS
            while True:
                seen, ahead, silent = {self.rank}, list(suspects), []
                while ahead:
                    rank = ahead.pop()
                    if rank not in seen:
                        seen.add(rank)
                        if store.check([str(rank)]):
                            ahead.extend(map(int, store.get(str(rank)).split()))
                        else:
                            silent.append(rank)
                if not silent or time.monotonic() > deadline:
                    return sorted(silent)
                time.sleep(0.05)
        except RuntimeError:
            # The store lived in a process that is gone.
            return []


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) != 1 else ''} {', '.join(map(str, ranks))}"


def _timeout(group: dist.ProcessGroup) -> timedelta | None:
    """Torch tells a group's time-out through its backends alone."""
    device = torch.device(str(dist.get_backend_config(group)).split(":")[0])
    return getattr(group._get_backend(device).options, "_timeout", None)


def _another(group: dist.ProcessGroup, members: list[int]) -> dist.ProcessGroup:
    """A group like `group`: the same members, backends and time-out."""
    backends = str(dist.get_backend_config(group))
    another = dist.new_group(members, timeout=_timeout(group), backend=backends, use_local_synchronization=True)
    assert isinstance(another, dist.ProcessGroup), "this process is a member"
    return another


_TRANSPORTS: WeakKeyDictionary[dist.ProcessGroup, ProcessGroupTransport] = WeakKeyDictionary()


def process_group_transport(group: dist.ProcessGroup) -> ProcessGroupTransport:
    """The one transport over `group`: its lanes are communicators, too dear to be made for every user of the group."""
    if group not in _TRANSPORTS:
        _TRANSPORTS[group] = ProcessGroupTransport(group)
    return _TRANSPORTS[group]
