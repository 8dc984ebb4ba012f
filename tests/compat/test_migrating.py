"""docs/migrating.md: its examples run, one after the other, and it speaks of every function that there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import ringspan
from ringspan import compat

PAGE = Path(__file__).parents[2] / "docs" / "migrating.md"


def examples() -> list[tuple[int, str]]:
    """(line, text) of each Python block."""
    text = PAGE.read_text(encoding="utf-8")
    return [(text[: found.start()].count("\n") + 1, found[1]) for found in re.finditer(r"^```python\n(.*?)^```$", text, re.M | re.S)]


def run(blocks: list[tuple[int, str]]) -> None:
    namespace: dict[str, object] = {"__name__": "__main__"}
    for line, text in blocks:
        exec(compile("\n" * line + text, str(PAGE), "exec"), namespace)


def test_the_examples_run_and_give_what_one_device_computes():
    blocks = examples()
    assert len(blocks) > 10, "the examples are where the test looks for them"
    run(blocks)


@pytest.mark.parametrize("wrong", ["ringspan.attention(*shards, causal=False", "ringspan.attention(*shards, causal=True, layout='striped'"])
def test_an_example_that_computed_something_else_would_be_noticed(wrong: str):
    setup, (line, first) = examples()[:2]
    changed = first.replace("ringspan.attention(*shards, causal=True", wrong)
    assert changed != first
    with pytest.raises(AssertionError, match="not close"):
        run([setup, (line, changed)])


def test_every_function_of_elsewhere_is_on_the_page():
    text = PAGE.read_text(encoding="utf-8")
    packed = re.compile("_(kv|qkv)packed")  # one line for the three forms of a function
    missing = {packed.sub("", name) for name in compat.__all__ if packed.sub("", name) not in text} - {"LocalKeys"}
    assert not missing
    for name in ("attention", "attention_varlen", "scaled_dot_product_attention"):
        assert f"ringspan.{name}(" in text and name in ringspan.__all__
