"""A rank of several ends at once, whatever its threads still do; any other process of the command ends in order."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping

import pytest

ENDLESS = """
import atexit, threading
from ringspan.cli.leave import fail_unforeseen, leave
atexit.register(lambda: print("in order", flush=True))
print("said", end="")
"""
A_THREAD = "threading.Thread(target=threading.Event().wait).start()\n"
"""Python waits for it on its way out, as torch's way out of a group may for one of gloo's."""
RANK = {"RANK": "1", "WORLD_SIZE": "2"}


def ended(code: str, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    left = {name: value for name, value in os.environ.items() if name not in RANK}
    command = [sys.executable, "-c", ENDLESS + code]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env={**left, **environment})


@pytest.mark.parametrize("status", [0, 2, None])
def test_a_rank_waits_for_nothing_and_what_it_said_is_not_lost(status: int | None):
    found = ended(f"{A_THREAD}leave({status})", RANK)
    assert (found.returncode, found.stdout, found.stderr) == (status or 0, "said", "")


def test_a_rank_says_what_was_not_foreseen():
    found = ended(f"{A_THREAD}try:\n    1 / 0\nexcept Exception:\n    fail_unforeseen()", RANK)
    assert found.returncode == 1 and found.stderr.rstrip().endswith("ZeroDivisionError: division by zero")


def test_any_other_process_ends_in_order():
    assert ended("leave(3)", {}).stdout == "saidin order\n"
    found = ended("try:\n    1 / 0\nexcept Exception:\n    fail_unforeseen()", {})
    assert found.returncode == 1 and "ZeroDivisionError" in found.stderr and found.stdout == "saidin order\n"
