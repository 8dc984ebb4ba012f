"""Processes that a command starts for its ranks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys
from ringspan.transport import start_ranks
print(start_ranks(1, "tempfile", [], sys.argv[1]))
"""


def test_a_file_beside_the_user_that_is_called_like_a_module_is_not_that_module(tmp_path: Path):
    (tmp_path / "tempfile.py").write_text("raise SystemExit(7)")
    command = [sys.executable, "-P", "-c", PROGRAM, str(tmp_path / "logs")]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ended.stdout.split("\n")[-2:] == ["{}", ""], ended.stdout + ended.stderr[-2000:]
