"""Peer memory of in-process ranks, whose work may be that of several streams: what each of them knows to be done."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch

from ringspan.transport import SingleRank, shared_memory


class Streams:
    """Streams that remember what is done before what they do next."""

    def __init__(self) -> None:
        self.current = "main"
        self._known: dict[str, set[str]] = defaultdict(set)

    def do(self, what: str) -> None:
        self._known[self.current].add(what)

    def know(self, what: str) -> bool:
        return what in self._known[self.current]

    def recorded(self, device: torch.device) -> frozenset[str]:
        return frozenset(self._known[self.current])

    def follow(self, done: frozenset[str] | None, device: torch.device) -> None:
        self._known[self.current] |= done or frozenset()


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    made = Streams()
    monkeypatch.setattr(shared_memory, "recorded", made.recorded)
    monkeypatch.setattr(shared_memory, "follow", made.follow)
    return made


@pytest.fixture
def memory() -> shared_memory.SharedMemory:
    return shared_memory.SharedMemory(SingleRank(), torch.device("cpu"))


def test_who_waits_on_another_stream_comes_after_what_was_done_beside(streams: Streams, memory: shared_memory.SharedMemory):
    landed = memory.beside("arrive", lambda: streams.do("land"))
    streams.current = "side"
    assert not streams.know("land")
    landed.wait()
    assert streams.know("land")


def test_what_is_next_on_a_lane_comes_after_what_another_stream_did_there(streams: Streams, memory: shared_memory.SharedMemory):
    memory.beside("arrive", lambda: streams.do("first"))
    streams.current = "side"
    found = []
    memory.beside("keep", lambda: found.append(streams.know("first")))
    memory.beside("arrive", lambda: found.append(streams.know("first")))
    assert found == [False, True]


def test_who_waits_on_another_stream_comes_after_what_was_written_aside_and_what_arrives(
    streams: Streams, memory: shared_memory.SharedMemory
):
    pending = memory.aside(0, lambda: streams.do("room"), [lambda: streams.do("write")], lambda: streams.do("arrive"))
    streams.current = "side"
    pending.wait()
    assert all(map(streams.know, ("room", "write", "arrive")))


def test_a_pass_on_another_stream_comes_after_the_one_before(streams: Streams, memory: shared_memory.SharedMemory):
    memory.begin()
    streams.do("read")
    memory.end()
    streams.current = "side"
    memory.begin()
    assert streams.know("read")
