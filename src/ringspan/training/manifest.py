"""What a folder's files were when they were written, so that they are trusted only if they still are."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

MANIFEST = "manifest.json"
_THREADS = 8


def sync(path: Path) -> None:
    """Lets the disk have a file's bytes, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that whoever reads it, whenever this process is killed, finds all of the old text or all of the new."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)


def _describe(file: Path) -> dict[str, int | str]:
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _describe_or_error(file: Path) -> dict[str, int | str] | OSError:
    try:
        return _describe(file)
    except OSError as error:
        return error


def write_manifest(folder: Path) -> None:
    """Lets the disk have every file below `folder`, and writes down what they are."""
    files = _files(folder)
    for file in files:
        sync(file)
    # Large files are hashed at once; hashing does not hold Python's lock.
    with ThreadPoolExecutor(_THREADS) as pool:
        manifest = {file.relative_to(folder).as_posix(): found for file, found in zip(files, pool.map(_describe, files), strict=True)}
    with (folder / MANIFEST).open("w") as stream:
        json.dump(manifest, stream, indent=2)
        stream.flush()
        os.fsync(stream.fileno())


def first_damage(folder: Path) -> str | None:
    """What is not as the manifest says, in words; None where everything is."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError):
        return f"{MANIFEST} cannot be read"
    entries = list(manifest.values()) if isinstance(manifest, dict) else []
    if not entries or not all(isinstance(each, dict) and set(each) == {"bytes", "sha256"} for each in entries):
        return f"{MANIFEST} is not as it was written"
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(_describe_or_error, (folder / name for name in manifest))
    for (name, written), present in zip(manifest.items(), found, strict=True):
        if isinstance(present, FileNotFoundError):
            return f"{name} is missing"
        if isinstance(present, OSError):
            return f"{name} cannot be read ({present.strerror})"
        if present["bytes"] != written["bytes"]:
            return f"{name} has {present['bytes']} bytes of the {written['bytes']} that were written"
        if present != written:
            return f"{name} is not as it was written (another SHA-256)"
    return None
