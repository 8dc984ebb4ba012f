"""Tiny Hugging Face models with random weights, and the loss and gradients that they have whole."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

# Here and not where they are used: transformers imports its parts late, and threads that ask for one at once find it half done.
from transformers import LlamaConfig, LlamaForCausalLM

import ringspan

ringspan.transformers.register()
VOCABULARY = 53


def tiny_llama(attention: str = "eager", dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """Two layers, nine query heads and three key heads as in SmolLM2, each 4 wide. The same weights at every call."""
    sizes = {"hidden_size": 36, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 9, "num_key_value_heads": 3}
    config = LlamaConfig(**{**sizes, "vocab_size": VOCABULARY, "max_position_embeddings": 256, "attn_implementation": attention, **changes})
    return seeded(LlamaForCausalLM, config, dtype)


def seeded(model_class: Any, config: Any, dtype: torch.dtype = torch.float64) -> Any:
    """A model of `config` whose weights are the same at every call, large enough for attention to matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / parameter.shape[-1] ** 0.5)
    return model.train()


def with_attention(model: Any, attention: str) -> Any:
    """A copy of `model` that computes attention so."""
    copy = deepcopy(model)
    copy.set_attn_implementation(attention)
    return copy


def make_batch(batch: int, length: int, seed: int = 0, padded: tuple[int, ...] = ()) -> dict[str, Tensor]:
    """Random tokens with labels (some of them −100). `padded[i]`: how many tokens at the end of sequence i are padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (batch, length), generator=generator)
    labels = ids.clone()
    labels[torch.rand(batch, length, generator=generator) < 0.15] = -100
    made = {"input_ids": ids, "labels": labels}
    if padded:
        made["attention_mask"] = torch.ones_like(ids)
        for row, count in enumerate(padded):
            if count:
                made["attention_mask"][row, -count:] = 0
                labels[row, -count:] = -100
    return made


def gradients(model: Any) -> dict[str, Tensor]:
    """Every parameter's gradient by name; a parameter without one has None."""
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def split_losses(model: Any, batch: Mapping[str, Tensor], ranks: int = 2, **how: Any) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Loss and gradients on each of some in-process ranks of a copy of `model` that `parallelize` has prepared as `how` says."""

    def run(group: Any) -> tuple[Tensor, dict[str, Tensor]]:
        mine = deepcopy(model)
        parallel = ringspan.parallelize(mine, group, **how)
        loss = parallel.loss(parallel.shard_batch(batch))
        loss.backward()
        parallel.sum_gradients()
        return loss.detach(), gradients(mine)

    return ringspan.run_in_process(ranks, run, timeout_seconds=60.0)


def whole_loss(model: Any, *batches: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean of the unsplit model's losses over `batches`, and the gradients that they leave when accumulated."""
    model = deepcopy(model)
    losses = []
    for batch in batches:
        loss = model(**batch).loss / len(batches)
        loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum(), gradients(model)
