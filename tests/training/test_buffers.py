"""What a model keeps besides its parameters goes into checkpoints, back out of them, and into the exported model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Glm4MoeConfig, Glm4MoeForCausalLM

from ringspan.training.export import export
from ringspan.training.prepare import prepare
from ringspan.training.trainer import Trainer
from tests.training.support import write_text
from tests.training.trainers import GIVEN, ranks_as_threads

BIAS = torch.tensor([5.0, -5.0, 5.0, -5.0])
NAME = "model.layers.1.mlp.gate.e_score_correction_bias"


def saved_model(folder: Path) -> Path:
    """Of four experts the biases choose two: without them a token goes elsewhere."""
    torch.manual_seed(0)
    config = Glm4MoeConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, first_k_dense_replace=1,
        n_group=1, topk_group=1, max_position_embeddings=128,
    )  # fmt: skip
    model = Glm4MoeForCausalLM(config)
    model.get_buffer(NAME).copy_(BIAS)
    model.save_pretrained(folder)
    return folder


def test_biases_that_choose_experts_survive_a_resumed_run_and_an_export(tmp_path: Path):
    write_text(tmp_path / "text.txt", num_words=2000)
    given: dict[str, Any] = {
        **GIVEN, "model": str(saved_model(tmp_path / "model")), "tokenizer": "bytes", "data": str(tmp_path / "text.txt"), "ranks": 1,
        "steps": 3, "out": str(tmp_path / "run"), "feed_forward_chunk": "none", "loss_tile": "none", "rematerialise": "none",
        "batch_size": 1, "learning_rate": 1e-3,
    }  # fmt: skip

    def whole(place: Any) -> list[float | None]:
        trainer = Trainer(prepare(given, resume=False), place)
        losses = []
        for _ in range(3):
            losses.append(trainer.take_step().loss)
            if trainer.step == 1:
                trainer.begin_save()
                trainer.finish_save()
        return losses

    def resumed(place: Any) -> tuple[list[float | None], torch.Tensor]:
        trainer = Trainer(prepare({"out": given["out"]}, resume=True), place)
        losses = [trainer.take_step().loss for _ in range(2)]
        return losses, trainer.model.get_buffer(NAME)

    with ranks_as_threads() as threads:
        ((*_, second, third),) = threads(1, whole)
        ((losses, bias),) = threads(1, resumed)
    assert losses == [second, third]
    assert torch.equal(bias, BIAS)
    export(Path(given["out"]), tmp_path / "exported")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "exported").get_buffer(NAME).float(), BIAS)
