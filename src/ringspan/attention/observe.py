"""Who looks on while a rank computes: hooks that cost nothing where nobody does.

The executor tells an observer when each part of a step begins and ends, and what it is by the program's own object (a `Launch`, a `Batch`,
a `Combine`), so that nothing is made up for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from ringspan.transport import Pending

KINDS = ("pack", "post", "transfer", "attend", "merge", "wait", "cast", "whole", "reduce")
"""`pack` inputs laid out for the run · `post` transfers handed to the transport · `transfer` from then until it is known to be over ·
`attend` one launch with what it adds to · `merge` a partial or a gradient that came from elsewhere · `wait` for what the next step needs ·
`cast` results in their dtype and order · `whole` one attention of this rank, forward or backward, around all of these · `reduce` a sum over
the ranks that is awaited where it stands: of gradients, or of the loss."""

BEFORE, AFTER = -1, -2
"""The steps of what comes before and after those of a schedule: pack and cast, and the exchanges of positions for heads."""


class Observer(Protocol):
    """Looks on. Parts of one rank begin and end in the order of its thread; a transfer ends after others have begun."""

    def begin(self, step: int, kind: str, what: object, pending: Pending | None = None) -> Any:
        """A part of `kind` (one of `KINDS`) begins. What is returned comes back at its end.

        Args:
            step: of the schedule, or `BEFORE` or `AFTER`.
            kind: one of `KINDS`.
            what: a `Launch`, a `Batch` (of post, transfer and wait), a `Combine`, a `Swap`, or None.
            pending: of a transfer, what is under way.
        """
        ...

    def end(self, token: Any) -> None:
        """The part is over: on a CPU now, on a GPU when the current stream comes here."""
        ...


@dataclass(frozen=True)
class Swap:
    """The exchange of positions for heads within one head group, of which no schedule speaks: what this rank sends and receives."""

    sends: tuple[tuple[int, int], ...]
    receives: tuple[tuple[int, int], ...]


_NOBODY = nullcontext()


def watch(observer: Observer | None, step: int, kind: str, what: object = None) -> AbstractContextManager[Any]:
    """A part as a `with` block; without an observer, nothing."""
    return _NOBODY if observer is None else _watched(observer, step, kind, what)


@contextmanager
def _watched(observer: Observer, step: int, kind: str, what: object) -> Iterator[None]:
    token = observer.begin(step, kind, what)
    yield
    observer.end(token)
