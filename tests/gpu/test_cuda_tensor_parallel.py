"""A tensor axis over NCCL: the gradients of the unsplit model, alone and with the context split too."""

from __future__ import annotations

import pytest

from tests.gpu.torchrun import printed_by_ranks

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("ranks", [2, 4])
def test_gradients_over_a_tensor_axis_are_those_of_the_unsplit_model(ranks: int):
    assert "torch.bfloat16 attention_output" in printed_by_ranks("tensor_ranks.py", ranks)
