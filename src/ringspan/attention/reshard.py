"""The exchange of positions for heads, and back: DeepSpeed-Ulysses' all-to-alls, for any shards and any heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, TypeVar

import torch
from torch import Tensor

from ringspan.attention.inbox import ALIGNMENT
from ringspan.attention.observe import AFTER, BEFORE, Observer
from ringspan.attention.swap import Arrived, Found, Group, Mail, Message, Swapper, aligned
from ringspan.geometry import Grid, HeadShare, Layout, head_shares, rows_within, shared_keys
from ringspan.kernels import Copy, accumulator_dtype, add_, copy_all, rows_first
from ringspan.transport import Pending

Result = TypeVar("Result")
Gathered = dict[str, list[Tensor]]
"""Results of all heads by what they are, each stage of the heads having filled in its own."""


class Coming(Generic[Result]):
    """What an exchange brings."""

    def __init__(self, pending: Sequence[Pending], result: Callable[[], Result]) -> None:
        self._pending, self._result = pending, result

    def wait(self) -> Result:
        """Once it is there: what the current stream does from here on comes after it. What it travelled in is let go."""
        pending, self._pending = self._pending, ()
        for each in pending:
            each.wait()
        return self._result()


@dataclass(frozen=True)
class Exchange:
    """Who exchanges what within one head group. Every method begins an exchange; that which `wait`s ends it.

    Attributes:
        swapper: carries what the ranks of this rank's head group give each other.
        group: these ranks, by place.
        shares: each place's heads: all of them, or those of one stage.
        rows: for each place, where its rows lie among the head group's, as `rows_within` tells.
        part_lengths: for each place, how many positions it owns.
        length: how many positions the head group owns.
        observer: looks on.
    """

    swapper: Swapper
    group: Group
    shares: tuple[HeadShare, ...]
    rows: tuple[tuple[tuple[slice, slice], ...], ...]
    part_lengths: tuple[int, ...]
    length: int
    observer: Observer | None = None

    @property
    def place(self) -> int:
        """This rank's in its head group."""
        return self.group.place

    @property
    def share(self) -> HeadShare:
        """This rank's heads."""
        return self.shares[self.place]

    @cached_property
    def q_heads(self) -> list[slice]:
        """Each place's query heads."""
        return [slice(share.q_start, share.q_stop) for share in self.shares]

    @cached_property
    def kv_heads(self) -> list[slice]:
        """Each place's key heads."""
        return [slice(share.kv_start, share.kv_stop) for share in self.shares]

    def key_gradients_in(self, dtype: torch.dtype, place: int | None = None) -> torch.dtype:
        """What dk and dv of keys in `dtype` travel in from `place` (this rank's, if not given) to their owners.

        A place that alone has its key heads has their whole gradient, and rounds it. Of a head that several places share each has a part,
        which the owner adds up: parts stay in the accumulator's precision, so that the sum alone is rounded.
        """
        shared = shared_keys(self.shares)[self.place if place is None else place]
        return accumulator_dtype(dtype) if shared else dtype

    def inputs_to_heads(self, q: Tensor, k: Tensor, v: Tensor) -> Coming[tuple[Tensor, Tensor, Tensor]]:
        """`[batch, own rows, all heads, head_dim]` to `[batch, group's rows, own heads, head_dim]`: one message a member."""
        pending, found = self._to_heads([q, k, v], [self.q_heads, self.kv_heads, self.kv_heads])
        return Coming([pending], lambda: (found[0], found[1], found[2]))

    def outputs_to_positions(self, out: Tensor, lse: Tensor | None, heads: int, into: Gathered) -> Coming[tuple[Tensor, Tensor | None]]:
        """out, and lse `[batch, heads, rows]` where it is wanted, of own heads and the group's rows to those of own rows and all heads."""
        places, pending = len(self.shares), []
        results = into.setdefault("out", []), into.setdefault("lse", [])
        for each, whole in zip((out, None if lse is None else lse.transpose(1, 2)), results, strict=True):
            if each is not None:
                pending.append(self._to_positions([each], [self.q_heads], [heads], [[each.dtype] * places], [each.dtype], whole))
        return Coming(pending, lambda: (results[0][0], None if lse is None else results[1][0].transpose(1, 2)))

    def output_gradients_to_heads(self, dout: Tensor, dlse: Tensor | None) -> Coming[tuple[Tensor, Tensor | None]]:
        """The gradients of what `outputs_to_positions` returned to those of what it was given."""
        (pending, found), of_lse = self._to_heads([dout], [self.q_heads]), None
        if dlse is not None:
            of_lse = self._to_heads([dlse.transpose(1, 2)], [self.q_heads])
        both = [pending] if of_lse is None else [pending, of_lse[0]]
        return Coming(both, lambda: (found[0], None if of_lse is None else of_lse[1][0].transpose(1, 2)))

    def input_gradients_to_positions(
        self, dq: Tensor, dk: Tensor, dv: Tensor, heads: int, kv_heads: int, into: Gathered
    ) -> Coming[tuple[Tensor, Tensor, Tensor]]:
        """The gradients of what `inputs_to_heads` returned to those of what it was given, all in the dtype of `dq`.

        `dk` and `dv` are in `key_gradients_in` that dtype. What several places made of a key head is added.
        """
        keys = [self.key_gradients_in(dq.dtype, place) for place in range(len(self.shares))]
        dtypes = [[dq.dtype] * len(self.shares), keys, keys]
        split, results = [self.q_heads, self.kv_heads, self.kv_heads], into.setdefault("gradients", [])
        pending = self._to_positions([dq, dk, dv], split, [heads, kv_heads, kv_heads], dtypes, [dq.dtype] * 3, results)
        return Coming([pending], lambda: (results[0], results[1], results[2]))

    def _to_heads(self, parts: list[Tensor], heads: list[list[slice]]) -> tuple[Pending, list[Tensor]]:
        """`heads[i][place]`: those of tensor i that a place has. All tensors are of one dtype. The list is filled meanwhile."""
        batch, rest = parts[0].shape[0], parts[0].shape[3:]

        def messages(source: int, target: int) -> Sequence[Message]:
            shapes = tuple((batch, self.part_lengths[source], _width(of_tensor[target]), *rest) for of_tensor in heads)
            return (Message(shapes, parts[0].dtype),)

        def copies(target: int, index: int, segments: list[Tensor]) -> list[Copy]:
            return [(segment, part[:, :, of_tensor[target]]) for segment, part, of_tensor in zip(segments, parts, heads, strict=True)]

        wholes: list[Tensor] = []

        def assembled(place: int, came: list[Tensor]) -> list[Copy]:
            return [
                (whole[:, whole_rows], part[:, part_rows])
                for whole, part in zip(wholes, came, strict=True)
                for part_rows, whole_rows in self.rows[place]
            ]

        def own() -> list[Copy]:
            wholes.extend(parts[0].new_empty((batch, self.length, _width(of_tensor[self.place]), *rest)) for of_tensor in heads)
            return assembled(self.place, [part[:, :, of_tensor[self.place]] for part, of_tensor in zip(parts, heads, strict=True)])

        def arrived(found: Found) -> None:
            copy_all([copy for place, (came,) in found.items() for copy in assembled(place, came)])

        return self._swap(Mail(messages, copies, own), arrived, parts[0].device, BEFORE), wholes

    def _to_positions(
        self, wholes: list[Tensor], heads: list[list[slice]], totals: list[int], sent: list[list[torch.dtype]], wanted: list[torch.dtype],
        results: list[Tensor],
    ) -> Pending:  # fmt: skip
        """The way back: heads that several places have add up.

        Args:
            wholes: `[batch, group's rows, own heads, …]` each.
            heads: `heads[i][place]`, those of tensor i that a place has.
            totals: how many heads tensor i has in all.
            sent: `sent[i][place]`, the dtype that tensor i has there, in which it travels.
            wanted: the dtype of result i.
            results: where this is the first stage of several none yet, of all heads; they are there before what is returned has waited.
        """
        batch, own_rows, rest = wholes[0].shape[0], self.part_lengths[self.place], wholes[0].shape[3:]
        # What is of one dtype at a place travels from there as one message.
        alike = [_alike([of_tensor[place] for of_tensor in sent]) for place in range(len(self.shares))]

        def messages(source: int, target: int) -> Sequence[Message]:
            rows = batch, self.part_lengths[target]
            return [Message(tuple((*rows, _width(heads[i][source]), *rest) for i in same), sent[same[0]][source]) for same in alike[source]]

        def copies(target: int, index: int, segments: list[Tensor]) -> list[Copy]:
            return [
                (segment[:, part_rows], wholes[i][:, whole_rows])
                for segment, i in zip(segments, alike[self.place][index], strict=True)
                for part_rows, whole_rows in self.rows[target]
            ]

        def of_own(i: int) -> list[tuple[slice, Tensor]]:
            return [(part_rows, wholes[i][:, whole_rows]) for part_rows, whole_rows in self.rows[self.place]]

        def own() -> list[Copy]:
            if not results:
                shapes = [(batch, own_rows, of, *rest) for of in totals]
                results.extend(wholes[0].new_empty(shape, dtype=dtype) for shape, dtype in zip(shapes, wanted, strict=True))
            alone = [i for i, of_tensor in enumerate(heads) if _sharers(of_tensor, self.place) == [self.place]]
            return [(results[i][:, rows, heads[i][self.place]], part) for i in alone for rows, part in of_own(i)]

        def arrived(found: Found) -> None:
            late: list[Copy] = []
            for i, of_tensor in enumerate(heads):
                came = {place: self._came(i, alike[place], tensors) for place, tensors in found.items()}
                for place, of_place in enumerate(of_tensor):
                    sharers, into = _sharers(of_tensor, place), results[i][:, :, of_place]
                    if sharers == [place]:
                        late += [(into, came[place])] if place != self.place else []
                    elif place == sharers[0] and _width(of_place):
                        # In the order of the places: the same at every run. Of the first two either may be, and one that came has all rows.
                        first, *others = sharers if place != self.place else [sharers[1], place, *sharers[2:]]
                        parts: list[tuple[int, Tensor]] = []
                        for other in others:
                            parts += [(rows.start, part) for rows, part in of_own(i)] if other == self.place else [(0, came[other])]
                        add_(rows_first(came[first]), [(start, rows_first(part)) for start, part in parts], into=rows_first(into))
            copy_all(late)

        return self._swap(Mail(messages, copies, own), arrived, wholes[0].device, AFTER)

    @staticmethod
    def _came(i: int, alike: list[list[int]], tensors: list[list[Tensor]]) -> Tensor:
        """What came of tensor i in the messages of one place."""
        return next(of_message[same.index(i)] for same, of_message in zip(alike, tensors, strict=True) if i in same)

    def _swap(self, mail: Mail, arrived: Arrived, device: torch.device, step: int) -> Pending:
        return self.swapper.swap(mail, arrived, device, self.observer, step)


def make_exchange(
    swapper: Swapper, group: Group, grid: Grid, layout: Layout, merged: Layout, shares: tuple[HeadShare, ...]
) -> Exchange:  # fmt: skip
    """The exchange of the rank of `group`, where each place has the heads in `shares`."""
    mine = grid.group(group.members[group.place])
    return Exchange(
        swapper,
        group,
        shares,
        tuple(tuple(rows_within(layout.shards[rank], merged.shards[mine])) for rank in group.members),
        tuple(layout.shard_length(rank) for rank in group.members),
        merged.shard_length(mine),
    )


def head_group(grid: Grid, rank: int) -> Group:
    """Who `rank` exchanges with."""
    return Group(grid.head_group(grid.group(rank)), grid.place(rank))


def inbox_bytes(grid: Grid, layout: Layout, q: Tensor, kv_heads: int) -> int:
    """Room for all that any rank is sent in any exchange of q `[batch, shard, heads, head_dim]`: the same on every rank."""
    batch, _, heads, head_dim = q.shape
    shares = head_shares(heads, kv_heads, grid.degree)
    element, wide = q.element_size(), accumulator_dtype(q.dtype).itemsize
    query, key = max(share.heads for share in shares), max(share.kv_heads for share in shares)
    rows = batch * max(layout.shard_lengths)
    # q, k and v there, or their gradients back, those of keys in the accumulator's precision where several places share a head; or lse.
    most = max(rows * head_dim * (query * element + 2 * key * (wide if any(shared_keys(shares)) else element)), rows * query * wide)
    return (grid.degree - 1) * (aligned(most) + ALIGNMENT)


def _width(heads: slice) -> int:
    return heads.stop - heads.start


def _sharers(heads: list[slice], place: int) -> list[int]:
    """All places that have the heads that `place` has."""
    return [other for other, theirs in enumerate(heads) if theirs == heads[place]]


def _alike(dtypes: list[torch.dtype]) -> list[list[int]]:
    """Indices of `dtypes` by dtype, each dtype where it first stands."""
    return [[i for i, other in enumerate(dtypes) if other == dtype] for dtype in dict.fromkeys(dtypes)]
