"""Dropout and noise that no module tells of: functions of a model's forward, as in OPT, Seed-OSS and Mixtral."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import ringspan
from ringspan.errors import UnsupportedError
from ringspan.transformer.chance import refusing_chance
from tests.support.families import family
from tests.support.models import make_batch


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_forward_that_drops_elements_is_refused_in_training_and_computed_in_evaluation(ranks: int):
    right = family("seed_oss")
    batch = make_batch(1, 9)
    expected = right(**batch).loss.item()

    def run(group: Any) -> float:
        parallel = ringspan.parallelize(family("seed_oss", residual_dropout=0.25), group)
        part = parallel.shard_batch(batch)
        with pytest.raises(UnsupportedError, match=r"SeedOss.* its forward drops 0\.25 of the elements"):
            parallel.loss(part)
        parallel.model.eval()
        return parallel.loss(part).item()

    assert ringspan.run_in_process(ranks, run, timeout_seconds=30.0) == pytest.approx([expected] * ranks, abs=1e-6)


@pytest.mark.parametrize(("name", "noise", "found"), [
    ("mixtral", {"router_jitter_noise": 0.1}, r"draws random numbers \(uniform_\)"),
    ("phimoe", {}, r"draws random numbers \("),
    ("opt", {"dropout": 0.1}, r"drops 0\.1 of the elements"),
])  # fmt: skip
def test_noise_and_dropout_of_functions_are_refused(name: str, noise: dict[str, Any], found: str):
    parallel = ringspan.parallelize(family(name, **noise), loss_tile=None, feed_forward_chunk=None, rematerialise="none")
    part = parallel.shard_batch(make_batch(1, 9))
    with pytest.raises(UnsupportedError, match=found):
        parallel.loss(part)
    parallel.model.eval()
    assert parallel.loss(part).isfinite()


def test_layers_that_are_left_out_by_chance_are_refused_and_none_that_are_not():
    with pytest.raises(UnsupportedError, match=r"model\.decoder leaves out 0\.5 of its layers"):
        ringspan.parallelize(family("opt", layerdrop=0.5), loss_tile=None, feed_forward_chunk=None)
    parallel = ringspan.parallelize(family("opt"), loss_tile=None, feed_forward_chunk=None, rematerialise="none")
    assert parallel.loss(parallel.shard_batch(make_batch(1, 9))).isfinite()


def test_only_the_first_forward_in_training_is_looked_at():
    parallel = ringspan.parallelize(family("seed_oss"))
    part = parallel.shard_batch(make_batch(1, 9))
    parallel.model.eval()
    first = parallel.loss(part).item()
    parallel.model.train()
    looked: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ringspan.transformer.parallel_model.refusing_chance", lambda model: looked.append("") or refusing_chance(model))
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
    with refusing_chance(nn.Linear(1, 1)):
        assert torch.equal(drop(x, False), x)
        assert torch.equal(functional.dropout(x, 0.0), x)
        with pytest.raises(UnsupportedError, match="Linear with dropout"):
            drop(x, True)
    assert int((drop(torch.ones(4096), True) != 1).sum()) > 0


def test_a_compiled_model_is_traced_without_being_looked_at():
    model = nn.Linear(1, 1)
    model.compile()
    with refusing_chance(model):
        assert functional.dropout(torch.ones(4), 1.0).sum() == 0
