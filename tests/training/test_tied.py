"""A model whose output embedding is its input embedding: one parameter, in a resumed run too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ringspan.training.prepare import prepare
from ringspan.training.trainer import Trainer
from tests.training.support import write_text
from tests.training.trainers import GIVEN, ranks_as_threads


def write_model(folder: Path, *, says_tied: bool, is_tied: bool) -> None:
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=is_tied,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(described | {"tie_word_embeddings": says_tied}))


@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "said to be tied, with two that differ"])
def test_a_resumed_run_goes_on_as_if_it_had_never_stopped(tmp_path: Path, is_tied: bool):
    write_model(tmp_path / "model", says_tied=True, is_tied=is_tied)
    text = write_text(tmp_path / "text.txt", num_words=2000)
    given = {**GIVEN, "data": str(text), "model": str(tmp_path / "model"), "tokenizer": "bytes", "learning_rate": 1e-2, "ranks": 1}

    def tied(trainer: Trainer) -> bool:
        model: Any = trainer.model
        return model.lm_head.weight is model.model.embed_tokens.weight

    def whole(place: Any) -> list[float | None]:
        trainer = Trainer(prepare({**given, "steps": 4, "out": str(tmp_path / "run")}, resume=False), place)
        assert tied(trainer) == is_tied
        losses = []
        while not trainer.is_finished:
            losses.append(trainer.take_step().loss)
            if trainer.step == 2:
                trainer.begin_save()
                trainer.finish_save()
        return losses

    def resumed(place: Any) -> list[float | None]:
        trainer = Trainer(prepare({"out": str(tmp_path / "run")}, resume=True), place)
        assert trainer.step == 2
        assert tied(trainer) == is_tied
        return [trainer.take_step().loss for _ in range(2)]

    with ranks_as_threads() as threads:
        (losses,), (rest,) = threads(1, whole), threads(1, resumed)
    assert rest == losses[2:]
