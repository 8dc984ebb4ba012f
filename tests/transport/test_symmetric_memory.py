"""What waits for what on a GPU's streams, and what there is where there is no room for more."""

from __future__ import annotations

import ctypes
import sys
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from ringspan.errors import RingspanError
from ringspan.transport import SingleRank
from ringspan.transport.peer_memory import NATIVE_ATOMICS, _is_on_nvlink
from ringspan.transport.symmetric_memory import SymmetricMemory
from tests.support.device import Device, device

__all__ = ["device"]

MODULE = sys.modules[SymmetricMemory.__module__]
"""The room shows a function of its name."""


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
    writes = [lambda name=name: device.work(name) for name in ("a", "b", "c")]
    first = memory.aside(0, lambda: device.work("room"), writes, lambda: device.work("came"))
    device.work("computed")
    assert all("packed" in device.seen[name] for name in ("a", "b", "c", "came"))
    room = {"packed", "room"}
    assert device.seen["b"] == (room if device.capturing else {*room, "a"})
    assert device.seen["c"] == ({*room, "a"} if device.capturing else {*room, "a", "b"})
    assert len(memory._streams) == (3 if device.capturing else 2), "few branches, which share few queues of the hardware"
    assert "a" not in device.seen["computed"], "computing waits for nothing"
    second = memory.aside(0, lambda: None, [lambda: device.work("d")], lambda: device.work("came too"))
    assert {"a", "b", "c"} <= device.seen["d"], "what one lane sends goes in turn"
    assert "came" not in device.seen["d"], "and does not wait for what it is still to receive"
    for pending in (first, second):
        pending.wait()
    device.work("next")
    assert {"a", "b", "c", "d", "came", "came too"} <= device.seen["next"]
    memory.end()


def test_several_signals_are_one_kernel_on_the_words_of_torchs_own(device: Device, monkeypatch: pytest.MonkeyPatch):
    # put_signal(peer, channel) sets word size * channel + own rank of the peer's pad; wait_signal waits for the peer's in its own.
    memory, done = Memory(device), []
    memory._size, memory._addresses, memory._timeout_ms = 4, {}, 7
    memory._transport = cast(Any, SimpleNamespace(rank=2))
    memory._handle = SimpleNamespace(
        signal_pad_ptrs=[1000, 2000, 3000, 4000],
        put_signal=lambda *word: done.append(("put", *word)),
        wait_signal=lambda *word: done.append(("wait", *word)),
    )
    memory._device = torch.device("cpu")
    fused = SimpleNamespace(
        fused_set=lambda addresses, ms: done.append(("set", addresses.tolist(), ms)),
        fused_await=lambda addresses, ms: done.append(("await", addresses.tolist(), ms)),
    )
    monkeypatch.setattr(MODULE, "signal_kernels", lambda: fused)
    two, one = [(0, 3), (3, 1)], [(1, 5)]
    for words in (two, one, []):
        memory.signal(words)
        memory.wait(words)
    single = [("put", 1, 5, 7), ("wait", 1, 5, 7)]
    if device.capturing:
        each = [("put", 0, 3, 7), ("put", 3, 1, 7), ("wait", 0, 3, 7), ("wait", 3, 1, 7)]
        assert done == each + single, "a table of addresses is not made within a graph"
        device.capturing, done[:] = False, []
        memory.signal(two)
        device.capturing = True
        memory.signal(two)
        assert [what for what, *_ in done] == ["set", "set"], "one that is there is used"
        return
    put, awaited = [1000 + 4 * (4 * 3 + 2), 4000 + 4 * (4 * 1 + 2)], [3000 + 4 * (4 * 3 + 0), 3000 + 4 * (4 * 1 + 3)]
    assert done == [("set", put, 7), ("await", awaited, 7), *single]
    monkeypatch.setattr(MODULE, "signal_kernels", lambda: None)
    memory.signal(two)
    assert done[-2:] == [("put", 0, 3, 7), ("put", 3, 1, 7)], "without Triton"


class Driver:
    """CUDA's, of GPUs whose handles are ten more than their numbers; `joined` are those that NVLink joins. It answers once it is up."""

    def __init__(self, joined: set[int], gpus: int = 3) -> None:
        self.joined, self.gpus, self.is_up = joined, gpus, False

    def cuInit(self, flags: int) -> int:
        assert flags == 0
        self.is_up = True
        return 0

    def cuDeviceGet(self, handle: Any, number: int) -> int:
        if not self.is_up:
            return 3
        handle._obj.value = number + 10
        return 0 if number < self.gpus else 101

    def cuDeviceGetP2PAttribute(self, value: Any, attribute: int, one: Any, other: Any) -> int:
        assert attribute == NATIVE_ATOMICS == 3
        value._obj.value = {one.value - 10, other.value - 10} <= self.joined
        return 0


@pytest.mark.parametrize(
    ("driver", "of_three", "of_two"),
    [
        (Driver({0, 1, 2}), True, True),
        (Driver({0, 1}), False, True),
        (Driver(set()), False, False),
        (Driver({0, 1, 2}, gpus=2), False, True),
    ],
)
def test_links_rest_where_nvlink_joins_a_gpu_to_those_of_all_others(
    driver: Driver, of_three: bool, of_two: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    places = [("host", index) for index in range(3)]
    assert _is_on_nvlink(torch.device("cuda", 0), places) is of_three
    assert _is_on_nvlink(torch.device("cuda", 1), places[:2]) is of_two


def test_without_a_driver_nothing_is_known_of_links(monkeypatch: pytest.MonkeyPatch):
    def missing(name: str) -> Any:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert not _is_on_nvlink(torch.device("cuda", 0), [("host", 0), ("host", 1)])


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
    table = cast(Any, object())
    memory._addresses = {cast(Any, "words"): table}
    with pytest.raises(RingspanError, match=r"rank 0: no room.*transport='process_group'"):
        memory.reserve(9 * mib)
    assert memory.inbox(0).numel() == 6 * mib
    assert not captured or memory.inbox(0).data_ptr() == before, "what a graph writes to is still there"
    memory.reserve(int(7.5 * mib))
    assert memory.inbox(0).numel() == 8 * mib and len(memory._retired) == captured
    assert (table in memory._addresses.values()) is False and [table for *_, tables in memory._retired for table in tables] == (
        ["words"] if captured else []
    ), "what a graph reads lives as long as what it writes to"


def test_ranks_meet_by_signals_that_no_message_has(monkeypatch: pytest.MonkeyPatch):
    import torch.distributed._symmetric_memory as symmetric_memory

    met: list[tuple[int, int]] = []
    handle = SimpleNamespace(
        get_buffer=lambda rank, sizes, dtype: torch.empty(sizes, dtype=dtype),
        barrier=lambda channel, timeout: met.append((channel, timeout)),
    )
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    for name, value in {
        "get_signal_pad_size": lambda: 2048, "empty": lambda nbytes, **_: torch.empty(nbytes, dtype=torch.uint8),
        "rendezvous": lambda mine, group: handle,
    }.items():  # fmt: skip
        monkeypatch.setattr(symmetric_memory, name, value)
    transport: Any = SimpleNamespace(size=8, group=None, timeout_ms=1234, gather_objects=SingleRank().gather_objects)
    memory = SymmetricMemory(transport, torch.device("cuda", 0), False)
    memory.meet()
    ((channel, timeout),) = met
    assert (channel, timeout) == (63, 1234), "the last word of each rank for each other in 2048 bytes of words"
    assert memory.channels == 63, "signals are counted from 0"
