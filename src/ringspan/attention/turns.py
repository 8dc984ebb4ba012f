"""What one pass adds in its turn while kernel calls run beside each other, and what may therefore leave before they are joined."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext

from ringspan.attention.streams import Result, Streams

Sum = tuple[str, int]
"""What is added up: the kind of its pieces, and their owner."""


class Turns:
    """The order of a pass's additions on its streams. It knows no tensor and no pass: what asks it does not keep a pass alive.

    Attributes:
        streams: where the kernels run.
    """

    def __init__(self, streams: Streams) -> None:
        self.streams = streams
        # What is added to in its turn while calls run beside: it waits for `join`.
        self._in_turn: set[Sum] = set()
        self._is_aside = False

    def take(self, found: Sum) -> None:
        """Something is added to a sum on the current stream."""
        self._in_turn.add(found)

    def compute(self, is_beside: bool, sums: Iterable[Sum], call: Callable[[], Result]) -> Result:
        """`call()`, a kernel's, of which something is added to `sums`: beside the one before, or the next beside it."""
        if not is_beside:
            return self.streams.beside(call)
        self._in_turn.update(sums)
        return self.streams.fork(call)

    def join(self) -> None:
        """What is done next comes after all calls."""
        self.streams.join()
        self._in_turn.clear()

    def before(self, found: Sum) -> None:
        """What is done next comes after all calls that have added to a sum."""
        assert not self._is_aside or found not in self._in_turn, f"{found} is not computed aside"
        if not self._is_aside:
            self.join()

    def leaves_aside(self, found: Sum) -> bool:
        """Whether the current stream has added nothing to a sum since calls run beside it."""
        return found not in self._in_turn

    @contextmanager
    def aside(self, may: bool) -> Iterator[bool]:
        """What is done within comes after the calls beside alone, if it may and any are: whether it does."""
        self._is_aside = may and self.streams.forked
        try:
            with self.streams.aside() if self._is_aside else nullcontext():
                yield self._is_aside
        finally:
            self._is_aside = False
