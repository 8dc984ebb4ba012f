"""What a decoder layer keeps and works in, in bytes: formulas, choices made from them, and the measuring that they are held against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from ringspan.errors import RingspanError
from ringspan.transformer.layers import causal_model

FEED_FORWARD_SHARE = 1 / 32
"""Of the memory, that a chunk of the feed-forward may work in."""
LOSS_SHARE = 1 / 16
"""Of the memory, that a tile of the loss may work in: nothing of a layer is at work then."""
CPU_BYTES = 4 << 30
"""What counts as memory on a CPU, where a process does not know how much is its own."""


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """The sizes of a decoder with gated feed-forward layers.

    Attributes:
        layers: how many.
        hidden: width of the hidden states.
        heads: query heads; `kv_heads` key and value heads; `head_dim` the width of each.
        intermediate: width of the feed-forward's intermediate.
        vocabulary: tokens of the output embedding.
        element_bytes: of activations.
        num_pieces: ranks of a tensor axis, which share what is kept for each token of a context shard.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    element_bytes: int = 2
    num_pieces: int = 1

    def kept_bytes(self, mode: str, *, blockwise: bool = True) -> int:
        """Bytes that one layer keeps for one token until its backward.

        With e bytes an element, hidden size h, q = heads · head_dim, k = kv_heads · head_dim, intermediate i:

        - `full`: e·h, the layer's input (Korthikanti: 2sbh).
        - `attention_output`: e·(h + q) + 4·heads, with attention's output and its log-sum-exps.
        - `none`, as `selective`: attention e·(2q + 2k) + 4·heads (q, k, v, out, lse); the feed-forward e·4i (gate, its activation, up,
          their product); two norms, computed in float32 as transformers does, 2·(4·h + 2·e·h + 4) (the input in float32, the normed in e
          before its weight and after it, and one over its size). Where they are blockwise the feed-forward keeps nothing, and the norms
          2·(2·e·h), what they and the projections read.

        With t ranks on a tensor axis each keeps 1/t of that, but for what q, k and v read in `none` and `selective`, which is gathered: e·h
        instead of e·h/t; and without blockwise parts what gate and up read, the same.
        """
        e, q, k, t = self.element_bytes, self.heads * self.head_dim, self.kv_heads * self.head_dim, self.num_pieces
        if mode == "full":
            return e * self.hidden // t
        if mode == "attention_output":
            return (e * (self.hidden + q) + 4 * self.heads) // t
        attention = (e * (2 * q + 2 * k) + 4 * self.heads) // t
        gathered = 0 if t == 1 else e * self.hidden
        if blockwise:
            return attention + 4 * e * self.hidden // t + gathered - gathered // t
        norms = 2 * (4 * self.hidden + 2 * e * self.hidden + 4)
        return attention + (norms + 4 * e * self.intermediate) // t + 2 * (gathered - gathered // t)

    def feed_forward_bytes(self) -> int:
        """Bytes that a chunk of the feed-forward works in for one token: its four intermediates, and as many gradients."""
        return 8 * self.element_bytes * self.intermediate // self.num_pieces

    def loss_bytes(self) -> int:
        """Bytes that a tile of the loss works in for one token: logits as they come and in float32, and their gradient."""
        return (2 * self.element_bytes + 8) * self.vocabulary


def layer_shape(model: nn.Module, element_bytes: int = 2) -> LayerShape:
    """The sizes of a Hugging Face model, from its configuration.

    Raises:
        RingspanError: where the configuration does not name them.
    """
    config: Any = causal_model(model).config
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")
    sizes: dict[str, Any] = {name: getattr(config, name, None) for name in names}
    if absent := [name for name, size in sizes.items() if type(size) is not int]:
        found = f"its configuration has no {', '.join(absent)}"
        rule = "Choices made from memory need the sizes of a model, by the names that Llama gives them"
        raise RingspanError(f"sizes of a {type(model).__name__}", found, rule, "chunk, tile and mode as numbers and names, not 'auto'")
    layers, hidden, heads, intermediate, vocabulary = sizes.values()
    return LayerShape(
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or hidden // heads,
        intermediate=intermediate,
        vocabulary=vocabulary,
        element_bytes=element_bytes,
    )


def device_bytes(device: torch.device) -> int:
    """The memory that choices are made for: all of a GPU's, whatever is in use, so that a run chooses alike every time."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else CPU_BYTES


def auto_feed_forward_chunk(shape: LayerShape, memory_bytes: int) -> int:
    """Tokens of a feed-forward chunk: as many thousands (1,024) as work in 1/32 of the memory, at least one."""
    return _multiple(memory_bytes * FEED_FORWARD_SHARE / shape.feed_forward_bytes(), 1024)


def auto_loss_tile(shape: LayerShape, memory_bytes: int) -> int:
    """Tokens of a loss tile: as many times 256 as work in 1/16 of the memory, at least one."""
    return _multiple(memory_bytes * LOSS_SHARE / shape.loss_bytes(), 256)


def _multiple(tokens: float, of: int) -> int:
    return max(1, int(tokens) // of) * of


@dataclass(frozen=True)
class ModeChoice:
    """A rematerialisation mode, and why."""

    mode: str
    reason: str


def auto_rematerialise(shape: LayerShape, *, tokens: int, state_bytes: int, memory_bytes: int, host_bytes: int | None = 0) -> ModeChoice:
    """The first of `none`, `attention_output`, `full` that fits.

    What must fit in 9/10 of the memory: what all layers keep for `tokens` (less what goes to the host), what one layer holds during its
    backward (its `none`, and four times its hidden states for attention's gradients and visitors), the shares of the feed-forward and
    the loss, and `state_bytes`.

    Args:
        shape: of the model.
        tokens: of this rank, batch × positions.
        state_bytes: of parameters, gradients and optimizer on this rank.
        memory_bytes: of the device.
        host_bytes: that checkpoints may fill; 0 where they stay on the device, None for no bound.
    """
    working = tokens * (shape.kept_bytes("none") + 4 * shape.element_bytes * shape.hidden)
    room = 0.9 * memory_bytes - state_bytes - working - (FEED_FORWARD_SHARE + LOSS_SHARE) * memory_bytes
    needs = {}
    for mode in ("none", "attention_output", "full"):
        kept = shape.layers * tokens * shape.kept_bytes(mode)
        if mode != "none":
            kept = 0 if host_bytes is None else max(0, kept - host_bytes)
        needs[mode] = kept
        if kept <= room:
            return ModeChoice(mode, f"layers keep {_gib(kept)} on the device and there is room for {_gib(room)}")
    found = f"even with 'full' layers keep {_gib(needs['full'])} and there is room for {_gib(room)}"
    return ModeChoice("full", f"{found}: offload=ringspan.transformer.Offload(), more ranks, or fewer tokens would fit")


def _gib(size: float) -> str:
    return f"{size / (1 << 30):.1f} GiB"


class LiveBytes(TorchDispatchMode):
    """Counts, while it is entered, the bytes of all tensors that operations have made and that are still held.

    `now()` after a forward is what is kept for the backward; `peak` is the most at any operation. For CPUs and tests: on a GPU ask
    `torch.cuda.memory_allocated`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self._known: set[int] = set()
        self.peak = 0

    def ignore(self, *tensors: Tensor) -> None:
        """Does not count these, which were there before, or are elsewhere."""
        self._known |= {tensor.untyped_storage()._cdata for tensor in tensors}
        self._storages = {key: held for key, held in self._storages.items() if key not in self._known}

    def now(self) -> int:
        """Bytes held."""
        self._storages = {key: (held, size) for key, (held, size) in self._storages.items() if not held.expired()}
        return sum(size for _, size in self._storages.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation and takes down what it made."""
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else (out,):
            if isinstance(each, Tensor):
                storage = each.untyped_storage()
                if storage._cdata not in self._known:
                    self._storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.now())
        return out
