"""Process groups: sequences side by side, the default group, a mesh; and a refusal that only one process has."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.processes import results, run_processes


@pytest.mark.slow
def test_four_processes_share_two_sequences_and_then_one(tmp_path: Path):
    results(run_processes(4, "tests.compat.ranks:everything", tmp_path / "processes"))
