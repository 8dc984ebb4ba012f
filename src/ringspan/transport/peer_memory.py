"""Which memory the ranks of a transport share, and the same of some of them."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ringspan.errors import RingspanError
from ringspan.transport.in_process import InProcessTransport
from ringspan.transport.peers import PeerMemory, Words, Work
from ringspan.transport.process_group import ProcessGroupTransport
from ringspan.transport.protocol import Pending, Transport
from ringspan.transport.shared_memory import SharedMemory
from ringspan.transport.symmetric_memory import SymmetricMemory

NATIVE_ATOMICS = 3
"""CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED of CUDA's driver."""


class SomePeers:
    """The peer memory of some ranks, counted from 0, within that of all: nobody else takes part in their passes.

    Args:
        whole: of all ranks.
        members: ranks of `whole`, this one among them, in the order in which they are counted.
        first: where in the inboxes theirs begin, in bytes.
    """

    def __init__(self, whole: PeerMemory, members: Sequence[int], first: int = 0) -> None:
        self._whole, self._members, self._first, self.channels = whole, tuple(members), first, whole.channels
        self.links_rest = whole.links_rest

    def reserve(self, nbytes: int) -> None:
        """Not offered: every inbox is as large as all others."""
        raise NotImplementedError("room is made in the inboxes of all ranks")

    def inbox(self, rank: int) -> Tensor:
        """See `PeerMemory.inbox`."""
        return self._whole.inbox(self._members[rank])[self._first :]

    def rank_of(self, member: int) -> int:
        """See `PeerMemory.rank_of`."""
        return self._whole.rank_of(self._members[member])

    def begin(self) -> None:
        """See `PeerMemory.begin`."""
        self._whole.begin()

    def end(self) -> None:
        """See `PeerMemory.end`."""
        self._whole.end()

    def leave(self, held: object) -> None:
        """See `PeerMemory.leave`."""
        self._whole.leave(held)

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

    def beside(self, lane: str, work: Work, after: Sequence[Pending] = ()) -> Pending:
        """See `PeerMemory.beside`."""
        return self._whole.beside(lane, work, after)


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
    rests = all(transport.gather_objects(_is_on_nvlink(device, places)))
    try:
        memory, problem = SymmetricMemory(transport, device, rests), None
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


def _is_on_nvlink(device: torch.device, places: list[tuple[str, int]]) -> bool:
    """Whether NVLink joins this rank's GPU to those of all others: a link whose atomic operations are its own, which PCIe has not."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    driver.cuInit(0)
    _, own = _place(device)
    return all(index == own or _has_atomics(driver, own, index) for _, index in places)


def _has_atomics(driver: ctypes.CDLL, own: int, other: int) -> bool:
    value, handles = ctypes.c_int(0), [ctypes.c_int(0), ctypes.c_int(0)]
    failed = [driver.cuDeviceGet(ctypes.byref(handle), number) for handle, number in zip(handles, (own, other), strict=True)]
    failed.append(driver.cuDeviceGetP2PAttribute(ctypes.byref(value), NATIVE_ATOMICS, *handles))
    return not any(failed) and value.value == 1


def _unreachable(device: torch.device, places: list[tuple[str, int]]) -> str | None:
    """What keeps this rank's GPU from the memory of all others."""
    own = _place(device)
    for rank, (host, index) in enumerate(places):
        if host != own[0]:
            return f"it is on another host than rank {rank}"
        if index != own[1] and not torch.cuda.can_device_access_peer(device, index):
            return f"GPU {own[1]} does not reach the memory of GPU {index}"
    return None
