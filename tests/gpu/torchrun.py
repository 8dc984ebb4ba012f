"""Programs that the ranks of a test run, each on a GPU of its own."""

from __future__ import annotations

import faulthandler
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[2]
PATIENCE = 90
"""Seconds after which a rank says where it stands, and ends."""


def start() -> torch.device:
    """What a rank begins with: its device, a CPU where there is no GPU, and the process group."""
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    return device


def printed_by_ranks(program: str, ranks: int) -> str:
    """What `program`, a file beside this one, prints under torchrun; skips where a rank has no GPU, fails where the program does."""
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"{torch.cuda.device_count()} CUDA devices here: a rank has one of its own")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", f"tests/gpu/{program}"]
    paths = [str(ROOT / "src"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": ":".join(paths)}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE + 30, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr[-4000:]
    return ended.stdout
