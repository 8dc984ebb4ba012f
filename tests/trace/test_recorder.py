"""The recorder's clocks: the host's, and that of a GPU, played by a device that only says what it was asked."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from ringspan.attention.mail import TransportCourier
from ringspan.attention.program import Batch
from ringspan.trace import CudaClock, HostClock, Recorder
from ringspan.transport import works
from ringspan.transport.symmetric_memory import _Aside


class Gpu:
    """Streams and events as torch.cuda has them, over a time that the test sets."""

    def __init__(self) -> None:
        self.now, self.queue, self.synchronised = 0.0, 0.0, 0
        self.current = "main"
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool = False) -> None:
                assert enable_timing, "an event without timing cannot be read"
                self.at: float | None = None
                self.seen = 0

            def record(self, stream: str | None = None) -> None:
                self.at, self.stream, self.seen = gpu.now, stream, gpu.synchronised

            def elapsed_time(self, other: Event) -> float:
                assert self.at is not None
                assert other.at is not None
                assert gpu.synchronised > other.seen, "an event is read only when it is known to be over"
                return (other.at - self.at) * 1e3

        class Entered:
            def __init__(self, stream: str) -> None:
                self.stream = stream

            def __enter__(self) -> None:
                self.before, gpu.current = gpu.current, self.stream

            def __exit__(self, *_: object) -> None:
                gpu.current = self.before

        self.Event, self.stream = Event, Entered

    def Stream(self, device: object) -> str:
        return "probe"

    def current_stream(self, device: object) -> str:
        return self.current

    def synchronize(self, device: object) -> None:
        self.synchronised += 1


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    fake = Gpu()
    for name in ("Event", "stream", "Stream", "current_stream", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    return fake


def test_a_gpus_parts_are_timed_by_events_on_the_current_stream_and_read_after_one_synchronisation(gpu: Gpu):
    recorder = Recorder(CudaClock(torch.device("cuda", 0)))
    gpu.now = 5.0
    recorder.start("forward")
    begun = gpu.synchronised
    gpu.now = 6.0
    token = recorder.begin(0, "attend", "tile")
    gpu.now = 8.5
    recorder.end(token)
    assert gpu.synchronised == begun, "nothing waits for the device while it runs"
    (mark,) = recorder.finish()
    assert gpu.synchronised == begun + 1
    assert mark.stop - mark.start == pytest.approx(2.5)
    assert (mark.direction, mark.step, mark.kind, mark.what, mark.arrived) == ("forward", 0, "attend", "tile", None)


def test_when_a_transfer_came_is_told_by_a_stream_that_does_nothing_but_wait_for_it(gpu: Gpu):
    waited = []
    work = SimpleNamespace(wait=lambda: waited.append(gpu.current))
    recorder = Recorder(CudaClock(torch.device("cuda", 0)))
    recorder.start("forward")
    token = recorder.begin(0, "transfer", "batch", SimpleNamespace(works=[work, work]))
    assert waited == ["probe", "probe"]
    assert gpu.current == "main"
    assert token.arrival.stream == "probe"
    recorder.end(token)
    assert recorder.finish()[0].arrived is not None


def test_what_goes_through_peer_memory_is_waited_for_by_its_events(gpu: Gpu, monkeypatch: pytest.MonkeyPatch):
    waited = []

    class Stream(str):
        def wait_event(self, event: object) -> None:
            waited.append((str(self), event))

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(gpu.current))
    device = torch.device("cuda", 0)
    recorder = Recorder(CudaClock(device))
    recorder.start("forward")
    pending = _Aside(cast(Any, ["written", "arrived"]), device)
    token = recorder.begin(0, "transfer", "batch", pending)
    pending.wait()
    assert waited == [(stream, event) for stream in ("probe", "main") for event in ("written", "arrived")]
    recorder.end(token)
    assert recorder.finish()[0].arrived is not None


def test_a_batch_that_a_transport_carries_passes_its_works_on(gpu: Gpu):
    work = SimpleNamespace(wait=lambda: None)
    carried = SimpleNamespace(works=[work], wait=lambda: None)
    courier = TransportCourier(
        cast(Any, SimpleNamespace(exchange=lambda sends, receives, lane: carried)), cast(Any, None), torch.device("cpu")
    )
    assert works(courier.post(Batch(0, 0, 1, (), ()), [], [])) == [work]


def test_where_the_transport_has_no_works_the_end_of_the_wait_has_to_do(gpu: Gpu):
    recorder = Recorder(CudaClock(torch.device("cuda", 0)))
    recorder.start("forward")
    recorder.end(recorder.begin(0, "transfer", "batch", SimpleNamespace(wait=lambda: pytest.fail("only the executor waits"))))
    assert recorder.finish()[0].arrived is None


def test_post_transfer_and_wait_of_one_batch_share_its_number_and_others_have_their_own():
    recorder = Recorder(HostClock())
    recorder.start("backward")
    # Equal, but not the same: what is posted twice is two batches.
    batches = [["kv0"], ["kv0"]]
    assert batches[0] is not batches[1]
    for kind in ("post", "transfer", "wait"):
        for batch in batches:
            recorder.end(recorder.begin(0, kind, batch))
    recorder.end(recorder.begin(0, "attend", batches[0]))
    marks = recorder.finish()
    assert [mark.batch for mark in marks] == [0, 1, 0, 1, 0, 1, -1]
    assert all(before.stop <= after.start for before, after in pairwise(marks))
    assert recorder.finish() == (), "what was read is forgotten"
