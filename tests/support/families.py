"""A tiny model of each family that transformers has, with random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.support.models import VOCABULARY, seeded

SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "attn_implementation": "eager",
}  # fmt: skip
_CHANCE = dict.fromkeys(("dropout", "attention_dropout", "hidden_dropout", "residual_dropout", "embd_pdrop", "resid_pdrop"), 0.0)
_EXPERTS = {
    "num_local_experts": 3, "num_experts": 3, "moe_num_experts": 3, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_k": 2,
    "moe_topk": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 0,
}  # fmt: skip
_LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8}
_OPTIONAL = {**_CHANCE, **_EXPERTS, **_LATENT, "head_dim": 4, "ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 64}
"""For configurations that have such a field."""
_OF: dict[str, dict[str, Any]] = {
    "gemma2": {"query_pre_attn_scalar": 4, "final_logit_softcapping": 1.5},
    "gemma3_text": {"query_pre_attn_scalar": 4, "final_logit_softcapping": 2.0},
    "vaultgemma": {"query_pre_attn_scalar": 4, "final_logit_softcapping": 2.5},
    "nanochat": {"final_logit_softcapping": 3.0},
    "granite": {"logits_scaling": 3.0},
    "granitemoe": {"logits_scaling": 3.0},
    "granitemoeshared": {"logits_scaling": 3.0},
    "cohere": {"logit_scale": 0.3},
    "cohere2": {"logit_scale": 0.3},
    "cohere2_moe": {"logit_scale": 0.3},
}
"""What a family's scales and softcaps are, so that leaving them out shows."""


def family(name: str, **changes: Any) -> Any:
    """A model of the type that transformers calls `name`, its weights the same at every call. Skips where transformers has none."""
    if name not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    config_class = CONFIG_MAPPING[name]
    fields = vars(config_class())
    sizes = {**SIZES, **{key: value for key, value in _OPTIONAL.items() if key in fields}, **_OF.get(name, {}), **changes}
    if "kv_lora_rank" in fields:
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    config = config_class(**sizes)
    with torch.device("meta"):
        of_experts = has_experts(getattr(transformers, _model_class(name))(config))
    # Grouped products of experts are not there in float64.
    return seeded(getattr(transformers, _model_class(name)), config, torch.float32 if of_experts else torch.float64)


def has_experts(model: Any) -> bool:
    """Whether any layer chooses among experts."""
    return any(part.endswith("experts") for part, _ in model.named_modules())


def _model_class(name: str) -> str:
    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name]
    return found if isinstance(found, str) else found[0]
