"""The store of checkpoints in host memory: what is on its way when, what is waited for, and which buffers are used again."""

from __future__ import annotations

import random
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from ringspan.transformer import HostStore, Offload, PlainCopier


class Recorder(PlainCopier):
    """A copier that tells what it did, and copies nothing before it is waited for: an early use reads poison."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.pending: dict[int, Any] = {}

    def _start(self, what: str, source: Tensor, target: Tensor) -> int:
        self.log.append(what)
        target.fill_(0xAB)
        self.pending[len(self.log)] = (source, target)
        return len(self.log)

    def out(self, tensor: Tensor, host: Tensor) -> int:  # type: ignore[override]
        return self._start("out", tensor, host)

    def back(self, host: Tensor, tensor: Tensor) -> int:  # type: ignore[override]
        return self._start("back", host, tensor)

    def wait(self, mark: int) -> None:
        # One stream: everything that was started before has ended, too.
        for earlier in sorted(self.pending):
            if earlier <= mark:
                source, target = self.pending.pop(earlier)
                target.copy_(source)


def test_the_next_tensors_are_on_their_way_back_before_they_are_asked_for_and_never_more_than_so_many():
    copier = Recorder()
    store = HostStore(copier, Offload(in_flight=2))
    tensors = [torch.full((3,), float(index)) for index in range(7)]
    parked = [store.put(tensor.clone()) for tensor in tensors]
    assert sum(each.here is not None for each in parked) == 2, "no more device memory than what is in flight"
    for index in reversed(range(7)):
        started = len([word for word in copier.log if word == "back"])
        assert torch.equal(parked[index](), tensors[index])
        parked.pop()
        waiting = sum(each.here is not None for each in parked)
        assert waiting <= 2
        if index < 5:
            assert started >= 5 - index, "it had been asked for before"
    assert copier.log == ["out"] * 7 + ["back"] * 5, "the last two had not left yet"
    assert store.bytes_used == 0


def test_whoever_asks_for_a_tensor_is_known_to_read_it(monkeypatch: pytest.MonkeyPatch):
    """It may have been on its way before another stream was the current one, and belongs to that."""
    store, handed = HostStore(copier := Recorder(), Offload(in_flight=1)), []
    monkeypatch.setattr(copier, "hand", handed.append)
    parked = [store.put(torch.full((2,), float(index))) for index in range(3)]
    found = [parked.pop()() for _ in range(3)]
    assert [tensor.data_ptr() for tensor in handed] == [tensor.data_ptr() for tensor in found]


def test_all_that_a_layer_needs_is_asked_for_with_the_first_of_it_and_nothing_twice():
    copier = Recorder()
    store = HostStore(copier, Offload(in_flight=1))
    layers = []
    for index in range(4):
        number = store.new_layer()
        layers.append([store.put(torch.full((2,), 10.0 * index + part), number) for part in range(3)])
    for index in reversed(range(4)):
        for part in (0, 2, 1):
            assert torch.equal(layers[index][part](), torch.full((2,), 10.0 * index + part))
            there = {each.layer for layer in layers for each in layer if each.here is not None}
            assert len(there - {index + 1}) <= 1
        layers.pop()
    assert copier.log == ["out"] * 12 + ["back"] * 9


def test_what_has_left_is_waited_for_before_a_layer_begins_and_not_in_the_middle_of_it():
    """There another stream may be computing already, in memory that is let go then: it does not wait for what this one waits for."""
    copier = Recorder()
    store = HostStore(copier, Offload(in_flight=2))
    layers: list[list[Any]] = []
    for _ in range(4):
        number = store.new_layer()
        waiting = set(copier.pending)
        there = [each for parked in layers for each in parked if each.here is not None]
        assert {each.layer for each in there} == {number - 1} - {0}
        layers.append([store.put(torch.full((2,), float(number)), number) for _ in range(3)])
        assert waiting <= set(copier.pending), "no put has waited"
        assert all(each.here is not None for each in there), "or let go of anything"
    assert all(torch.equal(each(), torch.full((2,), float(each.layer))) for parked in reversed(layers) for each in parked)


def test_memory_of_what_came_back_for_nothing_is_held_whatever_stream_is_current_then():
    held, copier = [], Recorder()
    copier.hold = lambda tensor: held.append(tensor.data_ptr())  # type: ignore[method-assign]
    store = HostStore(copier, Offload(in_flight=1))
    first, second, third = (store.put(torch.full((2,), float(index))) for index in range(3))
    third()
    second()
    assert first.here is not None, "it is on its way"
    started, expected = dict(copier.pending), first.here.data_ptr()
    del first, second, third
    assert held == [expected]
    assert copier.pending == started, "and nobody has waited"
    # Nor is what was on its way then in the way of the next step's.
    layers = [store.put(torch.full((2,), float(index))) for index in range(3)]
    layers.pop()()
    assert layers[1].here is not None


def test_buffers_are_used_again_in_the_next_step():
    made = []

    class Counting(PlainCopier):
        def host_buffer(self, size: int) -> Tensor:
            made.append(size)
            return super().host_buffer(size)

    store = HostStore(Counting(), Offload())
    for _ in range(3):
        parked = [store.put(torch.ones(4, 2)) for _ in range(5)]
        for each in reversed(parked):
            each()
        del parked, each
    assert made == [32] * 5


class Counted(PlainCopier):
    """A copier that knows how many bytes of its buffers are still there, and how many buffers went while something was copied."""

    def __init__(self) -> None:
        self.held, self.most_held, self.made, self.pending, self.early = 0, 0, 0, False, 0

    def host_buffer(self, size: int) -> Tensor:
        buffer = super().host_buffer(size)
        self.held, self.made = self.held + size, self.made + 1
        self.most_held = max(self.most_held, self.held)
        weakref.finalize(buffer, self._gone, size)
        return buffer

    def _gone(self, size: int) -> None:
        self.held -= size
        self.early += self.pending

    def out(self, tensor: Tensor, host: Tensor) -> None:
        super().out(tensor, host)
        self.pending = True

    def finish(self) -> None:
        self.pending = False


def pass_over(store: HostStore, *sizes: int) -> int:
    """A forward and a backward over layers of `sizes` bytes; how many of them went to the host."""
    parked = [(store.put(torch.full((size,), index, dtype=torch.uint8)), index) for index, size in enumerate(sizes)]
    on_host = sum(each.is_on_host for each, _ in parked)
    while parked:
        each, index = parked.pop()
        assert bool((each() == index).all())
        del each
    return on_host


@pytest.mark.parametrize("host_bytes", [None, 50_000, 5_000])
def test_lengths_that_vary_leave_no_buffers_of_each_size_behind(host_bytes: int | None):
    copier, generator = Counted(), random.Random(0)
    store = HostStore(copier, Offload(host_bytes=host_bytes))
    held = []
    for _ in range(300):
        length = generator.randint(100, 1000)
        pass_over(store, *[size for _ in range(5) for size in (length, length * 3 // 4)])
        assert store.bytes_used == 0 and store.bytes_held == copier.held
        held.append(copier.held)
    assert copier.early == 0, "a copy would write to memory that is no longer there"
    assert copier.most_held <= (host_bytes or 1.5 * store.most_bytes_used)
    assert max(held[100:]) <= 1.2 * max(held[:100]), "it goes on growing"
    if host_bytes != 5_000:
        assert copier.made < 100, "one of ten thousand is the same size"


def test_a_bound_takes_what_fits_in_it_whatever_was_there_before():
    store = HostStore(Counted(), Offload(host_bytes=1000))
    assert pass_over(store, 300, 300, 300, 300) == 3
    assert [pass_over(store, *[100] * 12) for _ in range(2)] == [10, 10], "small ones in large buffers would have been three"
    assert pass_over(store, 1001) == 0 and pass_over(store, 1000) == 1 and store.bytes_held == 1000


def test_small_ones_in_large_buffers_are_noticed_when_there_is_no_room():
    store = HostStore(Counted(), Offload(host_bytes=1000))
    assert pass_over(store, 500, 500) == 2
    assert [pass_over(store, *[100] * 10) for _ in range(2)] == [2, 10]
