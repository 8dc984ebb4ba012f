"""A folder of Hugging Face datasets is read by that package, or refused where it is not installed; never as if it were text."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest

from ringspan.errors import RingspanError
from ringspan.training.text_dataset import find_dataset, is_dataset
from ringspan.training.tokens import ensure_tokens


def test_without_the_package_such_a_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "state.json").write_text("{}")
    (tmp_path / "readme.txt").write_text("this is text, but not the data")
    assert is_dataset(str(tmp_path))
    with pytest.raises(RingspanError, match=f"--data {tmp_path}: it is a folder of Hugging Face datasets, .*Try: pip install datasets"):
        ensure_tokens(tmp_path / "out", str(tmp_path), "bytes")


def test_a_folder_of_text_is_none(tmp_path: Path):
    (tmp_path / "a.txt").write_text("text")
    assert not is_dataset(str(tmp_path))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    datasets = pytest.importorskip("datasets", reason="the optional package datasets is not installed")
    rows = {"title": ["a", "b", "c"], "text": ["one", "", "three"], "number": [1, 2, 3]}
    # What it warns about while it writes is its own.
    with warnings.catch_warnings(action="ignore"):
        datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "rows")
        datasets.DatasetDict({"test": datasets.Dataset.from_dict(rows)}).save_to_disk(tmp_path / "splits")
    return tmp_path


def test_each_row_is_a_document(saved: Path):
    tokens = ensure_tokens(saved / "out", str(saved / "rows"), "bytes")
    assert bytes(tokens.open().tolist()) == b"one\0three"
    assert ensure_tokens(saved / "out", str(saved / "rows"), "bytes") == tokens
    titles = ensure_tokens(saved / "titles", str(saved / "rows"), "bytes", text_column="title")
    assert bytes(titles.open().tolist()) == b"a\0b\0c"


def test_a_column_that_is_not_there_or_no_text_and_a_split_that_is_not_there_are_refused(saved: Path):
    for column in ("body", "number"):
        with pytest.raises(RingspanError, match=f"--text-column {column}: its columns of text are title, text"):
            find_dataset(str(saved / "rows"), column)
    with pytest.raises(RingspanError, match="its splits are test"):
        find_dataset(str(saved / "splits"), "text")
