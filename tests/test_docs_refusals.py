"""docs/refusals.md says what is refused today, and real ranks refuse what the page says and nothing else."""

from __future__ import annotations

import importlib.util
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import ringspan

DOCS = Path(__file__).parents[1] / "docs"


def load_generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_refusals", DOCS / "generate_refusals.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


generator = load_generator()


@pytest.fixture(scope="module")
def refused() -> Mapping[tuple[str, ...], tuple[str, str, str]]:
    return generator.refusals()


@pytest.mark.slow
def test_the_page_is_what_trying_gives(refused: Mapping[tuple[str, ...], tuple[str, str, str]]):
    assert (DOCS / "refusals.md").read_text(encoding="utf-8") == generator.page(refused), "run `python docs/generate_refusals.py`"
    found = generator.rows(refused)
    for combination in generator.combinations():
        assert any(row.holds(combination) for row in found) == (combination in refused), combination


def test_four_ranks_together_refuse_what_one_finds_refused_alone_and_nothing_else(monkeypatch: pytest.MonkeyPatch):
    # 389 is prime and divides the length of no axis, so that each name comes up.
    for combination in list(generator.combinations())[::389]:
        alone = generator.attempt(combination)
        with monkeypatch.context() as patch:
            ranks = threading.local()
            patch.setattr(generator, "LoneRank", lambda to_the_end, ranks=ranks: ranks.group)

            def attempt(group: Any, ranks: threading.local = ranks, combination: tuple[str, ...] = combination) -> Any:
                ranks.group = group
                return generator.attempt(combination)

            together = ringspan.run_in_process(generator.RANKS, attempt, timeout_seconds=20.0)
        assert set(together) == {alone}, combination


def test_rows_hold_everything_that_is_refused_and_nothing_that_runs():
    axes = [list(axis) for axis in generator.AXES.values()]
    first = tuple(axis[0] for axis in axes)
    one = ("", "for one reason", "")
    refused = {(strategy, layout, *first[2:]): one for strategy in axes[0][:2] for layout in axes[1]} | {
        (strategy, axes[1][1], *first[2:]): one for strategy in axes[0]
    }
    found = generator.rows(refused)
    assert len(found) == 2
    for combination in generator.combinations():
        assert any(row.holds(combination) for row in found) == (combination in refused)
