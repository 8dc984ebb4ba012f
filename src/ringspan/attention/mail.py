"""How a pass sends and receives: what it hands over, and who carries it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ringspan.attention.program import Batch
from ringspan.schedule import Receive, Send
from ringspan.transport import Parcel, Pending, Transport, works

Pieces = Sequence[Sequence[Tensor]]
"""For each piece its components, `[rows, …]` each: k and v of `kv`, dk and dv of `dkv`, out and lse of `o`, …"""


class Component(NamedTuple):
    """One tensor of a piece that arrives: its shape `[rows, …]` and its dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Courier(Protocol):
    """Carries the batches of one pass.

    Attributes:
        lends: whether what arrives is overwritten once its step is over.
    """

    lends: bool

    def buffers(self, batch: Batch, components: Sequence[Sequence[Component]]) -> list[list[Tensor]]:
        """Where the receives of `batch` arrive, contiguous: for each of them a tensor for each of its `components`.

        Neighbours (`Batch`) lie one after the other, all k and then all v, so that a kernel may read them as one.
        """
        ...

    def post(self, batch: Batch, outgoing: Pieces, incoming: Pieces) -> Pending:
        """Starts a batch and returns at once; what it returns waits until it is over.

        Args:
            batch: what is sent and received.
            outgoing: for each send its components, which travel in the dtype that `Wire` says.
            incoming: for each receive its `buffers`.
        """
        ...

    def begin(self) -> None:
        """The pass begins."""
        ...

    def frees(self, step: int) -> bool:
        """Whether anything that was read until `step` may be written again after it."""
        ...

    def give_back(self, step: int) -> None:
        """This rank has done `step`: buffers that were needed until then may be written again."""
        ...

    def end(self) -> None:
        """The pass is over, and everything has been waited for."""
        ...

    def leave(self, held: object) -> None:
        """An error ends the pass. `held`: batches that are still under way."""
        ...


@dataclass(frozen=True)
class Wire:
    """In which dtype results travel.

    A sum travels in the accumulator's. What one attend alone gave is as the kernel rounded it, and loses nothing if it travels so; only
    where a mask has made several launches of that attend is their sum rounded once more.

    Args:
        wide: the accumulator's dtype.
        kernel: the dtype that the kernel's results are rounded to.
    """

    wide: torch.dtype
    kernel: torch.dtype

    def dtype(self, batch: Batch, transfer: Send | Receive, tensor: Tensor) -> torch.dtype:
        """Of a component of a piece."""
        if batch.lane == 0:
            return tensor.dtype
        # lse, which has no last dimension, is never rounded.
        return self.kernel if transfer in batch.singles and tensor.ndim == 4 else self.wide


class UnderWay:
    """Transfers, with the tensors that live as long."""

    def __init__(self, pending: Pending, kept: object) -> None:
        self._pending, self._kept = pending, kept

    @property
    def works(self) -> Sequence[Pending]:
        """See `ringspan.transport.works`."""
        return works(self._pending)

    def wait(self) -> None:
        self._pending.wait()


class TransportCourier:
    """Hands parcels to a transport: sends, receives and waits as processes and threads do.

    Args:
        transport: carries them.
        wire: in which dtypes.
        device: where what arrives is kept.
    """

    lends = False

    def __init__(self, transport: Transport, wire: Wire, device: torch.device) -> None:
        self._transport, self._wire, self._device = transport, wire, device

    def buffers(self, batch: Batch, components: Sequence[Sequence[Component]]) -> list[list[Tensor]]:
        """See `Courier.buffers`: new ones, which live as long as somebody needs them."""
        result: list[list[Tensor]] = [[] for _ in components]
        for members in batch.neighbours:
            for same in zip(*(components[member] for member in members), strict=True):
                rows = [component.shape[0] for component in same]
                buffer = torch.empty((sum(rows), *same[0].shape[1:]), dtype=same[0].dtype, device=self._device)
                for member, part in zip(members, buffer.split(rows), strict=True):
                    result[member].append(part)
        return result

    def post(self, batch: Batch, outgoing: Pieces, incoming: Pieces) -> Pending:
        """See `Courier.post`. Parcels live until their batch is over, so that nothing under way is freed."""
        sends = [
            Parcel(tensor.to(self._wire.dtype(batch, send, tensor)).contiguous(), send.peer)
            for send, tensors in zip(batch.sends, outgoing, strict=True)
            for tensor in tensors
        ]
        receives = [Parcel(tensor, receive.peer) for receive, tensors in zip(batch.receives, incoming, strict=True) for tensor in tensors]
        return UnderWay(self._transport.exchange(sends, receives, batch.lane), (sends, receives))

    def begin(self) -> None:
        """Nothing is left of a pass before."""

    def frees(self, step: int) -> bool:
        """See `Courier.frees`: by whoever asks for memory next."""
        return True

    def give_back(self, step: int) -> None:
        """See `Courier.give_back`: every buffer is its own."""

    def end(self) -> None:
        """Every batch has been waited for."""

    def leave(self, held: object) -> None:
        """See `Courier.leave`: whoever carries parcels keeps them."""
