"""A context above the model's own, with positions stretched as transformers stretches them, the same on any number of ranks."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from ringspan.errors import RingspanError
from ringspan.training.model import build_model
from ringspan.training.prepare import prepare
from ringspan.training.rope import base_for, far_positions, scaled
from tests.training.support import write_text
from tests.training.trainers import assert_same_steps, take_steps

OWN, CONTEXT = 64, 193


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose own context is 64."""
    path = tmp_path_factory.mktemp("model")
    build_model("pico", vocabulary_size=256, context=OWN, seed=3).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt", num_words=2000)


def test_a_new_model_turns_slowly_enough_for_its_context(tmp_path: Path):
    """Bounds that the paper's table gives: 64 thousand tokens 2.1e6, 1 million 5.1e8; the line through all is within 2x of them."""
    for context, bound in ((65_536, 2.1e6), (1_048_576, 5.1e8)):
        assert bound / 2 < base_for(context) < 2 * bound
    assert base_for(1024) == base_for(1990) == 1e4 < base_for(2048)
    for context in (64, 65_536):
        build_model("pico", vocabulary_size=256, context=context, seed=3).save_pretrained(tmp_path / "model")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        slowest = loaded.model.rotary_emb.inv_freq[-1].item()
        assert slowest == pytest.approx(base_for(context) ** (-6 / 8))


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
def test_the_stretched_model_is_the_one_that_transformers_makes(folder: Path, kind: str):
    original = {"original_max_position_embeddings": OWN} if kind == "yarn" else {}
    rope = {"rope_theta": 10000.0, "rope_type": kind, "factor": CONTEXT / OWN, **original}
    # Dynamic scaling begins at what the configuration calls the longest position.
    longest = OWN if kind == "dynamic" else CONTEXT
    plain = AutoModelForCausalLM.from_pretrained(folder, rope_parameters=rope, max_position_embeddings=longest)
    ours = build_model(str(folder), vocabulary_size=256, context=CONTEXT, seed=0, rope_scaling=kind)
    assert ours.config.rope_parameters == rope
    assert ours.config.max_position_embeddings == longest
    ours.set_attn_implementation("sdpa")
    ids = torch.arange(CONTEXT).unsqueeze(0)
    with torch.no_grad():
        logits = ours(input_ids=ids).logits
        assert torch.equal(logits, plain(input_ids=ids).logits)
        unscaled = AutoModelForCausalLM.from_pretrained(folder)
        assert not torch.allclose(logits, unscaled(input_ids=ids).logits, atol=1e-3)


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
def test_three_ranks_train_the_stretched_model_as_one_does(folder: Path, text: Path, tmp_path: Path, kind: str):
    given = {"data": str(text), "model": str(folder), "tokenizer": "bytes", "context": CONTEXT, "rope_scaling": kind, "steps": 3}
    alone, trainer = take_steps(tmp_path / "1", 1, **given)[0]
    assert trainer.model.config.rope_parameters["rope_type"] == kind
    for rank, (steps, _) in enumerate(take_steps(tmp_path / "3", 3, **given)):
        assert_same_steps(steps, alone, (3e-6, 2e-4), f"{kind}, rank {rank}")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"rope_scaling": "ntk"}, "--rope-scaling ntk: unknown. It is one of linear, dynamic, yarn"),
        ({"rope_scaling": "yarn", "context": OWN}, "--rope-scaling yarn --context 64: the model's own is 64"),
        ({"rope_scaling": "yarn", "rope_factor": 0.5}, "--rope-factor 0.5: below 1"),
        ({"rope_scaling": "yarn", "rope_factor": -1.0}, "--rope-factor -1.0: not above zero"),
        ({"rope_scaling": "yarn", "model": "pico"}, "a new model has no context of its own"),
    ],
)
def test_what_cannot_be_stretched_is_refused_before_anything_starts(folder: Path, text: Path, tmp_path: Path, given: dict, expected: str):
    settings = {"data": str(text), "model": str(folder), "tokenizer": "bytes", "context": CONTEXT, "out": str(tmp_path / "run"), **given}
    with pytest.raises(RingspanError, match=expected):
        prepare(settings, resume=False)


def test_a_model_that_is_stretched_already_is_refused():
    once = scaled(LlamaConfig(max_position_embeddings=OWN), "linear", context=CONTEXT, factor=None)
    with pytest.raises(RingspanError, match="the model's are 'linear' already"):
        scaled(once, "yarn", context=1000, factor=None)


def test_a_factor_may_leave_room_above_the_context():
    config = scaled(LlamaConfig(max_position_embeddings=OWN), "yarn", context=CONTEXT, factor=8)
    assert (config.rope_parameters["factor"], config.max_position_embeddings) == (8.0, 8 * OWN)
    assert json.loads(config.to_json_string())["rope_parameters"]["original_max_position_embeddings"] == OWN


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("described", "asked", "expected"),
    [
        ({}, {}, None),
        ({"rope_scaling": None}, {"context": 65}, "--rope-scaling yarn stretches them"),
        # Qwen's way: the length before stretching. Llama 3.1's: the one after.
        ({"rope_parameters": YARN}, {"context": 256}, None),
        ({"rope_parameters": YARN}, {"context": 257}, "own 256 tokens.*by yarn already, and not that far"),
        ({"rope_scaling": {**YARN, "type": "yarn"}, "max_position_embeddings": 512}, {"context": 512}, None),
        ({"rope_parameters": {"full": YARN, "window": {"rope_type": "default"}}}, {"context": 300}, "own 256 tokens.*by yarn already"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, {"context": 1000}, None),
        ({}, {"context": 1000, "scaling": "dynamic", "factor": 2.0}, None),
        ({}, {"context": 1000, "scaling": "yarn"}, None),
        ({}, {"context": 128, "scaling": "linear", "factor": 2.0}, None),
        ({}, {"context": 129, "scaling": "linear", "factor": 2.0}, "--rope-factor 2 is above the model's own 128.*without --rope-factor"),
        ({"max_position_embeddings": None}, {"context": 1000}, None),
    ],
)
def test_positions_that_a_model_does_not_know_are_told_from_its_configuration(described: dict, asked: dict, expected: str | None):
    found = far_positions({"max_position_embeddings": OWN, **described}, **{"context": OWN, "scaling": None, "factor": None, **asked})
    assert (found is None) == (expected is None), found
    if expected is not None:
        assert re.search(expected, str(found)), found
