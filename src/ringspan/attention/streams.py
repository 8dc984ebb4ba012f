"""Kernel calls side by side: a call ends in a round of blocks that does not fill a GPU, and another's fill it up.

A rank's own block is there from the start, a visitor comes later and is computed longest. Its blocks go first as soon as it is there, and
what is left of the own block runs at its end. Over a short shard, with few rounds of blocks a call, that is some percent of a pass.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from ringspan.kernels import Kernel
from ringspan.transport import Pending, works

MOST_ROWS = 1 << 19
"""Rows times heads of q beyond which a backward's calls are in turn: one round of many does not matter, and what a second works in does."""

LEAST_ROWS = 1 << 17
"""Below it a call that Python launches takes no longer than the launches; a CUDA graph's are free."""

Result = TypeVar("Result")


class Streams(Protocol):
    """Where the kernel calls of one pass run.

    Attributes:
        forked: whether calls run beside each other now.
    """

    forked: bool

    def fork(self, call: Callable[[], Result]) -> Result:
        """`call()` in its turn, and calls beside it from here on: they come after what has been done before it, and after what arrives."""
        ...

    def arrived(self, pending: Pending) -> None:
        """`pending.wait()`: all calls from here on come after it."""
        ...

    def beside(self, call: Callable[[], Result]) -> Result:
        """`call()`, beside all since a `fork`, until `join`; in its turn without one. What it reads is at hand, or it makes it itself."""
        ...

    def aside(self) -> AbstractContextManager[None]:
        """What is done within comes after the calls beside, and not after those that were in their turn since the fork."""
        ...

    def join(self) -> None:
        """What the current stream does next comes after all calls."""
        ...

    def let_go(self) -> None:
        """What the current stream has read until here may be freed, whichever stream's memory it is."""
        ...

    def outlive(self, *tensors: Tensor) -> None:
        """These are given away, to be read and freed by whoever has them."""
        ...

    def leave(self) -> None:
        """An error ends the pass: no call holds anything any more, and a capture that the pass is part of may end."""
        ...


class OneStream:
    """Every call in its turn."""

    forked = False

    def fork(self, call: Callable[[], Result]) -> Result:
        """See `Streams.fork`."""
        return call()

    def arrived(self, pending: Pending) -> None:
        """See `Streams.arrived`."""
        pending.wait()

    def beside(self, call: Callable[[], Result]) -> Result:
        """See `Streams.beside`."""
        return call()

    def aside(self) -> AbstractContextManager[None]:
        """See `Streams.aside`."""
        return nullcontext()

    def join(self) -> None:
        """See `Streams.join`."""

    def let_go(self) -> None:
        """See `Streams.let_go`."""

    def outlive(self, *tensors: Tensor) -> None:
        """See `Streams.outlive`."""

    def leave(self) -> None:
        """See `Streams.leave`."""


class TwoStreams:
    """Calls beside the current stream of a GPU, on `side`.

    Memory that a call allocates belongs to `side`: it is given out again to a call that begins after what the current stream has read of
    it. Each current stream therefore has a side of its own. What is freed may also be unmapped, where segments are expandable, as soon as
    its own stream is done, whoever else still reads it: before anything is freed `side` waits for those who do (`let_go`).
    """

    def __init__(self, side: torch.cuda.Stream) -> None:
        self._side, self.forked = side, False
        # Whether there is memory of `side` that others may read.
        self._lent = False
        # With what they read: freed before it is read, it would be given to what the current stream does next.
        self._calls: list[Callable[[], object]] = []

    def fork(self, call: Callable[[], Result]) -> Result:
        """See `Streams.fork`."""
        if not self.forked:
            self._side.wait_stream(self._current())
            self.forked = True
        return call()

    def arrived(self, pending: Pending) -> None:
        """See `Streams.arrived`."""
        found = works(pending)
        pending.wait()
        if not (self.forked or self._owes):
            return
        if not found:
            # What came was put there by the current stream.
            self._side.wait_stream(self._current())
        with torch.cuda.stream(self._side):
            for work in found:
                work.wait()

    def beside(self, call: Callable[[], Result]) -> Result:
        """See `Streams.beside`."""
        if not self.forked:
            return call()
        self._calls.append(call)
        self._lent = True
        with torch.cuda.stream(self._side):
            return call()

    def aside(self) -> AbstractContextManager[None]:
        """See `Streams.aside`."""
        self._lent |= self.forked
        return torch.cuda.stream(self._side) if self.forked else nullcontext()

    def join(self) -> None:
        """See `Streams.join`."""
        if self.forked:
            self._current().wait_stream(self._side)
            self.forked = False
            self._calls.clear()

    def let_go(self) -> None:
        """See `Streams.let_go`."""
        if self._owes:
            self._side.wait_stream(self._current())

    def outlive(self, *tensors: Tensor) -> None:
        """See `Streams.outlive`."""
        if self._lent:
            give_away(*tensors)

    def leave(self) -> None:
        """See `Streams.leave`."""
        # What the error was is said elsewhere.
        with suppress(RuntimeError):
            self.join()
            self.let_go()
        self._calls.clear()

    @property
    def _owes(self) -> bool:
        # A graph's memory stays mapped.
        return self._lent and not torch.cuda.is_current_stream_capturing()

    def _current(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._side.device)


def give_away(*tensors: Tensor) -> None:
    """`tensors` are read by the current stream from here on: when they are freed, their memory is given back once it has done that.

    For memory of another stream; nothing is done about that of the current one, nor within a CUDA graph, whose memory stays.
    """
    on_gpu = [tensor for tensor in tensors if tensor.is_cuda]
    if on_gpu and not torch.cuda.is_current_stream_capturing():
        for tensor in on_gpu:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))


_SIDES = threading.local()


def streams_for(q: Tensor, kernel: Kernel, lends: bool, most_rows: float = MOST_ROWS, side: int = 0) -> Streams:
    """For a pass over queries `q [batch, shard, heads, head_dim]`: two streams on a GPU, where a round of blocks counts.

    Not where the kernel keeps on the device what another call may read at once (those that cannot be captured in a graph do); nor where
    the courier does not lend (what arrives is then freed, to be given out again on the current stream, and NCCL's blocks would queue behind
    a visitor's); nor where memory is given out without regard to streams.

    Args:
        most_rows: rows times heads of q up to which there are two.
        side: which of the sides, where several run beside each other.
    """
    if q.device.type != "cuda" or not (lends and kernel.can.graph_capture) or torch.cuda.get_allocator_backend() != "native":
        return OneStream()
    rows = q.shape[0] * q.shape[1] * q.shape[2]
    if rows > most_rows or (rows < LEAST_ROWS and not torch.cuda.is_current_stream_capturing()):
        return OneStream()
    # Of each thread its own as well: ranks that are threads of one process do not wait for each other.
    sides, current = vars(_SIDES).setdefault("of", {}), torch.cuda.current_stream(q.device)
    if (current, side) not in sides:
        # Above the current stream, below what the ranks tell each other.
        sides[(current, side)] = torch.cuda.Stream(q.device, priority=current.priority - 1)
    return TwoStreams(sides[(current, side)])
