"""Where segments are expandable memory is unmapped, not only given out again, while other streams than its own may still read it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from tests.gpu.torchrun import PATIENCE, ROOT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here: its memory is what is unmapped"),
]


def test_what_another_stream_still_reads_is_not_unmapped():
    paths = [str(ROOT / "src"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": ":".join(paths), "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    command = [sys.executable, "tests/gpu/unmapped.py"]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr[-4000:]
    assert ended.stdout.count("has the same bits") == 3
