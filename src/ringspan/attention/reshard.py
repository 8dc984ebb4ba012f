"""The exchange of positions for heads, and back: DeepSpeed-Ulysses' all-to-alls, for any shards and any heads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ringspan.attention.observe import AFTER, BEFORE, Observer, Swap, watch
from ringspan.geometry import Grid, HeadShare, Layout, head_shares, rows_within
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

    def to_heads(self, parts: list[Tensor], heads: list[list[slice]]) -> list[Tensor]:
        """From `[batch, own rows, all heads, …]` to `[batch, group's rows, own heads, …]`; `heads[i][place]`: tensor i's for a place.

        All tensors travel in one message a member.
        """
        sends = [torch.cat([part[:, :, heads[i][place]] for i, part in enumerate(parts)], 2) for place in range(len(self.members))]
        widths = [heads[i][self.place].stop - heads[i][self.place].start for i in range(len(parts))]
        shape = (parts[0].shape[0], sum(widths), *parts[0].shape[3:])
        buffers = [parts[0].new_empty((shape[0], length, *shape[1:])) for length in self.part_lengths]
        self._swap(sends, buffers, BEFORE)
        whole = parts[0].new_empty((shape[0], self.length, *shape[1:]))
        for buffer, rows in zip(buffers, self.rows, strict=True):
            for part_rows, whole_rows in rows:
                whole[:, whole_rows] = buffer[:, part_rows]
        return list(whole.split(widths, 2))

    def to_positions(self, wholes: list[Tensor], heads: list[list[slice]], totals: list[int]) -> list[Tensor]:
        """The way back: `[batch, group's rows, own heads, …]` to `[batch, own rows, totals[i] heads, …]`; shared heads add up."""
        packed = torch.cat(wholes, 2)
        sends = []
        for length, rows in zip(self.part_lengths, self.rows, strict=True):
            part = packed.new_empty((packed.shape[0], length, *packed.shape[2:]))
            for part_rows, whole_rows in rows:
                part[:, part_rows] = packed[:, whole_rows]
            sends.append(part)
        own = (packed.shape[0], self.part_lengths[self.place])
        widths = [[place.stop - place.start for place in of_tensor] for of_tensor in heads]
        buffers = [packed.new_empty((*own, sum(width[place] for width in widths), *packed.shape[3:])) for place in range(len(self.members))]
        self._swap(sends, buffers, AFTER)
        results = []
        for i, total in enumerate(totals):
            # Summed in the order of the places, in the accumulator's precision: the same at every run.
            result = packed.new_zeros((*own, total, *packed.shape[3:]), dtype=accumulator_dtype(packed.dtype))
            for place, buffer in enumerate(buffers):
                start = sum(width[place] for width in widths[:i])
                result[:, :, heads[i][place]] += buffer[:, :, start : start + widths[i][place]]
            results.append(result.to(packed.dtype))
        return results

    def _swap(self, sends: list[Tensor], buffers: list[Tensor], step: int) -> None:
        buffers[self.place].copy_(sends[self.place])
        others = [place for place in range(len(self.members)) if place != self.place]
        outgoing = [Parcel(sends[place].contiguous(), self.members[place]) for place in others if sends[place].numel()]
        incoming = [Parcel(buffers[place], self.members[place]) for place in others if buffers[place].numel()]
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


def _heads(exchange: Exchange, *, kv: bool) -> list[slice]:
    return [slice(s.kv_start, s.kv_stop) if kv else slice(s.q_start, s.q_stop) for s in exchange.shares]


class PositionsToHeads(torch.autograd.Function):
    """q, k, v `[batch, shard, heads, head_dim]` to those of the whole head group's positions and this rank's heads: one all-to-all."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, exchange: Exchange) -> tuple[Tensor, Tensor, Tensor]:
        """Every member gets its heads of this rank's positions."""
        ctx.exchange, ctx.totals = exchange, [q.shape[2], k.shape[2], v.shape[2]]
        ctx.heads = [_heads(exchange, kv=False), _heads(exchange, kv=True), _heads(exchange, kv=True)]
        q, k, v = exchange.to_heads([q, k, v], ctx.heads)
        return q.contiguous(), k.contiguous(), v.contiguous()

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        """Every owner gets back the gradients of its positions; those of a key head that several places used are added."""
        return *ctx.exchange.to_positions(list(gradients), ctx.heads, ctx.totals), None


class HeadsToPositions(torch.autograd.Function):
    """out and lse of this rank's heads to those of its own positions and all heads."""

    @staticmethod
    def forward(ctx, out: Tensor, lse: Tensor | None, exchange: Exchange, heads: int) -> tuple[Tensor, Tensor | None]:
        """Every owner gets its positions from every member; lse only where it is wanted."""
        ctx.exchange, ctx.heads = exchange, [_heads(exchange, kv=False)]
        ctx.set_materialize_grads(False)
        (out,) = exchange.to_positions([out], ctx.heads, [heads])
        if lse is None:
            return out, None
        (lse,) = exchange.to_positions([lse.transpose(1, 2)], ctx.heads, [heads])
        return out, lse.transpose(1, 2)

    @staticmethod
    def backward(ctx, *gradients: Tensor | None):
        """Every member gets the gradients of its heads."""
        dout, dlse = gradients
        dout = None if dout is None else ctx.exchange.to_heads([dout.contiguous()], ctx.heads)[0]
        dlse = None if dlse is None else ctx.exchange.to_heads([dlse.transpose(1, 2).contiguous()], ctx.heads)[0].transpose(1, 2)
        return dout, dlse, None, None
