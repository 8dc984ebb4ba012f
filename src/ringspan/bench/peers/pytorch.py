"""PyTorch's own context parallelism: `torch.distributed.tensor.experimental.context_parallel` around scaled_dot_product_attention.

Inside the context SDPA is a ring over DTensors; its load balancer is a zigzag. Which positions a rank has is asked of the context itself,
by letting it shard the numbers 0, 1, 2, …
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.attention import SDPBackend, sdpa_kernel

from ringspan.bench.case import Shape
from ringspan.bench.passes import Passes, passes_of
from ringspan.bench.peers.protocol import alone, divides, plain_mask
from ringspan.errors import RingspanError
from ringspan.transport import Transport
from ringspan.verify import Inputs

_PRIVATE = "torch.distributed.tensor.experimental._attention"


class PyTorch:
    """`context_parallel` with one of its two ways of moving keys: `allgather`, its default, or `alltoall`, a ring."""

    def __init__(self, rotation: str) -> None:
        self.rotation = rotation
        self.name = f"pytorch_{rotation}"

    def refusal(self, shape: Shape, device: torch.device) -> str:
        """It is a part of torch, for CUDA, and takes the causal and the full mask."""
        if device.type != "cuda":
            return "context_parallel has no rule for the SDPA kernel of CPUs"
        if not plain_mask(shape):
            return f"context_parallel around SDPA takes causal or no mask, not {shape.mask_text}"
        if shape.torch_dtype.itemsize != 2:
            return "SDPA's flash kernels compute float16 and bfloat16"
        return alone(shape) or divides(shape, shape.num_ranks)

    def kernel(self, device: torch.device) -> str:
        """The SDPA backend that it is given."""
        return "cudnn" if self._backend(device) is SDPBackend.CUDNN_ATTENTION else "flash2"

    @staticmethod
    def _backend(device: torch.device) -> SDPBackend:
        fast = device.type == "cuda" and torch.backends.cudnn.is_available() and torch.cuda.get_device_capability(device) >= (9, 0)
        return SDPBackend.CUDNN_ATTENTION if fast else SDPBackend.FLASH_ATTENTION

    @contextmanager
    def open(self, shape: Shape, inputs: Inputs, transport: Transport) -> Iterator[Passes]:
        """See `Peer.open`."""
        experimental = importlib.import_module("torch.distributed.tensor.experimental")
        private = importlib.import_module(_PRIVATE)
        device = inputs.q.device
        mesh = init_device_mesh(device.type, (transport.size,))
        causal = plain_mask(shape) == "causal"
        options = getattr(private, "_cp_options", None)
        if options is None and not causal:
            raise RingspanError("context_parallel with a full mask", "this torch has no switch for its load balancer")
        before = None if options is None else options.enable_load_balance
        if options is not None:
            # Its load balancer is made for causal masks, and refuses others.
            options.enable_load_balance = causal
        positions = torch.arange(shape.length, device=device).view(1, 1, shape.length, 1)
        try:
            _set_rotation(experimental, private, self.rotation)
            with (
                experimental.context_parallel(mesh, buffers=[positions], buffer_seq_dims=[2], no_restore_buffers={positions}),
                sdpa_kernel([self._backend(device)]),
            ):
                own = positions.flatten().clone()
                yield passes_of(lambda q, k, v: _attend(q, k, v, causal), inputs, lambda tensor: tensor.index_select(1, own))
        finally:
            if options is not None:
                options.enable_load_balance = before


def _attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    # By its module's name at each call: the context replaces it there.
    functional = torch.nn.functional
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    out = functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)


def _set_rotation(experimental, private, rotation: str) -> None:
    setter = getattr(private, "set_rotate_method", None) or getattr(experimental, "set_rotate_method", None)
    if setter is None:
        raise RingspanError(f"context_parallel with rotation {rotation}", f"torch {torch.__version__} has no set_rotate_method")
    setter(rotation)
