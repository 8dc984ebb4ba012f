"""Which files are the text to train on, and a digest that changes whenever they do."""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from ringspan.errors import RingspanError
from ringspan.training.config import STDLIB

_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_SNIFFED_BYTES = 8192


@dataclass(frozen=True)
class Text:
    """The files in their order, and what they hold together."""

    name: str
    files: tuple[Path, ...]
    num_bytes: int
    digest: str

    def __str__(self) -> str:
        files = f"{len(self.files)} files, " if len(self.files) > 1 else ""
        return f"{self.name} ({files}{self.num_bytes / 1e6:.1f} MB)"


def find_text(data: str) -> Text:
    """The text that `--data` names: one file, every text file under a folder in sorted order, or the standard library's source.

    A file that holds a NUL byte near its start is no text, and a hidden file or folder is not looked at.

    Raises:
        RingspanError: where there is nothing to read.
    """
    if data == STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        return _text("the Python standard library", root, [path for path in root.rglob("*.py") if _in_library(path.relative_to(root))])
    path = Path(data)
    if path.is_dir():
        # What earlier runs left below the folder is no text of it.
        runs = {tokens.parents[1] for tokens in path.rglob("tokens/tokens.json")}
        files = [file for file in path.rglob("*") if file.is_file() and _visible(file.relative_to(path)) and not runs & set(file.parents)]
        return _text(data, path, [file for file in files if _is_text(file)])
    if not path.exists():
        raise _nothing(data, "no such file or folder")
    if path.stat().st_size and not _is_text(path):
        raise _nothing(data, "it holds NUL bytes, so it is no text")
    return _text(data, path.parent, [path])


def _text(name: str, root: Path, files: list[Path]) -> Text:
    files = sorted(files, key=lambda file: file.relative_to(root).as_posix())
    digest = hashlib.sha256()
    num_bytes = 0
    for file in files:
        try:
            with file.open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise _nothing(name, f"{file} cannot be read ({error.strerror})") from None
        size = file.stat().st_size
        num_bytes += size
        digest.update(f"{file.relative_to(root).as_posix()}\0{size}\0{content}\n".encode())
    if num_bytes == 0:
        raise _nothing(name, f"{len(files)} text files, all empty" if files else "no text file in it")
    return Text(name, tuple(files), num_bytes, digest.hexdigest())


def _in_library(path: Path) -> bool:
    return not _NOT_LIBRARY & set(path.parts)


def _visible(path: Path) -> bool:
    return not any(part.startswith(".") for part in path.parts)


def _is_text(file: Path) -> bool:
    try:
        with file.open("rb") as stream:
            return b"\0" not in stream.read(_SNIFFED_BYTES)
    except OSError as error:
        raise _nothing(str(file), f"it cannot be read ({error.strerror})") from None


def _nothing(name: str, found: str) -> RingspanError:
    return RingspanError(
        f"--data {name}",
        found,
        "Training data is a file of text or a folder of such files",
        "leave --data out to train on Python's own source",
    )
