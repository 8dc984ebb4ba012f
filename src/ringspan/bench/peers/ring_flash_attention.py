"""ring-flash-attention (`ring-flash-attn`): its zigzag, ring, stripe and Llama 3 functions, as they are."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from types import ModuleType

import torch
from torch import Tensor

from ringspan.attention.sharding import take_shard
from ringspan.bench.case import Shape
from ringspan.bench.passes import Passes, passes_of
from ringspan.bench.peers.protocol import alone, divides, plain_mask
from ringspan.bench.peers.stand_in import flash_attn, is_installed
from ringspan.geometry import Layout, make_layout
from ringspan.transport import Transport
from ringspan.verify import Inputs

PACKAGE = "ring_flash_attn"
_LAYOUTS = {"zigzag": "zigzag", "ring": "contiguous", "stripe": "striped", "llama3": "contiguous"}
_MODULES = {
    "zigzag": "zigzag_ring_flash_attn",
    "ring": "ring_flash_attn",
    "stripe": "stripe_flash_attn",
    "llama3": "llama3_flash_attn_varlen",
}
HEADS_AT_A_TIME = 4
"""KV heads that its Llama 3 function gathers at a time, where so many divide them."""


class RingFlashAttention:
    """One of its variants: `zigzag`, `ring`, `stripe` or `llama3`."""

    def __init__(self, variant: str) -> None:
        self.variant = variant
        self.name = f"rfa_{variant}"

    def refusal(self, shape: Shape, device: torch.device) -> str:
        """It wants equal shards; documents and windows are its Llama 3 function's alone."""
        if importlib.util.find_spec(PACKAGE) is None:
            return "ring-flash-attn is not installed: pip install --no-deps ring-flash-attn"
        if shape.torch_dtype.itemsize != 2:
            return "it is made for flash-attn, which computes float16 and bfloat16"
        if self.variant == "llama3":
            if shape.batch > 1:
                return "its varlen functions take one packed sequence"
            if _window(shape) is None:
                return f"it has no mask {shape.mask_text}"
        elif not (mask := plain_mask(shape)) or (mask == "full" and self.variant != "ring"):
            return f"its {self.variant} function has no mask {shape.mask_text}"
        return alone(shape) or divides(shape, shape.num_ranks * (2 if self.variant == "zigzag" else 1))

    def kernel(self, device: torch.device) -> str:
        """flash-attn, or what stands in for it."""
        return "flash2" if is_installed() or device.type == "cuda" else "torch_cpu"

    @contextmanager
    def open(self, shape: Shape, inputs: Inputs, transport: Transport) -> Iterator[Passes]:
        """See `Peer.open`."""
        module = _import(_MODULES[self.variant])
        layout = make_layout(_LAYOUTS[self.variant], shape.length, transport.size)

        def mine(tensor: Tensor) -> Tensor:
            return take_shard(tensor, layout, transport.rank, 1)

        if self.variant == "llama3":
            yield passes_of(_llama3(module, shape, layout, transport, inputs.q.device), inputs, mine)
            return
        function = getattr(module, "ring_flash_attn_func" if self.variant == "ring" else f"{_MODULES[self.variant]}_func")
        causal = plain_mask(shape) == "causal"
        yield passes_of(lambda q, k, v: function(q, k, v, causal=causal), inputs, mine)


def _llama3(module: ModuleType, shape: Shape, layout: Layout, transport: Transport, device: torch.device):
    window = _window(shape)
    assert window is not None
    causal, left = window
    lengths = shape.document_lengths or _mask_documents(shape) or (shape.length,)
    borders = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    prepared = module.llama3_flash_attn_prepare_cu_seqlens(borders, causal, transport.rank, transport.size)
    cu_seqlens_q, cu_seqlens_k, longest_q, longest_k, keys = prepared
    stride = HEADS_AT_A_TIME if shape.kv_heads % HEADS_AT_A_TIME == 0 else 1

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = module.llama3_flash_attn_varlen_func(
            q[0], k[0], v[0], cu_seqlens_q, cu_seqlens_k, longest_q, longest_k, heads_k_stride=stride, local_k_slice=keys, causal=causal,
            window_size=(left, 0) if left >= 0 else (-1, -1),
        )  # fmt: skip
        return out.unsqueeze(0)

    return attend


def _window(shape: Shape) -> tuple[bool, int] | None:
    """(causal, window to the left or −1) of a mask that its varlen function has, else None."""
    causal, left = False, -1
    for part in shape.mask.split("&"):
        name, _, numbers = part.strip().partition(":")
        if name == "causal":
            causal = True
        elif name == "window" and numbers.partition(",")[2] in ("", "0"):
            causal, left = True, int(numbers.partition(",")[0])
        elif name not in ("full", "documents"):
            return None
    return causal, left


def _mask_documents(shape: Shape) -> tuple[int, ...]:
    for part in shape.mask.split("&"):
        name, _, numbers = part.strip().partition(":")
        if name == "documents":
            return tuple(int(number) for number in numbers.split(","))
    return ()


def _import(name: str) -> ModuleType:
    """A module of the package without the package's own `__init__`, which imports names that transformers 5 no longer has."""
    if PACKAGE not in sys.modules:
        spec = importlib.util.find_spec(PACKAGE)
        assert spec is not None and spec.submodule_search_locations is not None
        package = ModuleType(PACKAGE)
        package.__path__ = list(spec.submodule_search_locations)
        package.__spec__ = spec
        sys.modules[PACKAGE] = package
    with flash_attn():
        return importlib.import_module(f"{PACKAGE}.{name}")
