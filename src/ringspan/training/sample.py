"""Text that the model writes, token by token, from the weights as they are."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from ringspan.training.model import plain_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.inference_mode()
def sample(model: PreTrainedModel, prompt: list[int], *, num_tokens: int, temperature: float, seed: int) -> list[int]:
    """`num_tokens` ids that follow `prompt`, drawn from softmax(logits / temperature); the likeliest ones at temperature 0."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    ids = list(prompt)
    # Transformers 5.24 renamed it.
    cache_name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    with plain_attention(model):
        inputs, cache = torch.tensor([prompt], device=device), None
        for _ in range(num_tokens):
            output = model(input_ids=inputs, use_cache=True, logits_to_keep=1, **{cache_name: cache})
            ids.append(_draw(output.logits[0, -1].float().cpu(), temperature, generator))
            inputs, cache = torch.tensor([ids[-1:]], device=device), output.past_key_values
    return ids[len(prompt) :]


def _draw(logits: Float[Tensor, " vocabulary"], temperature: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1, generator=generator))
