"""How a pass sends and receives: what it hands over, and who carries it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ringspan.attention.program import Batch
from ringspan.transport import Parcel, Pending, Transport, works

Component = Tensor | tuple[Tensor, Tensor]
"""`[rows, …]`, or two such (keys and values), which travel side by side as one `[rows, 2, …]`."""


class Courier(Protocol):
    """Carries the batches of one pass."""

    def own_buffer(self, kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """Where this rank's own inputs of `kind`, all that it sends of them, best lie; None where it makes no difference."""
        ...

    def post(self, batch: Batch, outgoing: Sequence[Sequence[Component]], incoming: Sequence[Sequence[Tensor]]) -> Pending:
        """Starts a batch and returns at once; what it returns waits until it is over.

        Args:
            batch: what is sent and received.
            outgoing: for each send its components; results go out in the accumulator's dtype.
            incoming: for each receive its contiguous buffers.
        """
        ...

    def finish(self) -> None:
        """The pass is over: nothing of it is under way when the next begins."""
        ...


def wire_shape(component: Component, dtype: torch.dtype | None = None) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype in which a component travels; `dtype` where it is to be another than its own."""
    if isinstance(component, Tensor):
        return tuple(component.shape), dtype or component.dtype
    first = component[0]
    return (first.shape[0], 2, *first.shape[1:]), dtype or first.dtype


def write(component: Component, target: Tensor) -> None:
    """Copies a component into a contiguous `target` of its wire shape, whose dtype may be wider."""
    if isinstance(component, Tensor):
        target.copy_(component)
        return
    for index, part in enumerate(component):
        target[:, index].copy_(part)


def contiguous(component: Component, dtype: torch.dtype | None = None) -> Tensor:
    """A component as it travels, copied only where it does not lie so already."""
    shape, dtype = wire_shape(component, dtype)
    if isinstance(component, Tensor):
        return component.to(dtype).contiguous()
    target = component[0].new_empty(shape, dtype=dtype)
    write(component, target)
    return target


class _UnderWay:
    """A transport's transfers, with the parcels that live as long."""

    def __init__(self, pending: Pending, parcels: tuple[Sequence[Parcel], ...]) -> None:
        self._pending, self._parcels = pending, parcels

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
        wide: the accumulator's dtype, in which results travel.
    """

    def __init__(self, transport: Transport, wide: torch.dtype) -> None:
        self._transport, self._wide = transport, wide

    def own_buffer(self, kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """See `Courier.own_buffer`."""
        return None

    def post(self, batch: Batch, outgoing: Sequence[Sequence[Component]], incoming: Sequence[Sequence[Tensor]]) -> Pending:
        """See `Courier.post`. Parcels live until their batch is over, so that nothing under way is freed."""
        sends = [
            Parcel(contiguous(component, self._wide if batch.lane else None), send.peer)
            for send, components in zip(batch.sends, outgoing, strict=True)
            for component in components
        ]
        receives = [Parcel(tensor, receive.peer) for receive, tensors in zip(batch.receives, incoming, strict=True) for tensor in tensors]
        return _UnderWay(self._transport.exchange(sends, receives, batch.lane), (sends, receives))

    def finish(self) -> None:
        """Every batch has been waited for."""
