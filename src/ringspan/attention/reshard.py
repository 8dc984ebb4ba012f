"""The exchange of positions for heads, and back: DeepSpeed-Ulysses' all-to-alls, for any shards and any heads."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ringspan.attention.observe import AFTER, BEFORE, Observer, Swap, watch
from ringspan.geometry import Grid, HeadShare, Layout, head_shares, rows_within, shared_keys
from ringspan.kernels import accumulator_dtype
from ringspan.transport import Parcel, Transport


@dataclass(frozen=True)
class Exchange:
    """Who exchanges what within one head group.

    Attributes:
        transport: of all ranks.
        members: the ranks of this rank's head group, by place.
        place: this rank's.
        shares: each place's heads.
        rows: for each place, where its rows lie among the head group's, as `rows_within` tells.
        part_lengths: for each place, how many positions it owns.
        length: how many positions the head group owns.
        observer: looks on.
    """

    transport: Transport
    members: tuple[int, ...]
    place: int
    shares: tuple[HeadShare, ...]
    rows: tuple[tuple[tuple[slice, slice], ...], ...]
    part_lengths: tuple[int, ...]
    length: int
    observer: Observer | None = None

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

    def inputs_to_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`[batch, own rows, all heads, head_dim]` to `[batch, group's rows, own heads, head_dim]`: one message a member."""
        q, k, v = self._to_heads([q, k, v], [self.q_heads, self.kv_heads, self.kv_heads])
        return q, k, v

    def outputs_to_positions(self, out: Tensor, lse: Tensor | None, heads: int) -> tuple[Tensor, Tensor | None]:
        """out, and lse `[batch, heads, rows]` where it is wanted, of own heads and the group's rows to those of own rows and all heads."""
        places = len(self.members)
        (out,) = self._to_positions([out], [self.q_heads], [heads], [[out.dtype] * places], [out.dtype])
        if lse is not None:
            (lse,) = self._to_positions([lse.transpose(1, 2)], [self.q_heads], [heads], [[lse.dtype] * places], [lse.dtype])
            lse = lse.transpose(1, 2)
        return out, lse

    def output_gradients_to_heads(self, dout: Tensor, dlse: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The gradients of what `outputs_to_positions` returned to those of what it was given."""
        (dout,) = self._to_heads([dout], [self.q_heads])
        if dlse is not None:
            (dlse,) = self._to_heads([dlse.transpose(1, 2)], [self.q_heads])
            dlse = dlse.transpose(1, 2)
        return dout, dlse

    def input_gradients_to_positions(self, dq: Tensor, dk: Tensor, dv: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of what `inputs_to_heads` returned to those of what it was given, all in the dtype of `dq`.

        `dk` and `dv` are in `key_gradients_in` that dtype. What several places made of a key head is added.
        """
        keys = [self.key_gradients_in(dq.dtype, place) for place in range(len(self.members))]
        dtypes = [[dq.dtype] * len(self.members), keys, keys]
        split = [self.q_heads, self.kv_heads, self.kv_heads]
        dq, dk, dv = self._to_positions([dq, dk, dv], split, [heads, kv_heads, kv_heads], dtypes, [dq.dtype] * 3)
        return dq, dk, dv

    def _to_heads(self, parts: list[Tensor], heads: list[list[slice]]) -> list[Tensor]:
        """`heads[i][place]`: those of tensor i that a place has. All tensors are of one dtype."""
        batch, own, rest = parts[0].shape[0], self.part_lengths[self.place], parts[0].shape[3:]

        def packed(place: int) -> _Message:
            message = _segments(parts[0], [(batch, own, _width(of_tensor[place]), *rest) for of_tensor in heads])
            for segment, part, of_tensor in zip(message.segments, parts, heads, strict=True):
                segment.copy_(part[:, :, of_tensor[place]])
            return message

        def room(place: int) -> _Message:
            return _segments(parts[0], [(batch, self.part_lengths[place], _width(of_tensor[self.place]), *rest) for of_tensor in heads])

        buffers = {place: [room(place)] for place in self._others}
        # What was packed goes before there is room for the whole.
        self._swap({place: [packed(place)] for place in self._others}, buffers, BEFORE)
        wholes = [parts[0].new_empty((batch, self.length, _width(of_tensor[self.place]), *rest)) for of_tensor in heads]
        for place, rows in enumerate(self.rows):
            for i, (whole, of_tensor) in enumerate(zip(wholes, heads, strict=True)):
                came = parts[i][:, :, of_tensor[place]] if place == self.place else buffers[place][0].segments[i]
                for part_rows, whole_rows in rows:
                    whole[:, whole_rows] = came[:, part_rows]
        return wholes

    def _to_positions(
        self, wholes: list[Tensor], heads: list[list[slice]], totals: list[int], sent: list[list[torch.dtype]], wanted: list[torch.dtype]
    ) -> list[Tensor]:
        """The way back: heads that several places have add up.

        Args:
            wholes: `[batch, group's rows, own heads, …]` each.
            heads: `heads[i][place]`, those of tensor i that a place has.
            totals: how many heads tensor i has in all.
            sent: `sent[i][place]`, the dtype that tensor i has there, in which it travels.
            wanted: the dtype of result i.
        """
        batch, own, rest = wholes[0].shape[0], self.part_lengths[self.place], wholes[0].shape[3:]
        # What is of one dtype at a place travels from there as one message.
        alike = [_alike([of_tensor[place] for of_tensor in sent]) for place in range(len(self.members))]

        def packed(place: int, same: list[int]) -> _Message:
            message = _segments(wholes[same[0]], [(batch, self.part_lengths[place], *wholes[i].shape[2:]) for i in same])
            for segment, i in zip(message.segments, same, strict=True):
                for part_rows, whole_rows in self.rows[place]:
                    segment[:, part_rows] = wholes[i][:, whole_rows]
            return message

        def room(place: int, same: list[int]) -> _Message:
            return _segments(wholes[0], [(batch, own, _width(heads[i][place]), *rest) for i in same], sent[same[0]][place])

        buffers = {place: [room(place, same) for same in alike[place]] for place in self._others}
        self._swap({place: [packed(place, same) for same in alike[self.place]] for place in self._others}, buffers, AFTER)
        results = []
        for i, (total, dtype) in enumerate(zip(totals, wanted, strict=True)):
            came = {place: self._came(i, alike[place], messages) for place, messages in buffers.items()}
            if shared := sum(map(_width, heads[i])) != total:
                # Summed in the order of the places, in the accumulator's precision: the same at every run.
                result = wholes[0].new_zeros((batch, own, total, *rest), dtype=accumulator_dtype(dtype))
            else:
                result = wholes[0].new_empty((batch, own, total, *rest), dtype=dtype)
            for place, of_place in enumerate(heads[i]):
                into = result[:, :, of_place]
                if place == self.place:
                    mine = ((into[:, part_rows], wholes[i][:, whole_rows]) for part_rows, whole_rows in self.rows[place])
                else:
                    mine = [(into, came[place])]
                for target, source in mine:
                    target.add_(source) if shared else target.copy_(source)
            results.append(result.to(dtype))
        return results

    @staticmethod
    def _came(i: int, alike: list[list[int]], messages: list[_Message]) -> Tensor:
        """What came of tensor i in the messages of one place."""
        return next(message.segments[same.index(i)] for same, message in zip(alike, messages, strict=True) if i in same)

    @property
    def _others(self) -> list[int]:
        return [place for place in range(len(self.members)) if place != self.place]

    def _swap(self, sends: dict[int, list[_Message]], buffers: dict[int, list[_Message]], step: int) -> None:
        """`sends[place]` go to that place, and `buffers[place]` are filled with what it sends here; nothing is sent of what is empty."""
        outgoing, incoming = (
            [Parcel(message.whole, self.members[place]) for place in self._others for message in way[place] if message.whole.numel()]
            for way in (sends, buffers)
        )
        swap = None if self.observer is None else Swap.of(outgoing, incoming)
        with watch(self.observer, step, "post", swap):
            pending = self.transport.exchange(outgoing, incoming)
        token = None if self.observer is None else self.observer.begin(step, "transfer", swap, pending)
        with watch(self.observer, step, "wait", swap):
            pending.wait()
        if self.observer is not None:
            self.observer.end(token)


class _Message(NamedTuple):
    """A tensor of one dimension, and what lies in it, one after the other."""

    whole: Tensor
    segments: list[Tensor]


def _segments(like: Tensor, shapes: list[tuple[int, ...]], dtype: torch.dtype | None = None) -> _Message:
    """Room for tensors of `shapes`, one message, of the device of `like`, and of its dtype unless another is given."""
    sizes = [math.prod(shape) for shape in shapes]
    whole = like.new_empty(sum(sizes), dtype=dtype)
    return _Message(whole, [part.view(shape) for part, shape in zip(whole.split(sizes), shapes, strict=True)])


def make_exchange(transport: Transport, grid: Grid, layout: Layout, merged: Layout, heads: int, kv_heads: int) -> Exchange:
    """The exchange of this rank, for `heads` query heads and `kv_heads` key heads."""
    group = grid.group(transport.rank)
    members = grid.head_group(group)
    return Exchange(
        transport,
        members,
        grid.place(transport.rank),
        head_shares(heads, kv_heads, grid.degree),
        tuple(tuple(rows_within(layout.shards[rank], merged.shards[group])) for rank in members),
        tuple(layout.shard_length(rank) for rank in members),
        merged.shard_length(group),
    )


def _width(heads: slice) -> int:
    return heads.stop - heads.start


def _alike(dtypes: list[torch.dtype]) -> list[list[int]]:
    """Indices of `dtypes` by dtype, each dtype where it first stands."""
    return [[i for i, other in enumerate(dtypes) if other == dtype] for dtype in dict.fromkeys(dtypes)]
