"""Some ranks of a transport, as a transport of their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import Tensor

from ringspan.transport.protocol import Parcel, Pending, Transport


class Subgroup:
    """The ranks `members` of `whole`, counted from 0. It moves tensors; ranks agree and reduce over the whole.

    Args:
        whole: the transport, of which this rank is a member.
        members: ranks of `whole`, this rank among them, in the subgroup's order.
    """

    def __init__(self, whole: Transport, members: Sequence[int]) -> None:
        self._whole, self._members = whole, tuple(members)
        self.rank, self.size = self._members.index(whole.rank), len(self._members)

    @property
    def bytes_sent(self) -> Counter[int]:
        """What the whole transport has sent, by ranks of the whole."""
        return self._whole.bytes_sent

    @property
    def devices(self) -> frozenset[str]:
        """See `Transport.devices`."""
        return self._whole.devices

    def exchange(self, sends: Sequence[Parcel], receives: Sequence[Parcel], lane: int = 0) -> Pending:
        """See `Transport.exchange`."""
        outgoing = [Parcel(tensor, self._members[peer]) for tensor, peer in sends]
        return self._whole.exchange(outgoing, [Parcel(tensor, self._members[peer]) for tensor, peer in receives], lane)

    def gather_objects(self, mine: object) -> list:
        """See `Transport.gather_objects`; every rank of the whole takes part."""
        said = self._whole.gather_objects(mine)
        return [said[member] for member in self._members]

    def all_reduce(self, tensor: Tensor, operation: str = "sum") -> None:
        """Not offered: sums go over the whole."""
        raise NotImplementedError("sums go over the whole transport")

    def broadcast(self, tensor: Tensor, source: int = 0) -> None:
        """Not offered: broadcasts go over the whole."""
        raise NotImplementedError("broadcasts go over the whole transport")
