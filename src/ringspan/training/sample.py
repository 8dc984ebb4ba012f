"""Text that the model writes, token by token, from the weights as they are."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from ringspan.training.model import plain_attention
from ringspan.transformer.layers import original_forward

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Not inference_mode: FSDP would gather parameters into tensors that training could not use afterwards.
@torch.no_grad()
def sample(
    model: PreTrainedModel, prompt: list[int], *, num_tokens: int, temperature: float, seed: int, device: torch.device | None = None
) -> list[int]:
    """`num_tokens` ids that follow `prompt`, drawn from softmax(logits / temperature); the likeliest ones at temperature 0.

    Of a sharded model, whose parameters are gathered for every token, all ranks take part, and all know the result.

    Args:
        device: where the model computes; that of its parameters if not given.
    """
    device = device or next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    ids = list(prompt)
    keyword = cache_keyword(model)
    with plain_attention(model):
        inputs, cache = torch.tensor([prompt], device=device), None
        for _ in range(num_tokens):
            output = model(input_ids=inputs, use_cache=True, logits_to_keep=1, **{keyword: cache})
            ids.append(_draw(output.logits[0, -1].float().cpu(), temperature, generator))
            inputs, cache = torch.tensor([ids[-1:]], device=device), output[keyword]
    return ids[len(prompt) :]


def cache_keyword(model: PreTrainedModel) -> str:
    """What `model` calls its cache of keys and values: transformers renamed it in 5.24, and gives it back under the same name."""
    return "cache" if "cache" in inspect.signature(original_forward(model)).parameters else "past_key_values"


def _draw(logits: Float[Tensor, " vocabulary"], temperature: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1, generator=generator))
