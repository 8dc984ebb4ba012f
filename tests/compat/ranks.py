"""What each process of test_processes.py does: other libraries' calls over gloo, beside torch's attention of the whole."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import ringspan
from ringspan import compat
from ringspan.errors import RingspanError, UnsupportedError


def whole(seed: int, length: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, length, 4, 8, generator=generator, dtype=torch.float64) for _ in range(3)]


def check(found: Tensor, inputs: list[Tensor], own: Tensor) -> None:
    q, k, v = (x.transpose(1, 2) for x in inputs)
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)[:, own]
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)


def everything(world: dist.ProcessGroup) -> None:
    """On four processes."""
    rank, size = dist.get_rank(), dist.get_world_size()

    # Two sequences at once, each shared by two neighbours.
    compat.set_seq_parallel_pg(2, 1, rank, size)
    inputs = whole(rank // 2, 8)
    attention = compat.LongContextAttention()
    check(attention(*(attention.shard(x) for x in inputs), causal=True), inputs, attention.shard(torch.arange(8), 0))

    # One sequence of all four: the default group, a mesh, and a group by name.
    mesh = init_device_mesh("cpu", (size,))
    positions = torch.arange(16)
    own = torch.cat([positions.chunk(2 * size)[rank], positions.chunk(2 * size)[2 * size - 1 - rank]])
    inputs = whole(7, 16)
    shards = [x[:, own].requires_grad_() for x in inputs]
    for group in (None, mesh, world):
        check(ringspan.attention(*shards, causal=True, group=group), inputs, own)
        check(compat.zigzag_ring_flash_attn_func(*shards, causal=True, group=group), inputs, own)
    with pytest.raises(UnsupportedError if rank == 1 else RingspanError, match=r"dropout_p=0\.1"):
        ringspan.attention(*shards, dropout_p=0.1 if rank == 1 else 0.0, softcap=1.0)
    ringspan.attention(*shards, causal=True).sum().backward()
