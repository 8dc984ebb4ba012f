"""What is dear to make and wanted by several tests is made once a session, whichever of the test processes asks first."""

from __future__ import annotations

import fcntl
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

Made = TypeVar("Made")


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Made]) -> Made:
    """What `make(folder)` returns, `folder` being new and `name`'s own. The result can be pickled; who asks later waits for it."""
    base = factory.getbasetemp()
    base = base.parent if base.name.startswith("popen-") else base
    base.mkdir(parents=True, exist_ok=True)
    made = base / f"{name}.pickle"
    with (base / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            folder = base / name
            # What a failed attempt of another test left would hide its error behind another one.
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            result = make(folder)
            partial = made.with_suffix(".partial")
            partial.write_bytes(pickle.dumps(result))
            partial.rename(made)
        return pickle.loads(made.read_bytes())
