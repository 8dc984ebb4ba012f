"""The exchange of positions for heads, and back: DeepSpeed-Ulysses' all-to-alls, for any shards and any heads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

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
        return q.contiguous(), k.contiguous(), v.contiguous()

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
        (dout,) = self._to_heads([dout.contiguous()], [self.q_heads])
        if dlse is not None:
            (dlse,) = self._to_heads([dlse.transpose(1, 2).contiguous()], [self.q_heads])
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
        sends = [[torch.cat([part[:, :, heads[i][place]] for i, part in enumerate(parts)], 2)] for place in range(len(self.members))]
        widths = [_width(heads[i][self.place]) for i in range(len(parts))]
        shape = (parts[0].shape[0], sum(widths), *parts[0].shape[3:])
        buffers = [[parts[0].new_empty((shape[0], length, *shape[1:]))] for length in self.part_lengths]
        self._swap(sends, buffers, BEFORE)
        whole = parts[0].new_empty((shape[0], self.length, *shape[1:]))
        for (buffer,), rows in zip(buffers, self.rows, strict=True):
            for part_rows, whole_rows in rows:
                whole[:, whole_rows] = buffer[:, part_rows]
        return list(whole.split(widths, 2))

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
        places = range(len(self.members))
        # What is of one dtype at a place travels from there as one tensor.
        alike = [_alike([of_tensor[place] for of_tensor in sent]) for place in places]
        packed = [torch.cat([wholes[i] for i in indices], 2) for indices in alike[self.place]]
        sends = [[self._rows_of(place, tensor) for tensor in packed] for place in places]
        own, rest = (wholes[0].shape[0], self.part_lengths[self.place]), wholes[0].shape[3:]
        widths = [[_width(of_tensor[place]) for of_tensor in heads] for place in places]
        buffers = [
            [wholes[0].new_empty((*own, sum(widths[place][i] for i in same), *rest), dtype=sent[same[0]][place]) for same in alike[place]]
            for place in places
        ]
        self._swap(sends, buffers, AFTER)
        # Summed in the order of the places, in the accumulator's precision: the same at every run.
        results = [
            wholes[0].new_zeros((*own, total, *rest), dtype=accumulator_dtype(dtype)) for total, dtype in zip(totals, wanted, strict=True)
        ]
        for place in places:
            for same, buffer in zip(alike[place], buffers[place], strict=True):
                for i, part in zip(same, buffer.split([widths[place][i] for i in same], 2), strict=True):
                    results[i][:, :, heads[i][place]] += part
        return [result.to(dtype) for result, dtype in zip(results, wanted, strict=True)]

    def _rows_of(self, place: int, whole: Tensor) -> Tensor:
        part = whole.new_empty((whole.shape[0], self.part_lengths[place], *whole.shape[2:]))
        for part_rows, whole_rows in self.rows[place]:
            part[:, part_rows] = whole[:, whole_rows]
        return part

    def _swap(self, sends: list[list[Tensor]], buffers: list[list[Tensor]], step: int) -> None:
        """`sends[place]` go to that place, and `buffers[place]` are filled with what it sends here; nothing is sent of what is empty."""
        for mine, kept in zip(sends[self.place], buffers[self.place], strict=True):
            kept.copy_(mine)
        others = [place for place in range(len(self.members)) if place != self.place]
        outgoing = [Parcel(tensor.contiguous(), self.members[place]) for place in others for tensor in sends[place] if tensor.numel()]
        incoming = [Parcel(buffer, self.members[place]) for place in others for buffer in buffers[place] if buffer.numel()]
        swap = None if self.observer is None else Swap.of(outgoing, incoming)
        with watch(self.observer, step, "post", swap):
            pending = self.transport.exchange(outgoing, incoming)
        token = None if self.observer is None else self.observer.begin(step, "transfer", swap, pending)
        with watch(self.observer, step, "wait", swap):
            pending.wait()
        if self.observer is not None:
            self.observer.end(token)


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
