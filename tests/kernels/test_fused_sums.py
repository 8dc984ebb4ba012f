"""Sums of partial results as one kernel each, in Triton's interpreter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_the_sums_in_tritons_interpreter_are_their_specification(interpreting: dict[str, str]):
    script = Path(__file__).with_name("interpreted.py")
    done = subprocess.run([sys.executable, str(script)], env=interpreting, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
