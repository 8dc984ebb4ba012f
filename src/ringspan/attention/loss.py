"""Labels and losses of a split sequence that equal those of the whole one, by construction."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ringspan.attention.observe import AFTER, Observer, watch
from ringspan.transport import Transport

IGNORE_INDEX = -100
"""What torch and Hugging Face call a position without a label."""


def shift_labels(labels: Tensor) -> Tensor:
    """`labels [batch, length]` in Hugging Face's convention, moved so that position t holds the token at t + 1; the last has none."""
    shifted = torch.full_like(labels, IGNORE_INDEX)
    shifted[:, :-1] = labels[:, 1:]
    return shifted


class SumOverRanks(torch.autograd.Function):
    """The sum over the ranks, whose gradient is this rank's own: every rank back-propagates its share, and the shares are summed later."""

    @staticmethod
    def forward(ctx, x: Tensor, transport: Transport) -> Tensor:
        total = x.detach().clone()
        transport.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        return gradients[0], None


def mean_cross_entropy(
    logits: Tensor, labels: Tensor, transport: Transport, ignore_index: int = IGNORE_INDEX, observer: Observer | None = None
) -> Tensor:
    """The mean cross-entropy over all ranks' labelled positions, the same on every rank.

    Args:
        logits: `[batch, shard, vocabulary]`.
        labels: `[batch, shard]`, already shifted.
        transport: of the ranks that share the sequence.
        ignore_index: the label of positions that do not count, besides −100.
        observer: looks on while the ranks sum.

    Returns:
        A scalar, 0 where no position counts. Its gradient is this rank's share: sum the parameters' gradients over the ranks.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    if ignore_index != IGNORE_INDEX:
        labels = labels.masked_fill(labels == IGNORE_INDEX, ignore_index)
    total = F.cross_entropy(logits.flatten(0, -2).to(wide), labels.flatten(), ignore_index=ignore_index, reduction="sum")
    count = (labels != ignore_index).sum().to(wide)
    with watch(observer, AFTER, "reduce"):
        total, count = SumOverRanks.apply(torch.stack((total, count)), transport).unbind()
    return total / count.detach().clamp(min=1)
