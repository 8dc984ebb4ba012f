"""Weights of ranks from their speeds, on a GPU."""

from __future__ import annotations

import pytest
import torch

import ringspan
from ringspan.attention import rank_speeds

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here: a GPU's speed is timed"),
]


def test_ranks_compute_on_the_gpu_and_are_told_the_same(monkeypatch: pytest.MonkeyPatch):
    problems: list[str] = []
    right = rank_speeds.kernel_pass
    monkeypatch.setattr(
        rank_speeds, "kernel_pass", lambda kernel, problem, tokens: problems.append(problem.device) or right(kernel, problem, tokens)
    )
    first, second = ringspan.run_in_process(2, lambda group: ringspan.measure_weights(group, seconds=1.0), timeout_seconds=120.0)
    assert first == second and max(first) == 1.0
    assert problems == ["cuda"] * 2
