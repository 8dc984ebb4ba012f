"""Which models `parallelize` takes, and what is refused of one whose parameters are sharded."""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import nn

from ringspan.errors import RingspanError, UnsupportedError
from ringspan.transformer.layers import causal_model, decoder_layers
from ringspan.transformer.mixing import FAMILIES, RULE, check_kinds


def check_model(model: nn.Module, num_sharing: int) -> None:
    """That a model can be prepared, as far as its configuration and its parts tell.

    Args:
        model: what was given to `parallelize`.
        num_sharing: the ranks that share a sequence. Where there is one, layers of any kind see all tokens.

    Raises:
        RingspanError: for a module that is no Hugging Face model, and for one whose parameters are sharded already.
        UnsupportedError: for a decoder without a list of layers, and, where ranks share a sequence, for layers in which tokens learn of
            each other by anything but the attention that ringspan computes: of one rank's tokens alone, and nothing would say so.
    """
    inner: Any = causal_model(model)
    asked = f"parallelize of a {type(inner).__name__}"
    if not hasattr(inner, "config"):
        rule = "It prepares causal language models of transformers"
        raise RingspanError(
            asked, "it has no config", rule, "AutoModelForCausalLM.from_pretrained(…), or ringspan.attention in your own model"
        )
    if is_sharded(model):
        rule = "A model is prepared once, and parallelize shards it itself"
        found = "its parameters are sharded already (they are DTensors)"
        raise RingspanError(asked, found, rule, "the ParallelModel of the first call, or a new model")
    if num_sharing > 1:
        _check_mixing(inner, asked)
    decoder_layers(model)


def _check_mixing(inner: Any, asked: str) -> None:
    check_kinds(inner.config, asked)
    if not getattr(inner, "_supports_attention_backend", True):
        raise UnsupportedError(asked, "transformers does not let its attention be another's", RULE, FAMILIES)
    for name, part in inner.named_modules():
        if isinstance(part, nn.Conv1d):
            raise UnsupportedError(asked, f"{name} is a convolution over tokens", RULE, FAMILIES)


def is_sharded(model: nn.Module) -> bool:
    """Whether any parameter is a DTensor, told without loading DTensor."""
    return any(hasattr(parameter, "device_mesh") for parameter in model.parameters())


def guard_saving(model: nn.Module) -> None:
    """Makes `model.save_pretrained` of sharded parameters say what to give it, where transformers fails over them. In place."""
    parts: tuple[Any, ...] = (model, causal_model(model))
    for each in parts:
        if callable(getattr(each, "save_pretrained", None)):
            each.save_pretrained = MethodType(_save_pretrained, each)


def _save_pretrained(self: Any, *arguments: Any, **keywords: Any) -> Any:
    weights = keywords.get("state_dict")
    held = self.parameters() if weights is None else weights.values()
    if not keywords.get("distributed_checkpoint") and any(hasattr(each, "device_mesh") for each in held):
        raise RingspanError(
            f"save_pretrained of a {type(self).__name__}",
            "its parameters are sharded, and each rank has its part" if weights is None else "state_dict holds parts of parameters",
            "What transformers writes is whole",
            "weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)) of "
            "torch.distributed.checkpoint.state_dict on every rank, then model.save_pretrained(folder, state_dict=weights) on rank 0",
        )
    return type(self).save_pretrained(self, *arguments, **keywords)
