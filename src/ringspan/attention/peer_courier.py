"""Carries the batches of a pass through peer memory: written once, by the sender, where the receiver's kernels read it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ringspan.attention.inbox import Inbox, Message, Place
from ringspan.attention.mail import Component, Pieces, UnderWay, Wire
from ringspan.attention.observe import BEFORE
from ringspan.attention.program import Batch
from ringspan.attention.shelf import adjacent
from ringspan.kernels import accumulator_dtype, copy_all
from ringspan.schedule import Piece, Send
from ringspan.transport import PeerMemory, Pending, Transport

Written = tuple[Message, tuple[tuple[int, tuple[Place, ...]], ...]]
"""See `Posting.written`."""

MOST_BYTES = 1 << 24
"""That one kernel copies: copy engines carry more as fast. Nor does it beside other kernels: it would wait for a multiprocessor."""


class PeerCourier:
    """One pass through peer memory. See `Courier`.

    Args:
        inbox: this rank's part in it.
        memory: the ranks' inboxes and signals.
        transport: counts what is sent.
        wire: in which dtypes results travel.
    """

    lends = True

    def __init__(self, inbox: Inbox, memory: PeerMemory, transport: Transport, wire: Wire) -> None:
        self._inbox, self._memory, self._transport, self._wire = inbox, memory, transport, wire
        self._packed: dict[Piece, list[Tensor]] = {}

    def buffers(self, batch: Batch, components: Sequence[Sequence[Component]]) -> list[list[Tensor]]:
        """See `Courier.buffers`: in this rank's inbox."""
        places = self._inbox.postings[batch.index].places
        mine = self._memory.inbox(self._transport.rank)
        return [
            [_tensor(mine, place, shape, dtype) for (shape, dtype), place in zip(each, there, strict=True)]
            for each, there in zip(components, places, strict=True)
        ]

    def post(self, batch: Batch, outgoing: Pieces, incoming: Pieces) -> Pending:
        """See `Courier.post`.

        What is not contiguous, or not in the dtype in which it travels, is packed before the computing begins. Beside a kernel that fills
        the GPU such a copy would find no multiprocessor until that kernel ends, and the copy engine nothing to carry: then nothing is
        hidden at all.
        """
        posting, memory = self._inbox.postings[batch.index], self._memory
        packed = [self._pack(batch, send, tensors) for send, tensors in zip(batch.sends, outgoing, strict=True)]

        def copies(message: Message, parts: Sequence[tuple[int, tuple[Place, ...]]]) -> list[tuple[Tensor, Tensor]]:
            theirs = memory.inbox(message.peer)
            pairs = (pair for position, places in parts for pair in _as_one(packed[position], places))
            return [(_tensor(theirs, place, tensor.shape, tensor.dtype), tensor) for tensor, place in pairs]

        def write(*messages: Written) -> None:
            found = [pair for message in messages for pair in copies(*message)]
            if batch.idle and sum(target.nbytes for target, _ in found) <= MOST_BYTES:
                copy_all(found)
            else:
                for target, source in found:
                    target.copy_(source)
            memory.signal([_ready(message) for message, _ in messages])

        room = partial(memory.wait, [_free(message) for message, _ in posting.written])
        arrive = partial(memory.wait, [_ready(message) for message in posting.awaited])
        # Beside the computing each tells its receiver as soon as it is there; when nothing is computed any more, all are there at once.
        together = [posting.written] if batch.idle and posting.written else [(written,) for written in posting.written]
        # What is read beside the computing must not be freed before.
        return UnderWay(memory.aside(batch.lane, room, [partial(write, *messages) for messages in together], arrive), packed)

    def begin(self) -> None:
        """See `Courier.begin`.

        Raises:
            RingspanError: where an error left the pass before: nobody knows which of its signals are still set.
        """
        if self._inbox.messages:
            self._memory.begin()
        self.give_back(BEFORE)

    def end(self) -> None:
        """See `Courier.end`."""
        if self._inbox.messages:
            self._memory.end()

    def leave(self, held: object) -> None:
        """See `Courier.leave`."""
        if self._inbox.messages:
            self._memory.leave((held, self._packed))

    def frees(self, step: int) -> bool:
        """See `Courier.frees`."""
        return step in self._inbox.freed

    def give_back(self, step: int) -> None:
        """See `Courier.give_back`."""
        self._memory.signal([_free(message) for message in self._inbox.freed.get(step, ())])

    def _pack(self, batch: Batch, send: Send, tensors: Sequence[Tensor]) -> list[Tensor]:
        packed = self._packed.get(send.piece)
        if packed is None:
            packed = [tensor.to(self._wire.dtype(batch, send, tensor)).contiguous() for tensor in tensors]
            if batch.lane == 0 and send.piece.owner == self._transport.rank:
                # For all who read it.
                self._packed[send.piece] = packed
        self._transport.bytes_sent[self._memory.rank_of(send.peer)] += sum(tensor.numel() * tensor.element_size() for tensor in packed)
        return packed


def row_bytes(q: Tensor, k: Tensor, rounded: bool = False, lse_gradient: bool = False) -> dict[str, tuple[int, ...]]:
    """The bytes of a row of each component of each kind of piece, for `q` and `k [batch, shard, heads, head_dim]`.

    Results are as wide as sums, or, `rounded`, as a kernel gives them. `lse_gradient`: the gradient of lse travels with dO.
    """
    batch, _, heads, head_dim = q.shape
    element, wide = q.element_size(), accumulator_dtype(q.dtype).itemsize
    result = element if rounded else wide
    query, key, stats = batch * heads * head_dim, batch * k.shape[2] * head_dim, batch * heads
    return {
        "q": (query * element,),
        "kv": (key * element, key * element),
        "o": (query * result, stats * wide),
        # dO, out, lse, and the gradient of lse.
        "do": (query * element, query * element, stats * wide, *[stats * wide] * lse_gradient),
        "dq": (query * result,),
        "dkv": (key * result, key * result),
    }


def _ready(message: Message) -> tuple[int, int]:
    return message.peer, 2 * message.index


def _free(message: Message) -> tuple[int, int]:
    return message.peer, 2 * message.index + 1


def _as_one(tensors: Sequence[Tensor], places: Sequence[Place]) -> list[tuple[Tensor, Place]]:
    """What goes where: one copy for all that lies side by side here and there."""
    ends = [place.offset + place.nbytes for place in places]
    whole = adjacent(tensors) if [place.offset for place in places[1:]] == ends[:-1] else None
    if whole is None:
        return list(zip(tensors, places, strict=True))
    return [(whole, Place(places[0].offset, ends[-1] - places[0].offset))]


def _tensor(inbox: Tensor, place: Place, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """`place` as a tensor."""
    shape = torch.Size(shape)
    nbytes = shape.numel() * dtype.itemsize
    assert nbytes <= place.nbytes, f"{shape} of {dtype} in a place of {place.nbytes} bytes"
    return inbox[place.offset : place.offset + nbytes].view(dtype).view(shape)
