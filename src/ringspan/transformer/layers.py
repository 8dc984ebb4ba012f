"""Where things are in a Hugging Face decoder: its layers, their feed-forward parts, and how a module's forward is replaced."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

from ringspan.errors import UnsupportedError

_REPLACED = "_ringspan_forward"
_FEED_FORWARD = ("mlp", "feed_forward", "block_sparse_moe")


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers of a Hugging Face causal language model, first to last; also of one that peft wraps.

    Raises:
        UnsupportedError: where no list of layers is found.
    """
    layers = getattr(decoder(model), "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise UnsupportedError(
            f"the layers of a {type(model).__name__}",
            "its decoder has no list named 'layers'",
            "Layers are found as transformers names them in Llama, Qwen, Mistral and Gemma",
            "a model of one of these families, or no parallelize: attn_implementation='ringspan' and seq.shard_batch split its attention",
        )
    return list(layers)


def causal_model(model: nn.Module) -> nn.Module:
    """The Hugging Face model itself, where peft or another wrapper stands around it."""
    return model.get_base_model() if callable(getattr(model, "get_base_model", None)) else model  # type: ignore[operator]


def decoder(model: nn.Module) -> nn.Module:
    """The part of a causal language model that makes hidden states."""
    base = causal_model(model)
    found = base.get_decoder() if callable(getattr(base, "get_decoder", None)) else getattr(base, "model", None)  # type: ignore[operator]
    return found if isinstance(found, nn.Module) else base


def feed_forward_of(layer: nn.Module) -> nn.Module:
    """The feed-forward part of a decoder layer.

    Raises:
        UnsupportedError: where the layer has none under a known name.
    """
    for name in _FEED_FORWARD:
        if isinstance(found := getattr(layer, name, None), nn.Module):
            return found
    raise UnsupportedError(
        f"the feed-forward part of a {type(layer).__name__}",
        f"it has no part named {', '.join(_FEED_FORWARD)}",
        "Parts are found as transformers names them",
        "feed_forward_chunk=None, which leaves the layer as it is",
    )


def attention_of(layer: nn.Module) -> nn.Module | None:
    """The attention of a decoder layer, where it has one under the name that transformers gives it."""
    found = getattr(layer, "self_attn", None)
    return found if isinstance(found, nn.Module) else None


def replace_forward(module: nn.Module, forward: Callable[..., Any], slot: str = _REPLACED) -> None:
    """Makes `module` call `forward(module, …)`; the forward that it had is `original_forward(module)`.

    It stands on this module alone, goes with copies of it, and leaves hooks outside, FSDP's among them. A second call replaces the first;
    under another `slot`, given to `original_forward` too, it stands around it.
    """
    if not hasattr(module, slot):
        setattr(module, slot, module.forward)
    module.forward = MethodType(forward, module)


def original_forward(module: nn.Module, slot: str = _REPLACED) -> Callable[..., Any]:
    """The forward that `module` had before `replace_forward`."""
    return getattr(module, slot, module.forward)


def restore_forward(module: nn.Module) -> None:
    """Undoes `replace_forward`."""
    if hasattr(module, _REPLACED):
        del module.forward
        own = vars(module).pop(_REPLACED)
        if own != module.forward:
            module.forward = own
