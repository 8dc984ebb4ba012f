"""The compiler is told what it leaves alone also where it is imported last."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from ringspan.attention import graphs
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


def test_the_compiler_is_waited_for(monkeypatch: pytest.MonkeyPatch):
    # As at the import of ringspan, which here was long ago, and the compiler's perhaps, too.
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    made = runpy.run_path(str(graphs.__file__))
    finder: Any = sys.meta_path[0]
    assert isinstance(finder, made["WhenImported"])
    assert (finder._module, finder._then) == ("torch._dynamo", made["keep_uncompiled"])
