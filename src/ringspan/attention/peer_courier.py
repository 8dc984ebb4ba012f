"""Carries the batches of a pass through peer memory: written once by the sender, copied out by each reader, beside the computing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ringspan.attention.mail import Pieces, UnderWay, Wire
from ringspan.attention.outbox import Message, Outbox, Place
from ringspan.attention.program import Batch
from ringspan.kernels import accumulator_dtype
from ringspan.schedule import Send
from ringspan.transport import PeerMemory, Pending, Transport


class PeerCourier:
    """One pass through peer memory. See `Courier`.

    Args:
        outbox: this rank's part in it.
        memory: the ranks' outboxes and signals.
        transport: counts what is sent.
        wire: in which dtypes results travel.
    """

    def __init__(self, outbox: Outbox, memory: PeerMemory, transport: Transport, wire: Wire) -> None:
        self._outbox, self._memory, self._transport, self._wire = outbox, memory, transport, wire
        self._mine = memory.outbox(transport.rank)
        self._written: set[tuple[str, int, int]] = set()

    def post(self, batch: Batch, outgoing: Pieces, incoming: Pieces) -> Pending:
        """See `Courier.post`.

        What is sent is copied into the outbox before the computing begins. Beside a kernel that fills the GPU such a copy would find no
        multiprocessor until that kernel ends, and the peer's copy engine nothing to read: then nothing is hidden at all.
        """
        posting, memory = self._outbox.postings[batch.index], self._memory

        def read() -> None:
            for message, parts in posting.read:
                memory.wait(message.peer, _ready(message))
                theirs = memory.outbox(message.peer)
                for position, places in parts:
                    for target, place in zip(incoming[position], places, strict=False):
                        target.copy_(_tensor(theirs, place, target.shape, target.dtype))
                memory.signal(message.peer, _free(message))

        for message in posting.awaited:
            memory.wait(message.peer, _free(message))
        for send, tensors, places in zip(batch.sends, outgoing, posting.written, strict=True):
            self._write(batch, send, tensors, places)
        for message in posting.ready:
            memory.signal(message.peer, _ready(message))
        # What arrives is copied beside the computing and must not be freed before.
        return UnderWay(memory.aside(batch.lane, read), (outgoing, incoming))

    def _write(self, batch: Batch, send: Send, tensors: Sequence[Tensor], places: tuple[Place, ...]) -> None:
        piece, own = send.piece, send.piece.owner == self._transport.rank and batch.lane == 0
        there = own and (piece.kind, piece.start, piece.stop) in self._written
        for tensor, place in zip(tensors, places, strict=False):
            target = _tensor(self._mine, place, tensor.shape, self._wire.dtype(batch, send, tensor))
            if not there:
                target.copy_(tensor)
            self._transport.bytes_sent[send.peer] += target.numel() * target.element_size()
        if own:
            self._written.add((piece.kind, piece.start, piece.stop))

    def finish(self) -> None:
        """See `Courier.finish`: who reads this rank's outbox is done with it."""
        for message in self._outbox.awaited:
            self._memory.wait(message.peer, _free(message))


def row_bytes(q: Tensor, k: Tensor, rounded: bool = False) -> dict[str, tuple[int, ...]]:
    """The bytes of a row of each component of each kind of piece, for `q` and `k [batch, shard, heads, head_dim]`.

    Results are as wide as sums, or, `rounded`, as a kernel gives them.
    """
    batch, _, heads, head_dim = q.shape
    element, wide = q.element_size(), accumulator_dtype(q.dtype).itemsize
    result = element if rounded else wide
    query, key, stats = batch * heads * head_dim, batch * k.shape[2] * head_dim, batch * heads
    return {
        "q": (query * element,),
        "kv": (key * element, key * element),
        "o": (query * result, stats * wide),
        # dO, out, lse, and the gradient of lse where there is one.
        "do": (query * element, query * element, stats * wide, stats * wide),
        "dq": (query * result,),
        "dkv": (key * result, key * result),
    }


def _ready(message: Message) -> int:
    return 2 * message.index


def _free(message: Message) -> int:
    return 2 * message.index + 1


def _tensor(outbox: Tensor, place: Place, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """`place` as a tensor."""
    nbytes = shape.numel() * dtype.itemsize
    assert nbytes <= place.nbytes, f"{shape} of {dtype} in a place of {place.nbytes} bytes"
    return outbox[place.offset : place.offset + nbytes].view(dtype).view(shape)
