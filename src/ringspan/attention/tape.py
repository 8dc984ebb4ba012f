"""What attention computed, kept while the layer around it is computed again: neither its kernel nor its messages run twice.

DISTFLASHATTN (2310.03294) cuts a rematerialised layer at attention's output. Here that is a tape: under `recording` every attention of
the layer leaves its result on it, and under `replaying` takes it from there, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

Result = tuple[Tensor, Tensor]
Keep = Callable[[Tensor], Callable[[], Tensor]]


def keep_here(tensor: Tensor) -> Callable[[], Tensor]:
    """Keeps a tensor where it is."""
    return lambda: tensor


class Tape:
    """Attention's results `(out, lse)` of one layer, in the order in which they were computed.

    Args:
        keep: takes a tensor and returns what gives it back: `keep_here`, or to host memory and back.
    """

    def __init__(self, keep: Keep = keep_here) -> None:
        self._keep = keep
        self._kept: list[tuple[Callable[[], Tensor], Callable[[], Tensor]]] = []
        self._place: int | None = None

    def result(self, compute: Callable[[], Result]) -> Result:
        """What `compute` returned when this was recorded, or what it returns now."""
        if self._place is None:
            out, lse = compute()
            # Other views of the same memory: those that are returned will belong to a graph that must not hold itself.
            self._kept.append((self._keep(out.detach()), self._keep(lse.detach())))
            return out, lse
        out, lse = self._kept[self._place]
        self._place += 1
        return out().detach(), lse().detach()

    def rewind(self, to: int | None) -> None:
        """From the `to`-th result on it is replayed; None: it is recorded."""
        self._place = to


_TAPE: ContextVar[Tape | None] = ContextVar("ringspan_tape", default=None)


@contextmanager
def recording(tape: Tape) -> Iterator[None]:
    """Within it, attention of this thread leaves its results on `tape`."""
    with _using(tape, None):
        yield


@contextmanager
def replaying(tape: Tape) -> Iterator[None]:
    """Within it, attention of this thread takes its results from `tape`, from the first on."""
    with _using(tape, 0):
        yield


@contextmanager
def _using(tape: Tape, place: int | None) -> Iterator[None]:
    token = _TAPE.set(tape)
    tape.rewind(place)
    try:
        yield
    finally:
        tape.rewind(None)
        _TAPE.reset(token)


def remembered(compute: Callable[[], Result]) -> Result:
    """`compute()`, by way of the tape that is running in this thread, if one is."""
    tape = _TAPE.get()
    return compute() if tape is None else tape.result(compute)
