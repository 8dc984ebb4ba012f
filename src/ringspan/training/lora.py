"""Low-rank adapters through peft (the extra `lora`): the model's weights stay, and W + (alpha / rank) · B A is what it computes.

A checkpoint then holds `adapter/`, as peft itself writes and reads it, and no copy of the model. An exported model has them merged.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ringspan.errors import RingspanError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER, ADAPTER_TENSORS, ADAPTER_CONFIG = "adapter", "adapter_model.safetensors", "adapter_config.json"
ALL_LINEAR = "all-linear"
_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


def check_lora(model: str, is_preset: bool) -> None:
    """Whether adapters can be trained here.

    Raises:
        RingspanError: where peft is not installed, or the model is a new one.
    """
    if is_preset:
        raise RingspanError(
            f"--lora-rank with --model {model}",
            "a new model has nothing to adapt",
            "Adapters change a model that is trained already",
            "--model DIR, or leaving --lora-rank out",
        )
    _peft()


def _peft() -> Any:
    try:
        return import_module("peft")
    except ImportError as error:
        raise RingspanError(
            "--lora-rank", f"{error}", "Adapters are made by that package", "pip install 'ringspan[lora]', or full fine-tuning"
        ) from None


def add_adapters(model: PreTrainedModel, *, base: str, rank: int, alpha: float, targets: str, seed: int) -> Any:
    """Puts adapters into `model`, in place, and freezes all else; A is drawn from the seed, B is zero.

    Args:
        base: the folder of the model, for whoever reads the adapter.
        targets: `"all-linear"`, or the ends of module names, joined by commas.

    Returns:
        peft's configuration.

    Raises:
        RingspanError: where no module bears such a name, and for a layer whose weight W + (alpha / rank) · B A could not be written to.
    """
    peft = _peft()
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        # Dropout would differ between numbers of ranks.
        lora_dropout=0.0,
        target_modules=targets if targets == ALL_LINEAR else targets.split(","),
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
    )
    embedding = model.get_input_embeddings().weight
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            peft.inject_adapter_in_model(config, model)
    except ValueError as error:
        raise RingspanError(
            f"--lora-targets {targets}", str(error), "Targets are names of linear layers", f"--lora-targets {ALL_LINEAR}"
        ) from None
    _check_targets(model, targets, embedding)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return config


def _check_targets(model: PreTrainedModel, targets: str, embedding: Tensor | nn.Module) -> None:
    """Refuses adapters that `merged` could not add to a weight of their own, of an embedding or of an output that is tied to it, and names
    that no layer bears: peft leaves out one of several without a word."""
    layers = {name: module.base_layer for name, module in model.named_modules() if hasattr(module, "base_layer")}
    for target in () if targets == ALL_LINEAR else targets.split(","):
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            found = f"no layer is called {target!r}"
            raise RingspanError(f"--lora-targets {targets}", found, "Targets are names of linear layers", f"--lora-targets {ALL_LINEAR}")
    for name, layer in layers.items():
        if isinstance(layer, nn.Linear) and layer.weight is not embedding:
            continue
        found = (
            "shares its weight with the input embedding" if isinstance(layer, nn.Linear) else f"is a layer of type {type(layer).__name__}"
        )
        raise RingspanError(
            f"--lora-targets {targets}",
            f"{name} {found}",
            "Targets are names of linear layers, each with a weight of its own that its adapter is merged into",
            f"--lora-targets {ALL_LINEAR}",
        )


def by_peft_name(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names that peft's files have."""
    return {_PREFIX + name.replace(".default.", "."): tensor for name, tensor in tensors.items()}


@torch.no_grad()
def merged(weights: Mapping[str, Tensor], adapter: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """W + scale · B A for each weight that has an adapter, in float32; the others as they are.

    Raises:
        RingspanError: for tensors of the adapter that are no A and B of a weight.
    """
    result, unused = dict(weights), dict(adapter)
    for name in adapter:
        stem = name.removesuffix(_A)
        target = stem.removeprefix(_PREFIX) + ".weight"
        if name.endswith(_A) and stem + _B in adapter and target in weights:
            a, b = unused.pop(name), unused.pop(stem + _B)
            result[target] = weights[target].float() + scale * (b.float() @ a.float())
    if unused:
        raise RingspanError(
            "an adapter merged into its model",
            f"it has {', '.join(sorted(unused))}",
            "Each linear layer's A and B are added to its weight, and nothing of an adapter is left out",
            f"a run with --lora-targets {ALL_LINEAR}",
        )
    return result


def weights_digest(folder: Path) -> str:
    """SHA-256 of a model's safetensors: adapters belong to these weights and no others."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
