"""A folder that Hugging Face `datasets` has saved (`Dataset.save_to_disk`), read as documents of text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from ringspan.errors import RingspanError

_MARKS = ("state.json", "dataset_dict.json")


@dataclass(frozen=True)
class TextDataset:
    """The rows of one column, each a document."""

    name: str
    rows: Any
    column: str

    def __str__(self) -> str:
        return f"{self.name} ({len(self.rows):,} documents)"

    def documents(self) -> Iterator[str]:
        """The texts, in the dataset's order; empty ones are left out."""
        for batch in self.rows.select_columns([self.column]).iter(batch_size=256):
            yield from (text for text in batch[self.column] if text)

    def digest(self) -> str:
        """Changes whenever a file of the dataset or the column does."""
        digest = hashlib.sha256(self.column.encode())
        root = Path(self.name)
        for file in sorted(path for path in root.rglob("*") if path.is_file() and not path.name.startswith("cache-")):
            with file.open("rb") as stream:
                digest.update(f"{file.relative_to(root)}\0{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
        return digest.hexdigest()


def is_dataset(data: str) -> bool:
    """Whether `--data` names a folder that `datasets` has written."""
    return any((Path(data) / mark).is_file() for mark in _MARKS) and not (Path(data) / "tokens").is_dir()


def find_dataset(data: str, column: str) -> TextDataset:
    """The dataset in a folder: its `train` split where it has several.

    Raises:
        RingspanError: where `datasets` is not installed, and where there is no such column of text.
    """
    asked = f"--data {data}"
    try:
        datasets = import_module("datasets")
    except ImportError as error:
        raise RingspanError(
            asked, f"it is a folder of Hugging Face datasets, and {error}", "Such a folder is read by that package", "pip install datasets"
        ) from None
    try:
        found = datasets.load_from_disk(data)
    except Exception as error:  # a folder can be broken in more ways than the package has errors for
        raise RingspanError(asked, f"{type(error).__name__}: {error}", "datasets.load_from_disk must be able to read it") from None
    if isinstance(found, dict):
        if "train" not in found:
            raise RingspanError(
                asked, f"its splits are {', '.join(found)}", "Of several splits 'train' is read", f"--data {Path(data) / next(iter(found))}"
            )
        found = found["train"]
    if column not in found.column_names or getattr(found.features[column], "dtype", None) not in ("string", "large_string"):
        texts = [name for name in found.column_names if getattr(found.features[name], "dtype", None) in ("string", "large_string")]
        raise RingspanError(
            f"{asked} --text-column {column}",
            f"its columns of text are {', '.join(texts) or 'none'}",
            "Each row's text is a document",
            f"--text-column {texts[0]}" if texts else "a dataset with a column of text",
        )
    return TextDataset(data, found, column)
