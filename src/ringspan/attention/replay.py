"""Passes that are launched at once: one that comes again is captured as a CUDA graph, and from then on replayed.

At a few thousand tokens a rank the launches of a pass take several times as long as its computing. A graph reads and writes the memory that
it was captured with: what goes in is copied there first, and what comes out is copied from there.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ringspan.errors import RingspanError
from ringspan.transport import PeerMemory, Transport

Results = tuple[Tensor, ...]
Work = Callable[..., Results]
Replay = Callable[[], object]

EAGER_CALLS = 2
"""Calls of a pass that are launched one by one: then its kernels are compiled, and libraries have their workspaces."""
MOST_GRAPHS = 32
"""Graphs that are kept: the last used."""


class CudaCapture:
    """Captures CUDA graphs that share their memory: what one computes is copied away before another is replayed."""

    def __init__(self) -> None:
        self._pool: Any = None
        self._done: torch.cuda.Event | None = None

    def __call__(self, work: Callable[[], Results]) -> tuple[Replay, Results]:
        """A replay of `work`, and the results that it writes to.

        Raises:
            RuntimeError: where the work does what a capture forbids.
        """
        graph = torch.cuda.CUDAGraph()
        # Only what this thread calls is checked: NCCL's watchdog asks for events all the time.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            results = work()
        self._pool = graph.pool()
        return graph.replay, results

    def begin(self) -> None:
        """The memory of the graphs is used from here on: not before whoever used it last is done, on whatever stream."""
        if self._done is not None:
            torch.cuda.current_stream().wait_event(self._done)

    def end(self) -> None:
        """What was computed has been copied away."""
        self._done = self._done or torch.cuda.Event()
        self._done.record()

    def __del__(self) -> None:
        # The last of its graphs goes with it, and their memory: nobody else waits for the replay.
        if self._done is not None:
            with suppress(RuntimeError):
                self._done.synchronize()

    @staticmethod
    def is_under_way() -> bool:
        """Whether the current stream is being captured by somebody else: then all is launched, into that graph."""
        return torch.cuda.is_current_stream_capturing()


@dataclass
class _Entry:
    calls: int = 0
    replay: Replay | None = None
    inputs: tuple[Tensor | None, ...] = ()
    results: Results = ()
    sent: Counter[int] = field(default_factory=Counter)
    owner: object = None


class Replays:
    """The graphs of one context's passes.

    Every rank comes here with the same passes in the same order, and so captures, replays and forgets the same ones.

    Args:
        capture: makes a replay of some work; of another kind in tests.
        most: graphs that are kept.
    """

    def __init__(self, capture: CudaCapture | None = None, most: int = MOST_GRAPHS) -> None:
        self._capture = CudaCapture() if capture is None else capture
        self._most = most
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()

    @property
    def number(self) -> int:
        """How many graphs there are."""
        return sum(entry.replay is not None for entry in self._entries.values())

    def run(
        self, owner: object, direction: str, inputs: Sequence[Tensor | None], work: Work, transport: Transport, memory: PeerMemory | None
    ) -> Results:
        """`work(*inputs)`, launched the first times, then captured, then replayed.

        Args:
            owner: what the work belongs to; kept as long as its graph.
            direction: which work of that owner.
            inputs: of the same number, shapes and dtypes whenever the work is the same, or they are another's.
            work: runs on the tensors it is given, and on the current stream.
            transport: of all ranks that have this work; counts what is sent, replayed or not.
            memory: the peer memory that the work goes through, which orders passes on several streams; or None.

        Raises:
            RingspanError: on every rank, where the capture fails on any.
        """
        if self._capture.is_under_way():
            return work(*inputs)
        key = (id(owner), direction, *(None if each is None else (each.shape, each.dtype) for each in inputs))
        entry = self._entries.setdefault(key, _Entry(owner=owner))
        self._entries.move_to_end(key)
        if len(self._entries) > self._most:
            self._entries.popitem(last=False)
        entry.calls += 1
        if entry.calls <= EAGER_CALLS:
            return work(*inputs)
        if entry.replay is None:
            self._make(entry, inputs, work, transport, memory)
        else:
            transport.bytes_sent.update(entry.sent)
        assert entry.replay is not None
        self._capture.begin()
        for kept, given in zip(entry.inputs, inputs, strict=True):
            if kept is not None and given is not None:
                kept.copy_(given)
        if memory is not None:
            memory.begin()
        entry.replay()
        if memory is not None:
            memory.end()
        results = tuple(result.clone() for result in entry.results)
        self._capture.end()
        return results

    def _make(self, entry: _Entry, inputs: Sequence[Tensor | None], work: Work, transport: Transport, memory: PeerMemory | None) -> None:
        entry.inputs = tuple(None if each is None else torch.empty(each.shape, dtype=each.dtype, device=each.device) for each in inputs)
        before, problem, cause = Counter(transport.bytes_sent), None, None
        try:
            entry.replay, entry.results = self._capture(lambda: work(*entry.inputs))
        except Exception as error:
            problem, cause = (str(error).strip() or type(error).__name__).splitlines()[0], error
            if memory is not None and not isinstance(error, RingspanError):
                # Nothing of it has run, so that no signal stands. (The memory's own refusal says that one of a pass before does.)
                memory.end()
        # Nothing has been sent yet: a rank that replayed alone would wait for the others.
        for rank, said in enumerate(transport.gather_objects(problem)):
            if said is not None:
                entry.replay, entry.inputs, entry.results = None, (), ()
                rule = "A pass is replayed on every rank or on none"
                refused = RingspanError("cuda_graphs=True", f"rank {rank} could not capture a pass: {said}", rule, "cuda_graphs=False")
                raise refused from cause
        entry.sent = Counter(transport.bytes_sent)
        entry.sent.subtract(before)
