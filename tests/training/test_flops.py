"""Model FLOPs are those of the formula: causal pairs once, backward twice the forward, frozen weights without their gradient."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, MixtralConfig

from ringspan.geometry import causal, documents, sliding_window
from ringspan.training.flops import allowed_pairs, count_flops, peak_flops
from ringspan.training.model import build_model

CONTEXT = 24


def test_forward_and_backward_are_what_torch_counts_for_a_model_with_full_attention():
    """Torch's own counter sees the matrix products of the whole square; under a full mask that is what the formula says too."""
    model = build_model("pico", vocabulary_size=256, context=64, seed=0)
    model.set_attn_implementation("eager")
    flops = count_flops(model, model.config)
    assert flops is not None
    ids = torch.zeros(1, CONTEXT, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    rope = sum(flop for name, by in counter.get_flop_counts().items() if name.endswith("rotary_emb") for flop in by.values())
    pairs = CONTEXT * CONTEXT
    ours = flops.per_token * CONTEXT + sum(flops.per_pair.values()) * pairs
    assert counter.get_total_flops() - rope == ours


def test_causal_pairs_count_once():
    model = build_model("pico", vocabulary_size=256, context=64, seed=0)
    flops = count_flops(model, model.config)
    assert flops is not None
    causal_pairs = CONTEXT * (CONTEXT + 1) // 2
    assert flops.of_rows([(causal(), 3)], CONTEXT) == 3 * (flops.per_token * CONTEXT + flops.per_pair[None] * causal_pairs)


@pytest.mark.parametrize(
    ("mask", "pairs"),
    [
        (causal(), 1_000_000 * 1_000_001 // 2),
        (sliding_window(9), 10 * 1_000_000 - 45),
        (causal() & documents([0, 10, 1_000_000]), 55 + 999_990 * 999_991 // 2),
    ],
)
def test_pairs_are_counted_in_integers(mask, pairs: int):
    assert allowed_pairs(mask, 1_000_000) == pairs


def test_frozen_weights_cost_no_gradient_of_their_own():
    model = build_model("pico", vocabulary_size=256, context=64, seed=0)
    whole = count_flops(model, model.config)
    assert whole is not None
    model.lm_head.weight.requires_grad_(False)
    part = count_flops(model, model.config)
    assert part is not None
    assert whole.per_token - part.per_token == 2 * model.lm_head.weight.numel()


def tiny(kind, **more):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    return AutoModelForCausalLM.from_config(kind(**sizes, **more))


def test_windowed_layers_count_their_windows():
    model = tiny(Gemma2Config, num_key_value_heads=2, head_dim=8, sliding_window=7, query_pre_attn_scalar=8)
    flops = count_flops(model, model.config)
    assert flops is not None
    each = 12.0 * 4 * 8
    assert flops.per_pair == {7: 2 * each, None: 2 * each}
    windowed = flops.of_rows([(causal(), 1)], 100)
    assert windowed == 100 * flops.per_token + 2 * each * (7 * 100 - 21) + 2 * each * 5050


def test_layers_of_gpt2_are_counted_too():
    model = AutoModelForCausalLM.from_config(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=64))
    flops = count_flops(model, model.config)
    assert flops is not None
    assert flops.per_token == 6 * (2 * 12 * 32 * 32 + 64 * 32)


def test_models_of_which_a_token_uses_a_part_are_not_guessed():
    model = tiny(MixtralConfig, num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1)
    assert count_flops(model, model.config) is None


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989e12),
        ("NVIDIA H100 PCIe", "bfloat16", 756e12),
        ("NVIDIA H200", "bfloat16", 989e12),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312e12),
        ("NVIDIA L4", "bfloat16", 121e12),
        ("NVIDIA L40S", "bfloat16", 362e12),
        ("NVIDIA RTX A4000", "bfloat16", None),
        ("NVIDIA H100 80GB HBM3", "float32", None),
        ("cpu", "bfloat16", None),
    ],
)
def test_a_peak_is_known_or_not_guessed(name: str, dtype: str, peak: float | None):
    assert peak_flops(name, dtype) == peak
