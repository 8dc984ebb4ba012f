"""Lists on the command line: names and whole numbers with commas between."""

from __future__ import annotations

import re

from ringspan.errors import RingspanError


def names(option: str, text: str | None) -> tuple[str, ...] | None:
    """The names of a list, each once; None for None.

    Raises:
        RingspanError: where an entry is empty.
    """
    if text is None:
        return None
    # A comma inside a mask's numbers separates nothing: window:4,1,causal is two masks.
    found = tuple(dict.fromkeys(part.strip() for part in re.split(r",(?!\s*\d)", text)))
    if "" in found:
        raise RingspanError(f"{option} {text!r}", "an entry is empty", "A list is names with commas between", f"{option} one,other")
    return found


def numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    """The whole numbers of a list, each once; None for None.

    Raises:
        RingspanError: where an entry is no whole number.
    """
    if text is None:
        return None
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise RingspanError(
            f"{option} {text!r}", "an entry is no whole number", "A list is whole numbers with commas between", f"{option} 2,3"
        ) from None
