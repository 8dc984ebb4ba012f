"""Values that are not as wide as keys, as in DeepSeek's latent attention: loss and gradients on two ranks are those of the whole model."""

from __future__ import annotations

import pytest

from tests.support.errors import relative
from tests.support.families import family
from tests.support.models import make_batch, split_losses, whole_loss

BUDGET = 2e-5
"""Relative: float32, since products of experts are not there in float64. Law 6 allows as much for experts."""


@pytest.mark.parametrize("width", [4, 16])
def test_values_of_another_width_than_keys_are_exact_on_two_ranks(width: int):
    model, batch = family("deepseek_v3", v_head_dim=width), make_batch(2, 11)
    assert model.config.qk_nope_head_dim + model.config.qk_rope_head_dim == 8
    expected_loss, expected = whole_loss(model, batch)
    for loss, found in split_losses(model, batch, loss_tile=3, feed_forward_chunk=None, rematerialise="attention_output"):
        assert relative(loss, expected_loss) <= BUDGET
        assert all(relative(found[name], gradient) <= BUDGET for name, gradient in expected.items())
