"""Stands for a GPU where there is none: what each piece of work on its streams comes after."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch


class Stream:
    """Knows what is done before whatever it is given next."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.before: set[str] = set()

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, -3

    def wait_stream(self, other: Stream) -> None:
        self.before |= other.before

    def wait_event(self, event: Event) -> None:
        self.before |= event.before


class Event:
    def record(self, stream: Stream) -> None:
        self.before = set(stream.before)


class Device:
    """Stands for torch.cuda: the current stream, and whether it is captured."""

    def __init__(self, capturing: bool) -> None:
        self.current = self.main = Stream()
        self.capturing = capturing
        self.seen: dict[str, set[str]] = {}

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def work(self, name: str) -> None:
        """Some work on the current stream, which begins after what that stream has waited for."""
        self.seen[name] = set(self.current.before)
        self.current.before.add(name)


@pytest.fixture(params=[True, False], ids=["captured", "launched"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device(request.param)
    for name, value in {
        "Stream": Stream, "Event": Event, "stream": device.stream, "current_stream": lambda index=None: device.current,
        "is_current_stream_capturing": lambda: device.capturing, "device": lambda index: nullcontext(),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    return device
