"""The order of the suite: what takes long begins first, on both workers, so that none is left alone with it at the end. And its threads."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Read when torch is imported, here and in every process that a test starts. Threads that wait for each other do so by spinning if this is
# not set; as tests share the cores, a command with two threads then spends two thirds of its time on that.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch


@pytest.fixture(autouse=True)
def as_many_threads_after_a_test_as_before() -> Iterator[None]:
    """A command that runs its rank in this process takes as many as are a rank's, and sums are cut by threads."""
    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)


@pytest.fixture
def without_collection() -> Iterator[None]:
    """Half of the time of large proofs is the collector looking through a million small objects that are all in use."""
    gc.disable()
    yield
    gc.enable()
    gc.collect()


@pytest.fixture
def interpreting() -> dict[str, str]:
    """The environment of a process that runs kernels in Triton's interpreter; `make test` installs it where torch does not find it."""
    beside = Path(sys.prefix) / "triton"
    if not beside.is_dir():
        pytest.importorskip("triton", reason="Triton is not installed: tests/gpu runs the kernels themselves")
    paths = [str(beside), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--long` runs what is marked long, and nothing else."""
    parser.addoption("--long", action="store_true", help="run the tests that are marked long, and no others")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """pytest-xdist deals the first half of the list to one worker and the second to the other, and idle ones steal from the ends."""
    left_out = [item for item in items if bool(item.get_closest_marker("long")) != config.getoption("--long")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if bool(item.get_closest_marker("long")) == config.getoption("--long")]
    # The longest have the most time allowed.
    slow = sorted((item for item in items if item.get_closest_marker("slow")), key=lambda item: -_seconds(item))
    fast = [item for item in items if not item.get_closest_marker("slow")]
    half = (len(items) + 1) // 2 - len(slow[0::2])
    items[:] = [*slow[0::2], *fast[:half], *slow[1::2], *fast[half:]]


def _seconds(item: pytest.Item) -> float:
    allowed = item.get_closest_marker("timeout")
    return float(allowed.args[0]) if allowed and allowed.args else 0.0
