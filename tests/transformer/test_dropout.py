"""Dropout that no module tells of: a function of a model's forward, as in OPT and Seed-OSS."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import SeedOssConfig, SeedOssForCausalLM

import ringspan
from ringspan.errors import UnsupportedError
from ringspan.transformer.dropout import refusing_dropout
from tests.support.models import VOCABULARY, make_batch, seeded


def seed_oss(residual_dropout: float) -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    dropouts = {"residual_dropout": residual_dropout, "attention_dropout": 0.0}
    return seeded(SeedOssForCausalLM, SeedOssConfig(**sizes, **dropouts, head_dim=4, vocab_size=VOCABULARY))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_forward_that_drops_elements_is_refused_in_training_and_computed_in_evaluation(ranks: int):
    right = seed_oss(0.0)
    batch = make_batch(1, 9)
    expected = right(**batch).loss.item()

    def run(group: Any) -> float:
        parallel = ringspan.parallelize(seed_oss(0.25), group, loss_tile=None, feed_forward_chunk=None)
        part = parallel.shard_batch(batch)
        with pytest.raises(UnsupportedError, match=r"SeedOssForCausalLM with dropout: its forward drops 0\.25 of the elements"):
            parallel.loss(part)
        parallel.model.eval()
        return parallel.loss(part).item()

    assert ringspan.run_in_process(ranks, run, timeout_seconds=30.0) == pytest.approx([expected] * ranks, abs=1e-6)


def test_only_the_first_forward_in_training_is_looked_at():
    parallel = ringspan.parallelize(seed_oss(0.0), loss_tile=None, feed_forward_chunk=None)
    part = parallel.shard_batch(make_batch(1, 9))
    parallel.model.eval()
    first = parallel.loss(part).item()
    parallel.model.train()
    looked: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ringspan.transformer.parallel_model.refusing_dropout", lambda model: looked.append("") or refusing_dropout(model))
        for _ in range(3):
            assert parallel.loss(part).item() == first
    assert len(looked) == 1


WAYS = (
    lambda x, on: functional.dropout(x, 0.5, on),
    lambda x, on: functional.dropout(x, p=0.5, training=on),
    lambda x, on: functional.alpha_dropout(x, 0.5, on),
    lambda x, on: torch.dropout(x, 0.5, on),
    lambda x, on: torch.dropout(x, p=0.5, train=on),
)


@pytest.mark.parametrize("drop", WAYS)
def test_every_way_to_drop_is_seen_and_none_that_drops_nothing(drop: Any):
    x = torch.ones(8)
    with refusing_dropout(nn.Linear(1, 1)):
        assert torch.equal(drop(x, False), x)
        assert torch.equal(functional.dropout(x, 0.0), x)
        with pytest.raises(UnsupportedError, match="Linear with dropout"):
            drop(x, True)
    assert int((drop(torch.ones(4096), True) != 1).sum()) > 0


def test_a_compiled_model_is_traced_without_being_looked_at():
    model = nn.Linear(1, 1)
    model.compile()
    with refusing_dropout(model):
        assert functional.dropout(torch.ones(4), 1.0).sum() == 0
