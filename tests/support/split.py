"""Attention split over in-process ranks, put together again by positions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import ringspan
from ringspan.geometry import Mask
from ringspan.schedule import PieceBytes
from ringspan.strategies import link_bytes
from tests.support.dense import Outcome, Tensors

UNEVEN = (1.0, 2.0, 0.0, 1.5)


def weights_for(layout: str, num_ranks: int) -> tuple[float, ...] | None:
    """For layout `weighted`: uneven shares, every third of which is nothing."""
    return tuple(UNEVEN[rank % len(UNEVEN)] for rank in range(num_ranks)) if layout == "weighted" else None


@dataclass(frozen=True, kw_only=True)
class Split:
    """How attention is split."""

    num_ranks: int
    mask: Mask
    strategy: str = "ring"
    layout: str = "zigzag"
    kernel: str = "reference"
    scale: float | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def context(self, group: Any) -> ringspan.ContextParallel:
        """This rank's `ContextParallel`."""
        return ringspan.ContextParallel(
            group, strategy=self.strategy, layout=self.layout, kernel=self.kernel, weights=weights_for(self.layout, self.num_ranks),
            **self.options,
        )  # fmt: skip


@dataclass(frozen=True)
class Part:
    """What one rank has at the end. `sent` and `promised` are bytes by link."""

    positions: Tensor
    outcome: Outcome
    sent: dict[tuple[int, int], int]
    promised: dict[tuple[int, int], int]


def run_rank(split: Split, tensors: Tensors, group: Any) -> Part:
    """Forward and backward on this rank; every rank is given the same whole tensors."""
    context = split.context(group)
    sequence = context.sequence(tensors.q.shape[1], split.mask)
    before = dict(context.transport.bytes_sent)
    q, k, v = (sequence.shard(tensor).detach().requires_grad_() for tensor in (tensors.q, tensors.k, tensors.v))
    sinks = None if split.sinks is None else split.sinks.clone().requires_grad_()
    out, lse = sequence.attention(q, k, v, split.scale, softcap=split.softcap, sinks=sinks, return_lse=True)
    loss = (out * sequence.shard(tensors.dout)).sum()
    if tensors.dlse is not None:
        loss = loss + (lse * sequence.shard(tensors.dlse, dim=2)).masked_fill(torch.isneginf(lse), 0.0).sum()
    loss.backward()
    dsinks = None if sinks is None else sinks.grad
    outcome = Outcome(out.detach(), lse.detach(), *(_gradient(leaf) for leaf in (q, k, v)), dsinks=dsinks)
    sent = {(context.rank, peer): size - before.get(peer, 0) for peer, size in context.transport.bytes_sent.items()}
    sent = {link: size for link, size in sent.items() if size}
    return Part(sequence.positions, outcome, sent, promised_bytes(sequence, tensors))


def promised_bytes(sequence: ringspan.Sequence, tensors: Tensors) -> dict[tuple[int, int], int]:
    """What the schedule says of forward and backward, by link."""
    batch, _, heads, head_dim = tensors.q.shape
    sizes = PieceBytes(
        batch=batch, heads=heads, kv_heads=tensors.k.shape[2], head_dim=head_dim, element_bytes=tensors.q.element_size(),
        accumulator_bytes=8 if tensors.q.dtype == torch.float64 else 4,
    )  # fmt: skip
    total = link_bytes(sequence.schedules, sequence.layout, sizes, "forward", return_lse=True)
    total.update(link_bytes(sequence.schedules, sequence.layout, sizes, "backward", return_lse=True))
    return {link: size for link, size in total.items() if size}


def assemble(parts: list[Part], length: int) -> Outcome:
    """The whole from the parts, each written to its rank's positions; a position that nobody owns stays NaN."""
    whole: dict[str, Tensor] = {}
    for name in parts[0].outcome.named():
        shards = [part.outcome.named()[name] for part in parts]
        if name == "dsinks":
            whole[name] = torch.stack(shards).sum(0)
            continue
        dim = 2 if name == "lse" else 1
        shape = list(shards[0].shape)
        shape[dim] = length
        whole[name] = torch.full(shape, float("nan"), dtype=shards[0].dtype)
        for part, shard in zip(parts, shards, strict=True):
            whole[name].index_copy_(dim, part.positions, shard)
    return Outcome(**whole)


def split_attention(split: Split, tensors: Tensors, run: Callable[..., list[Part]] = ringspan.run_in_process) -> tuple[Outcome, list[Part]]:
    """Attention of whole tensors over `split.num_ranks` in-process ranks: the whole result, and each rank's part."""
    parts = run(split.num_ranks, lambda group: run_rank(split, tensors, group))
    return assemble(parts, tensors.q.shape[1]), parts


def _gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad
