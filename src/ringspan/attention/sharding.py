"""Whole tensors to shards and back."""

from __future__ import annotations

import torch
from torch import Tensor

from ringspan.geometry import Layout
from ringspan.kernels import first_order
from ringspan.transport import Parcel, Transport


def take_shard(x: Tensor, layout: Layout, rank: int, dim: int) -> Tensor:
    """The positions of `rank` along `dim` of a whole tensor, in the rank's local order. Differentiable."""
    before = (slice(None),) * (dim % x.ndim)
    parts = [x[(*before, slice(span.start, span.stop, span.step))] for span in layout.shards[rank]]
    if not parts:
        return x.narrow(dim, 0, 0).clone()
    return torch.cat(parts, dim)


def assemble(shards: list[Tensor], layout: Layout, dim: int) -> Tensor:
    """The whole tensor of which `shards` are the ranks' parts along `dim`: the inverse of `take_shard`."""
    shape = list(shards[0].shape)
    shape[dim] = layout.length
    whole = shards[0].new_empty(shape)
    before = (slice(None),) * (dim % whole.ndim)
    for shard, spans in zip(shards, layout.shards, strict=True):
        offset = 0
        for span in spans:
            whole[(*before, slice(span.start, span.stop, span.step))] = shard.narrow(dim, offset, len(span))
            offset += len(span)
    return whole


class Unshard(torch.autograd.Function):
    """All ranks' shards, put together on every rank. The gradient of a shard sums what all ranks ask of it."""

    @staticmethod
    def forward(ctx, x: Tensor, layout: Layout, transport: Transport, dim: int) -> Tensor:
        """Every rank sends its shard to every other."""
        ctx.layout, ctx.transport, ctx.dim = layout, transport, dim % x.ndim
        others = [rank for rank in range(transport.size) if rank != transport.rank]
        mine = x.contiguous()
        shards = []
        for rank in range(transport.size):
            shape = list(x.shape)
            shape[dim] = layout.shard_length(rank)
            shards.append(mine if rank == transport.rank else x.new_empty(shape))
        transport.exchange(
            [Parcel(mine, rank) for rank in others if mine.numel()],
            [Parcel(shards[rank], rank) for rank in others if shards[rank].numel()],
        ).wait()
        return assemble(shards, layout, ctx.dim)

    @staticmethod
    @first_order
    def backward(ctx, *gradients: Tensor):
        """Every rank sends to each owner the gradient of its shard; the owner adds them in rank order."""
        (gradient,) = gradients
        transport, layout = ctx.transport, ctx.layout
        others = [rank for rank in range(transport.size) if rank != transport.rank]
        sends = [Parcel(take_shard(gradient, layout, rank, ctx.dim).contiguous(), rank) for rank in others]
        mine = take_shard(gradient, layout, transport.rank, ctx.dim)
        arrived = {rank: torch.empty_like(mine, memory_format=torch.contiguous_format) for rank in others}
        transport.exchange(
            [parcel for parcel in sends if parcel.tensor.numel()],
            [Parcel(tensor, rank) for rank, tensor in arrived.items() if tensor.numel()],
        ).wait()
        total = torch.zeros_like(mine)
        for rank in range(transport.size):
            total = total + (mine if rank == transport.rank else arrived[rank])
        return total, None, None, None
