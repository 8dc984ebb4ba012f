"""What waits for what on a GPU's streams, and what there is where there is no room for more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ringspan.errors import RingspanError
from ringspan.transport import SingleRank
from ringspan.transport.symmetric_memory import SymmetricMemory


class Stream:
    """Knows what is done before whatever it is given next."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.before: set[str] = set()

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
        "is_current_stream_capturing": lambda: device.capturing,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    return device


class Memory(SymmetricMemory):
    """Without a GPU: its signals are works of the device."""

    def __init__(self, device: Device) -> None:
        self._index, self._device, self._streams, self._before = 0, torch.device("cuda", 0), {}, None
        self._gpu, self._captured = device, False
        from ringspan.transport.peers import Passes

        self._passes = Passes()


def test_a_message_does_not_wait_for_the_one_before_it_in_a_graph(device: Device):
    memory = Memory(device)
    memory.begin()
    device.work("packed")
    first = memory.aside(0, [lambda name=name: device.work(name) for name in ("a", "b", "c")], lambda: device.work("came"))
    device.work("computed")
    assert all("packed" in device.seen[name] for name in ("a", "b", "c", "came"))
    assert device.seen["b"] == ({"packed"} if device.capturing else {"packed", "a"})
    assert device.seen["c"] == ({"packed", "a"} if device.capturing else {"packed", "a", "b"})
    assert len(memory._streams) == (3 if device.capturing else 2), "few branches, which share few queues of the hardware"
    assert "a" not in device.seen["computed"], "computing waits for nothing"
    second = memory.aside(0, [lambda: device.work("d")], lambda: device.work("came too"))
    assert {"a", "b", "c"} <= device.seen["d"], "what one lane sends goes in turn"
    assert "came" not in device.seen["d"], "and does not wait for what it is still to receive"
    for pending in (first, second):
        pending.wait()
    device.work("next")
    assert {"a", "b", "c", "d", "came", "came too"} <= device.seen["next"]
    memory.end()


@pytest.mark.parametrize("captured", [False, True])
def test_what_was_planned_goes_on_where_there_is_no_room_for_more(monkeypatch: pytest.MonkeyPatch, captured: bool):
    mib = 1 << 20

    def empty(nbytes: int, **_: Any) -> torch.Tensor:
        if nbytes > 8 * mib:
            raise torch.OutOfMemoryError(f"no room for {nbytes}")
        return torch.empty(nbytes, dtype=torch.uint8)

    def rendezvous(mine: torch.Tensor, _: Any) -> Any:
        return SimpleNamespace(get_buffer=lambda rank, sizes, dtype: mine)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    memory, transport = Memory.__new__(Memory), SimpleNamespace(group=None, gather_objects=SingleRank().gather_objects)
    memory._module, memory._transport = SimpleNamespace(empty=empty, rendezvous=rendezvous), transport
    memory._device, memory._size = torch.device("cuda", 0), 1
    memory._inboxes, memory._mine, memory._handle, memory._nbytes, memory._captured, memory._retired = [], None, None, 0, False, []
    memory.reserve(5 * mib)
    memory._captured, before = captured, memory.inbox(0).data_ptr()
    with pytest.raises(RingspanError, match=r"rank 0: no room.*transport='process_group'"):
        memory.reserve(9 * mib)
    assert memory.inbox(0).numel() == 6 * mib
    assert not captured or memory.inbox(0).data_ptr() == before, "what a graph writes to is still there"
    memory.reserve(int(7.5 * mib))
    assert memory.inbox(0).numel() == 8 * mib and len(memory._retired) == captured
