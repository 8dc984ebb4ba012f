"""A tensor axis over NCCL: the gradients of the unsplit model, alone and with the context split too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("ranks", [2, 4])
def test_gradients_over_a_tensor_axis_are_those_of_the_unsplit_model(ranks: int):
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"{torch.cuda.device_count()} CUDA devices here: a rank has one of its own")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "tests/gpu/tensor_ranks.py"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr[-4000:]
    assert "torch.bfloat16 attention_output" in ended.stdout
