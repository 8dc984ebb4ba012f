"""Carries the batches of a pass through peer memory: written once by the sender, copied out by each reader, beside the computing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ringspan.attention.mail import Component, wire_shape, write
from ringspan.attention.outbox import Message, Outbox, Place
from ringspan.attention.program import Batch
from ringspan.kernels import accumulator_dtype
from ringspan.transport import PeerMemory, Pending, Transport


class PeerCourier:
    """One pass through peer memory. See `Courier`.

    Args:
        outbox: this rank's part in it.
        memory: the ranks' outboxes and signals.
        transport: counts what is sent.
        wide: the accumulator's dtype, in which results travel.
    """

    def __init__(self, outbox: Outbox, memory: PeerMemory, transport: Transport, wide: torch.dtype) -> None:
        self._outbox, self._memory, self._transport, self._wide = outbox, memory, transport, wide
        self._mine = memory.outbox(transport.rank)
        self._written: set[tuple[str, int, int]] = set()

    def own_buffer(self, kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """See `Courier.own_buffer`: where the readers look for it."""
        if kind not in self._outbox.own:
            return None
        _, (place, *others) = self._outbox.own[kind]
        assert not others
        return _tensor(self._mine, place, shape, dtype)

    def post(self, batch: Batch, outgoing: Sequence[Sequence[Component]], incoming: Sequence[Sequence[Tensor]]) -> Pending:
        """See `Courier.post`."""
        posting, memory = self._outbox.postings[batch.index], self._memory
        for message in posting.awaited:
            memory.wait(message.peer, _free(message))
        for send, components, places in zip(batch.sends, outgoing, posting.written, strict=True):
            piece, own = send.piece, send.piece.owner == self._transport.rank and batch.lane == 0
            there = own and (piece.kind, piece.start, piece.stop) in self._written
            for component, place in zip(components, places, strict=False):
                shape, dtype = wire_shape(component, self._wide if batch.lane else None)
                target = _tensor(self._mine, place, shape, dtype)
                if not (there or (isinstance(component, Tensor) and component.data_ptr() == target.data_ptr())):
                    write(component, target)
                self._transport.bytes_sent[send.peer] += target.numel() * target.element_size()
            if own:
                self._written.add((piece.kind, piece.start, piece.stop))
        for message in posting.ready:
            memory.signal(message.peer, _ready(message))
        if not posting.read:
            return _Nothing()

        def read() -> None:
            for message, parts in posting.read:
                memory.wait(message.peer, _ready(message))
                theirs = memory.outbox(message.peer)
                for position, places in parts:
                    for target, place in zip(incoming[position], places, strict=False):
                        target.copy_(_tensor(theirs, place, tuple(target.shape), target.dtype))
                memory.signal(message.peer, _free(message))

        return memory.aside(batch.lane, read)

    def finish(self) -> None:
        """See `Courier.finish`: who reads this rank's outbox is done with it."""
        for message in self._outbox.awaited:
            self._memory.wait(message.peer, _free(message))


def row_bytes(q: Tensor, k: Tensor) -> dict[str, tuple[int, ...]]:
    """The bytes of a row of each component of each kind of piece, for `q` and `k [batch, shard, heads, head_dim]`."""
    batch, _, heads, head_dim = q.shape
    element, wide = q.element_size(), accumulator_dtype(q.dtype).itemsize
    query, key, stats = batch * heads * head_dim, 2 * batch * k.shape[2] * head_dim, batch * heads
    return {
        "q": (query * element,),
        "kv": (key * element,),
        "o": (query * wide, stats * wide),
        # dO, out, lse, and the gradient of lse where there is one.
        "do": (query * element, query * element, stats * wide, stats * wide),
        "dq": (query * wide,),
        "dkv": (key * wide,),
    }


class _Nothing:
    def wait(self) -> None:
        """Nothing is read here: there is nothing to wait for."""


def _ready(message: Message) -> int:
    return 2 * message.index


def _free(message: Message) -> int:
    return 2 * message.index + 1


def _tensor(outbox: Tensor, place: Place, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """`place` as a tensor."""
    nbytes = dtype.itemsize
    for size in shape:
        nbytes *= size
    assert nbytes == place.nbytes, f"{shape} of {dtype} in a place of {place.nbytes} bytes"
    return outbox[place.offset : place.offset + nbytes].view(dtype).view(shape)
