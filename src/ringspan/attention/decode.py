"""Decoding over a sharded cache: a few queries that every rank has, keys that stay where they are, one maximum and one sum.

Shyam et al., "Tree Attention" (2408.04093), Algorithm 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ringspan.geometry import Tile
from ringspan.kernels import Kernel, Scores, accumulator_dtype, without_autocast
from ringspan.transport import Transport


def decode(q: Tensor, k: Tensor, v: Tensor, scale: float, kernel: Kernel, transport: Transport) -> tuple[Tensor, Tensor]:
    """Attention of queries that see every key of every rank.

    Args:
        q: `[batch, queries, heads, head_dim]`, the same on every rank.
        k: `[batch, own keys, kv_heads, head_dim]`, this rank's; it may have none.
        v: like `k`.
        scale: of the scores.
        kernel: computes the local part.
        transport: of the ranks that share the keys.

    Returns:
        `out` like `q` and `lse [batch, heads, queries]`, the same on every rank.
    """
    wide = accumulator_dtype(q.dtype)
    if k.shape[1]:
        with without_autocast(q.device):
            out, lse = kernel.forward(q, k, v, Scores(Tile(0, q.shape[1], 0, k.shape[1]), scale))
        out, lse = out.to(wide), lse.to(wide)
    else:
        out = q.new_zeros(q.shape, dtype=wide)
        lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), float("-inf"), dtype=wide)
    highest = lse.clone()
    transport.all_reduce(highest, "max")
    weight = torch.exp(lse - torch.where(torch.isneginf(highest), torch.zeros_like(highest), highest))
    # Numerator and denominator in one message.
    sums = torch.cat((out * weight.transpose(1, 2).unsqueeze(-1), weight.transpose(1, 2).unsqueeze(-1)), -1)
    transport.all_reduce(sums)
    numerator, denominator = sums[..., :-1], sums[..., -1:]
    result = numerator / torch.where(denominator == 0, torch.ones_like(denominator), denominator)
    return result.to(q.dtype), highest + torch.log(denominator.squeeze(-1)).transpose(1, 2)
