"""yunchang: its Ulysses attention, two all-to-alls around flash-attn."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from ringspan.attention.sharding import take_shard
from ringspan.bench.case import Shape
from ringspan.bench.passes import Passes, passes_of
from ringspan.bench.peers.protocol import alone, divides, plain_mask
from ringspan.bench.peers.stand_in import flash_attn, is_installed
from ringspan.geometry import make_layout
from ringspan.transport import Transport
from ringspan.verify import Inputs

PACKAGE = "yunchang"


class Ulysses:
    """`yunchang.UlyssesAttention` over all ranks, contiguous shards."""

    name = "yunchang_ulysses"

    def refusal(self, shape: Shape, device: torch.device) -> str:
        """It wants equal shards, and KV heads that divide over the ranks."""
        if importlib.util.find_spec(PACKAGE) is None:
            return "yunchang is not installed: pip install --no-deps yunchang"
        if shape.torch_dtype.itemsize != 2:
            return "it is made for flash-attn, which computes float16 and bfloat16"
        if not plain_mask(shape):
            return f"it is tried with causal and full masks, not with {shape.mask_text}"
        if shape.kv_heads % shape.num_ranks:
            return f"{shape.kv_heads} KV heads do not divide over {shape.num_ranks} ranks"
        return alone(shape) or divides(shape, shape.num_ranks)

    def kernel(self, device: torch.device) -> str:
        """flash-attn, or what stands in for it."""
        return "flash2" if is_installed() or device.type == "cuda" else "torch_cpu"

    @contextmanager
    def open(self, shape: Shape, inputs: Inputs, transport: Transport) -> Iterator[Passes]:
        """See `Peer.open`."""
        with flash_attn():
            kernels = importlib.import_module("yunchang.kernels")
            package = importlib.import_module(PACKAGE)
        attention = package.UlyssesAttention(dist.group.WORLD, attn_type=kernels.AttnType.FA)
        layout = make_layout("contiguous", shape.length, transport.size)
        causal = plain_mask(shape) == "causal"

        def mine(tensor: Tensor) -> Tensor:
            return take_shard(tensor, layout, transport.rank, 1)

        yield passes_of(lambda q, k, v: attention(q, k, v, causal=causal), inputs, mine)
