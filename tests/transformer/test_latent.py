"""Values that are not as wide as keys, as in DeepSeek's latent attention: loss and gradients on two ranks are those of the whole model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import ringspan
from tests.support.errors import relative
from tests.support.families import family
from tests.support.models import gradients, make_batch

BUDGET = 2e-5
"""Relative: float32, since products of experts are not there in float64. Law 6 allows as much for experts."""


@pytest.mark.parametrize("width", [4, 16])
def test_values_of_another_width_than_keys_are_exact_on_two_ranks(width: int):
    model, batch = family("deepseek_v3", v_head_dim=width), make_batch(2, 11)
    assert model.config.qk_nope_head_dim + model.config.qk_rope_head_dim == 8
    plain = copy.deepcopy(model)
    expected = plain(**batch, use_cache=False).loss
    expected.backward()

    def run(group: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        mine = copy.deepcopy(model)
        parallel = ringspan.parallelize(mine, group, loss_tile=3, feed_forward_chunk=None, rematerialise="attention_output")
        loss = parallel.loss(parallel.shard_batch(batch))
        loss.backward()
        parallel.sum_gradients()
        return loss.detach(), gradients(mine)

    for loss, found in ringspan.run_in_process(2, run, timeout_seconds=60.0):
        assert relative(loss, expected.detach()) <= BUDGET
        assert all(relative(found[name], gradient) <= BUDGET for name, gradient in gradients(plain).items())
