"""What ranks that are threads of one process ask for at the same time: the first computes it, and the others find it computed."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from threading import RLock
from typing import ParamSpec, TypeVar

Parameters = ParamSpec("Parameters")
Value = TypeVar("Value")

_LOCK = RLock()


def once(maxsize: int) -> Callable[[Callable[Parameters, Value]], Callable[Parameters, Value]]:
    """A decorator: the `maxsize` values that were asked for last are kept, and no two threads compute one. Arguments are hashable."""

    def keep(function: Callable[Parameters, Value]) -> Callable[Parameters, Value]:
        kept = lru_cache(maxsize)(function)

        @wraps(function)
        def found(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Value:
            with _LOCK:
                return kept(*args, **kwargs)

        return found

    return keep
