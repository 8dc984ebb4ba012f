"""Sums of partial results as one kernel each, in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_the_sums_in_tritons_interpreter_are_their_specification():
    # `make test` installs it there, where torch does not find it.
    beside = Path(sys.prefix) / "triton"
    if not beside.is_dir():
        pytest.importorskip("triton", reason="Triton is not installed: tests/gpu runs the kernels themselves")
    script = Path(__file__).with_name("interpreted.py")
    paths = [str(beside), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
