"""The compiler is told what it leaves alone also where it is imported last."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ringspan.attention.graphs import WhenImported


def test_what_waits_for_a_module_is_called_once_when_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "awaited_module.py").write_text("ready = True\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    said: list[bool] = []
    finder = WhenImported("awaited_module", lambda: said.append(sys.modules["awaited_module"].ready))
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    import json.tool  # noqa: F401

    assert not said
    import awaited_module  # noqa: F401  # pyright: ignore[reportMissingImports]
    import awaited_module as again  # noqa: F401  # pyright: ignore[reportMissingImports]

    assert said == [True] and finder not in sys.meta_path
    del sys.modules["awaited_module"]


_SEQUENCE_FIRST = """
import sys, torch, ringspan
plain = ringspan.Sequence.attention
sequence = ringspan.ContextParallel().sequence(8)
assert "torch._dynamo" not in sys.modules and ringspan.Sequence.attention is plain
torch.compile(lambda: None)
assert ringspan.Sequence.attention is not plain
"""


@pytest.mark.slow
def test_a_sequence_that_was_made_before_the_compiler_came_is_left_alone_too():
    # Another process: here the compiler has been imported long since.
    ended = subprocess.run([sys.executable, "-c", _SEQUENCE_FIRST], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr[-2000:]
