"""Kernel calls side by side: while the last blocks of one are computed, the first of the next take the multiprocessors that are free.

A call ends in a round of blocks that does not fill a GPU. Over a short shard, with few rounds a call, that is some percent of a pass.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from ringspan.kernels import Kernel

MOST_ROWS = 1 << 19
"""Rows times heads of q beyond which one round of many does not matter, and the memory that a second call works in does."""

LEAST_ROWS = 1 << 17
"""Below it a call that Python launches takes no longer than the launches; a CUDA graph's are free."""

Result = TypeVar("Result")


class Streams(Protocol):
    """Where the kernel calls of one pass run."""

    def beside(self, call: Callable[[], Result]) -> Result:
        """`call()`, after what the current stream has done until here and beside what it does next, until `join`."""
        ...

    def join(self) -> None:
        """What the current stream does next comes after all calls."""
        ...

    def leave(self) -> None:
        """An error ends the pass: no call holds anything any more, and a capture that the pass is part of may end."""
        ...


class OneStream:
    """Every call in its turn."""

    def beside(self, call: Callable[[], Result]) -> Result:
        """See `Streams.beside`."""
        return call()

    def join(self) -> None:
        """See `Streams.join`."""

    def leave(self) -> None:
        """See `Streams.leave`."""


class TwoStreams:
    """Calls beside the current stream of a GPU, on `side`.

    Memory that a call allocates belongs to `side`: it is given out again to a call that begins after what the current stream has read of
    it. Each current stream therefore has a side of its own.
    """

    def __init__(self, side: torch.cuda.Stream) -> None:
        self._side = side
        # With what they read: freed before it is read, it would be given to what the current stream does next.
        self._calls: list[Callable[[], object]] = []

    def beside(self, call: Callable[[], Result]) -> Result:
        """See `Streams.beside`."""
        self._side.wait_stream(torch.cuda.current_stream(self._side.device))
        self._calls.append(call)
        with torch.cuda.stream(self._side):
            return call()

    def join(self) -> None:
        """See `Streams.join`."""
        if self._calls:
            torch.cuda.current_stream(self._side.device).wait_stream(self._side)
            self._calls.clear()

    def leave(self) -> None:
        """See `Streams.leave`."""
        # What the error was is said elsewhere.
        with suppress(RuntimeError):
            self.join()
        self._calls.clear()


_SIDES = threading.local()


def streams_for(q: Tensor, kernel: Kernel) -> Streams:
    """For a pass over queries `q [batch, shard, heads, head_dim]`: two streams on a GPU, where a round of blocks counts.

    Not where the kernel keeps on the device what another call may read at once (those that cannot be captured in a graph do), nor where
    memory is given out without regard to streams.
    """
    if q.device.type != "cuda" or not kernel.can.graph_capture or torch.cuda.get_allocator_backend() != "native":
        return OneStream()
    rows = q.shape[0] * q.shape[1] * q.shape[2]
    if rows > MOST_ROWS or (rows < LEAST_ROWS and not torch.cuda.is_current_stream_capturing()):
        return OneStream()
    # Of each thread its own as well: ranks that are threads of one process do not wait for each other.
    sides, current = vars(_SIDES).setdefault("of", {}), torch.cuda.current_stream(q.device)
    if current not in sides:
        sides[current] = torch.cuda.Stream(q.device)
    return TwoStreams(sides[current])
