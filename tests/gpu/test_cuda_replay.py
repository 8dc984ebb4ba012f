"""Attention that is replayed as CUDA graphs, over NCCL and peer memory: the bits that launches give."""

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
def test_replays_give_the_bits_of_launches(ranks: int):
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"{torch.cuda.device_count()} CUDA devices here: a rank has one of its own")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "tests/gpu/replay_ranks.py"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr[-4000:]
    assert "two heads at a time" in ended.stdout
