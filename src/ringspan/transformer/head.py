"""From a model's hidden states to its loss inside its own forward, where its weights are whole whatever holds them apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ringspan.errors import UnsupportedError
from ringspan.transformer.accumulate import wide_dtype
from ringspan.transformer.layers import causal_model, decoder, original_forward, replace_forward
from ringspan.transformer.pieces import TensorGroup
from ringspan.transformer.plain_parameters import plain_parameters, using
from ringspan.transformer.tiled_loss import LossTerms, cross_entropy_of_logits, tiled_cross_entropy, token_losses

LOSS_KEYWORD = "ringspan_loss"
"""The keyword under which a `LossRequest` is given to a prepared model."""

_Transform = Callable[[Any], tuple[float, float | None]]


def _plain(config: Any) -> tuple[float, float | None]:
    return 1.0, None


def _softcapped(config: Any) -> tuple[float, float | None]:
    return 1.0, config.final_logit_softcapping


def _divided(config: Any) -> tuple[float, float | None]:
    return 1 / config.logits_scaling, None


def _scaled(config: Any) -> tuple[float, float | None]:
    return config.logit_scale, None


_PLAIN = (
    "llama", "mistral", "mixtral", "qwen2", "qwen3", "smollm3", "olmo2", "phi3", "gemma", "gpt_oss", "afmoe", "apertus", "arcee",
    "bitnet", "cwm", "deepseek_v2", "deepseek_v3", "ernie4_5", "ernie4_5_moe", "exaone4", "exaone_moe", "flex_olmo", "glm", "glm4",
    "glm4_moe", "gpt_neox", "helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "hyperclovax", "jais2", "minimax_m2",
    "ministral", "ministral3", "olmo", "olmo3", "olmoe", "persimmon", "phi", "qwen2_moe", "qwen3_moe", "seed_oss", "solar_open",
    "starcoder2", "youtu",
)  # fmt: skip
FAMILIES: dict[str, _Transform] = {
    **dict.fromkeys(_PLAIN, _plain),
    **dict.fromkeys(("gemma2", "gemma3_text", "nanochat", "vaultgemma"), _softcapped),
    **dict.fromkeys(("granite", "granitemoe", "granitemoeshared"), _divided),
    **dict.fromkeys(("cohere", "cohere2", "cohere2_moe"), _scaled),
}
"""Model types whose way from hidden states to logits is known: the logits' multiplier and their softcap, from the configuration."""


def loss_terms(model: nn.Module, *, tiled: bool, label_smoothing: float = 0.0, z_loss: float = 0.0) -> LossTerms:
    """What a model's loss is made of.

    Args:
        model: a Hugging Face causal language model.
        tiled: whether the loss is made from hidden states; where it is made from the model's own logits, those are as they should be.
        label_smoothing: see `LossTerms`, as `z_loss`.
        z_loss: a weight.

    Raises:
        UnsupportedError: for a model whose way from hidden states to logits is not known, or that adds something to its loss.
    """
    terms = LossTerms(label_smoothing=label_smoothing, z_loss=z_loss)
    terms.check()
    config: Any = causal_model(model).config
    if getattr(config, "output_router_logits", False):
        raise UnsupportedError(
            f"the loss of a {config.model_type} with output_router_logits",
            "it adds a balancing loss of its experts, which is no sum over tokens",
            "What is added to a loss is computed or refused",
            "config.output_router_logits=False",
        )
    if not tiled:
        return terms
    if config.model_type not in FAMILIES:
        raise _unknown(config.model_type, f"of {len(FAMILIES)} families it is known (ringspan.transformer.head.FAMILIES), not of this")
    head = _head(model)
    if type(head).forward is not nn.Linear.forward:
        raise _unknown(config.model_type, f"its output embedding is a {type(head).__name__}, no nn.Linear")
    multiplier, softcap = FAMILIES[config.model_type](config)
    return LossTerms(multiplier=float(multiplier), softcap=softcap, label_smoothing=label_smoothing, z_loss=z_loss)


def _unknown(model_type: str, found: str) -> UnsupportedError:
    return UnsupportedError(
        f"a tiled loss for a model of type {model_type!r}",
        found,
        "Logits are made as the model makes them, or not at all",
        "loss_tile=None, which takes the model's own logits",
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class LossRequest:
    """What a prepared model is asked for: `model(…, ringspan_loss=LossRequest(…))` returns this rank's share of the loss.

    Attributes:
        labels: `[batch, shard]`, shifted.
        scale: of the sum over tokens.
        terms: what the loss is made of.
        tile: tokens whose logits exist at once; None takes the model's own logits.
        pieces: of a tensor axis, each of whose ranks computes the loss of its own; None where there is none.
        by_token: each token's cross-entropy is wanted, and no gradient, instead of the share.
    """

    labels: Tensor
    scale: float
    terms: LossTerms
    tile: int | None
    pieces: TensorGroup | None = None
    by_token: bool = False

    @property
    def own_labels(self) -> Tensor:
        """Those of this rank's tokens: `[batch, piece]`."""
        return self.labels if self.pieces is None else self.pieces.take(self.labels, self.terms.ignore_index)


def prepare_loss(model: nn.Module) -> None:
    """Makes a causal language model answer `ringspan_loss=`; without that keyword it does what it did. In place."""
    inner = causal_model(model)
    replace_forward(inner, _model_forward)
    head = _head(model)
    if head is not None:
        replace_forward(head, _head_forward)


def _head(model: nn.Module) -> Any:
    inner: Any = causal_model(model)
    return inner.get_output_embeddings()


def _model_forward(self: nn.Module, *arguments: Any, ringspan_loss: LossRequest | None = None, **keywords: Any) -> Any:
    if ringspan_loss is None:
        return original_forward(self)(*arguments, **keywords)
    request = ringspan_loss
    if request.tile is None:
        logits = original_forward(self)(*arguments, **keywords).logits
        own = logits if request.pieces is None else request.pieces.take(logits)
        if request.by_token:
            wide, labels = own.to(wide_dtype(own.dtype)), request.own_labels
            return F.cross_entropy(wide.flatten(0, -2), labels.flatten(), ignore_index=request.terms.ignore_index, reduction="none").view(
                labels.shape
            )
        return cross_entropy_of_logits(own, request.own_labels, request.scale, request.terms)
    hidden = decoder(self)(*arguments, **keywords).last_hidden_state
    head = _head(self)
    # Through the module's call: FSDP gathers its weight there.
    return head(hidden, request)


def _head_forward(self: nn.Module, hidden: Tensor, request: LossRequest | None = None) -> Tensor:
    if request is None:
        return original_forward(self)(hidden)
    assert request.tile is not None
    head: Any = self
    with using(plain_parameters(self)):
        weight, bias = head.weight, head.bias
    if request.by_token:
        return token_losses(hidden, weight, request.own_labels, tile=request.tile, bias=bias, terms=request.terms)
    return tiled_cross_entropy(hidden, weight, request.own_labels, tile=request.tile, bias=bias, scale=request.scale, terms=request.terms)
