"""What a rank was told when it tried what is refused, where going on instead would be a fault to see and not to hang on."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ringspan.errors import RingspanError


def said_of(attempts: Iterable[Callable[[], object]]) -> list[str]:
    """The refusal of each attempt, one after the other, or that it went on."""
    said = []
    for attempt in attempts:
        try:
            attempt()
        except RingspanError as error:
            said.append(str(error))
        else:
            said.append("went on")
    return said
