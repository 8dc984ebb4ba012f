"""A configuration refuses what cannot be meant, and goes on only as the same run."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path

import pytest

from ringspan.errors import RingspanError
from ringspan.training.config import CHANGEABLE, TrainingConfig


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ranks", 0),
        ("ranks", -2),
        ("context", 0),
        ("context", 1),
        ("context", -1),
        ("batch_size", 0),
        ("steps", 0),
        ("steps", -5),
        ("seed", -1),
        ("seed", 2**63),
        ("learning_rate", 0.0),
        ("learning_rate", -1e-3),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("warmup_steps", -1),
        ("weight_decay", -0.1),
        ("gradient_clip", 0.0),
        ("validation_tokens", 0),
        ("validation_every", 0),
        ("checkpoint_every", 0),
        ("keep_checkpoints", 0),
        ("sample_tokens", -1),
        ("temperature", -1.0),
        ("timeout_seconds", 0.0),
        ("dtype", "float16"),
        ("device", "tpu"),
    ],
)
def test_a_value_that_cannot_be_meant_is_refused_with_one_that_works(field: str, value: object):
    with pytest.raises(RingspanError) as caught:
        TrainingConfig(**{field: value}).check()
    option = "--" + field.replace("_", "-")
    assert str(caught.value).startswith(f"{option} {value}: ")
    assert f"Try: {option} " in str(caught.value)


def test_the_defaults_are_meant():
    TrainingConfig().check()


def test_a_saved_configuration_reads_back(tmp_path: Path):
    config = TrainingConfig(model="pico", learning_rate=0.5, prompt="def ä")
    config.save(tmp_path / "config.json")
    assert TrainingConfig.load(tmp_path / "config.json") == config


@pytest.mark.parametrize("content", ["", "{", "[]", '{"unknown": 1}', '{"steps": "many"}'])
def test_a_damaged_configuration_is_named(tmp_path: Path, content: str):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(RingspanError, match=r"config\.json"):
        TrainingConfig.load(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("context", 64),
        ("seed", 1),
        ("model", "tiny"),
        ("data", "elsewhere"),
        ("batch_size", 3),
        ("learning_rate", 0.1),
        ("dtype", "bfloat16"),
    ],
)
def test_a_resumed_run_stays_the_same_run(field: str, value: object):
    with pytest.raises(RingspanError, match="goes on as if it had never stopped"):
        TrainingConfig().resumed({field: value})


def test_a_resumed_run_may_repeat_what_it_has_and_change_what_enters_no_weight():
    saved = TrainingConfig(model="pico", ranks=2)
    resumed = saved.resumed({"model": "pico", "context": saved.context, "ranks": 3, "layout": "striped", "steps": 900})
    assert (resumed.ranks, resumed.layout, resumed.steps) == (3, "striped", 900)
    assert resumed.model == "pico"


@pytest.mark.parametrize("field", [field.name for field in fields(TrainingConfig) if "None" in str(field.type)])
def test_an_option_that_a_configuration_file_leaves_to_the_run_stays_as_the_run_settled_it(field: str):
    settled = TrainingConfig(tokenizer="bytes", learning_rate=1e-3, on_spike="skip", separator=3, shard_parameters=True, lora_alpha=8.0)
    assert settled.resumed({field: None}) == settled


def test_what_enters_the_weights_may_not_change():
    assert not CHANGEABLE & {
        "data",
        "tokenizer",
        "model",
        "context",
        "batch_size",
        "seed",
        "learning_rate",
        "warmup_steps",
        "mask",
        "dtype",
    }


def test_a_configuration_given_back_is_all_but_its_folder(tmp_path: Path):
    config = TrainingConfig(model="pico", learning_rate=0.5, out="somewhere", on_spike="skip", separator=3, tensorboard=True)
    config.save(tmp_path / "config.json")
    given = TrainingConfig.options(tmp_path / "config.json")
    assert "out" not in given
    assert TrainingConfig(**given, out="somewhere") == config


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "--config .*Expecting"),
        ("[]", "no object"),
        ('{"stepps": 3}', "it has stepps"),
        ('{"steps": "3"}', "steps is '3'. steps is of type int"),
        ('{"steps": true}', "steps is True"),
        ('{"steps": 1.5}', "steps is 1.5"),
        ('{"steps": null}', "steps is None"),
        ('{"learning_rate": "high"}', "learning_rate is 'high'"),
        ('{"tensorboard": 1}', "tensorboard is 1"),
    ],
)
def test_a_configuration_file_that_cannot_be_meant_is_refused(tmp_path: Path, content: str, expected: str):
    (tmp_path / "given.json").write_text(content)
    with pytest.raises(RingspanError, match=expected):
        TrainingConfig.options(tmp_path / "given.json")


def test_whole_numbers_are_numbers_and_what_may_be_none_may_be_null(tmp_path: Path):
    (tmp_path / "given.json").write_text('{"learning_rate": 1, "tokenizer": null, "gradient_clip": 2}')
    assert TrainingConfig(**TrainingConfig.options(tmp_path / "given.json")).gradient_clip == 2


def test_a_configuration_whose_writing_is_cut_off_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "config.json"
    TrainingConfig(out="first").save(path)

    def killed(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        TrainingConfig(out="second").save(path)
    assert TrainingConfig.load(path).out == "first"
