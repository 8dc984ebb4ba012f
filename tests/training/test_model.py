"""The model is the same for a seed everywhere, and refused where ranks could not agree about it."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, GptOssConfig, GptOssForCausalLM, LlamaConfig, LlamaForCausalLM

from ringspan.errors import RingspanError
from ringspan.training.model import (
    PRESETS,
    build_model,
    cast_parameters,
    check_exact,
    check_model,
    check_vocabulary,
    empty_model,
    head_sizes,
    plain_attention,
)
from ringspan.training.sample import sample
from tests.support.models import seeded


def pico(seed: int = 0) -> LlamaForCausalLM:
    return build_model("pico", vocabulary_size=256, context=64, seed=seed)


@pytest.mark.parametrize("name", ["nano", "pico", "tiny"])
def test_a_preset_has_the_parameters_that_it_says(name: str):
    model = build_model(name, vocabulary_size=256, context=64, seed=0)
    assert sum(parameter.numel() for parameter in model.parameters()) == PRESETS[name].num_parameters(256)
    assert head_sizes(name) == (model.config.num_attention_heads, model.config.num_key_value_heads, model.config.head_dim)


def test_a_seed_gives_the_same_weights_and_leaves_torchs_own_generator_alone():
    before = torch.random.get_rng_state()
    first, second, other = pico(3), pico(3), pico(4)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_threads_that_make_models_at_once_make_the_same_and_leave_torchs_initialisers_alone():
    first = pico(3)

    def make(index: int) -> LlamaForCausalLM | None:
        if index % 2:
            empty_model(first.config, "empty")
            return None
        return pico(3)

    with ThreadPoolExecutor(8) as threads:
        made = [model for model in threads.map(make, range(24)) if model is not None]
    for model in made:
        assert all(torch.equal(mine, right) for mine, right in zip(model.parameters(), first.parameters(), strict=True))
    assert torch.nn.init.ones_(torch.zeros(3)).tolist() == [1.0, 1.0, 1.0]


def test_generation_uses_the_weights_exactly_as_they_are():
    model = pico()
    plain = LlamaForCausalLM._from_config(model.config.__class__(**model.config.to_dict()), attn_implementation="eager")
    plain.load_state_dict(model.state_dict())
    prompt = [10, 20, 30]
    ids = list(prompt)
    for _ in range(12):
        with torch.no_grad():
            ids.append(int(plain(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    assert sample(model, prompt, num_tokens=12, temperature=0, seed=0) == ids[3:]
    assert model.config._attn_implementation == "ringspan"
    assert model.training


SIZES = {"vocab_size": 53, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (Gemma2ForCausalLM, Gemma2Config(**SIZES, num_key_value_heads=2, attn_logit_softcapping=1.0, query_pre_attn_scalar=1)),
        (GptOssForCausalLM, GptOssConfig(**SIZES, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)),
    ],
    ids=["a softcap", "sinks"],
)
def test_text_is_sampled_where_torchs_own_attention_lacks_something(kind: Any, config: Any):
    model = seeded(kind, config, torch.float32)
    model.set_attn_implementation("eager")
    ids = [10, 20, 30]
    for _ in range(5):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    model.set_attn_implementation("ringspan")
    assert sample(model, ids[:3], num_tokens=5, temperature=0, seed=0) == ids[3:]
    assert model.config._attn_implementation == "ringspan"


def test_parameters_are_cast_and_rotary_angles_are_not():
    model = pico()
    angles = model.model.rotary_emb.inv_freq.clone()
    cast_parameters(model, torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.model.rotary_emb.inv_freq, angles)


def test_sampling_follows_its_seed():
    model = pico()
    texts = [sample(model, [1], num_tokens=16, temperature=1.0, seed=seed) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_plain_attention_gives_way_again_after_an_error():
    model = pico()
    with pytest.raises(RuntimeError), plain_attention(model):
        raise RuntimeError
    assert model.config._attn_implementation == "ringspan"


def test_what_ranks_could_not_agree_about_is_refused():
    model = pico()
    config = LlamaConfig(**model.config.to_dict() | {"attention_dropout": 0.1})
    with pytest.raises(RingspanError, match=r"dropout 0\.1"):
        check_exact(LlamaForCausalLM(config), "a model")


@pytest.mark.parametrize(
    ("files", "named"),
    [
        (None, "no such name and no such folder"),
        ({}, "no config.json"),
        ({"config.json": "{}"}, "no .safetensors"),
    ],
)
def test_a_model_that_is_none_is_refused(tmp_path: Path, files: dict[str, str] | None, named: str):
    folder = tmp_path / "model"
    if files is not None:
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_text(content)
    with pytest.raises(RingspanError, match=named):
        check_model(str(folder))


def test_a_folder_that_transformers_cannot_read_is_refused(tmp_path: Path):
    pico().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(RingspanError, match="transformers must be able to read the folder"):
        build_model(str(tmp_path), vocabulary_size=256, context=64, seed=0)


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(tmp_path: Path):
    pico().save_pretrained(tmp_path)
    with pytest.raises(RingspanError, match="its vocabulary has 256 tokens and the tokenizer 300"):
        build_model(str(tmp_path), vocabulary_size=300, context=64, seed=0)
    # Before anything starts, with what helps: the folder's own tokenizer where it has one.
    check_vocabulary(str(tmp_path), 256)
    check_vocabulary("pico", 300)
    with pytest.raises(RingspanError, match=r"the tokenizer 300.*Try: --tokenizer ids:256"):
        check_vocabulary(str(tmp_path), 300)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(RingspanError, match=f"the tokenizer 300.*Try: --tokenizer {tmp_path}"):
        check_vocabulary(str(tmp_path), 300)


def test_head_sizes_of_a_folder_are_its_configurations(tmp_path: Path):
    pico().save_pretrained(tmp_path)
    assert head_sizes(str(tmp_path)) == head_sizes("pico")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "other"}))
    with pytest.raises(RingspanError, match="names no attention heads"):
        head_sizes(str(tmp_path))
