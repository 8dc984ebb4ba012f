"""Strategies: one paper a file, each a pure function from a layout and a mask to schedules."""

from collections.abc import Callable
from functools import lru_cache

from ringspan.errors import RingspanError
from ringspan.geometry import Layout, Mask
from ringspan.strategies.common import Schedules
from ringspan.strategies.ring import ring

__all__ = ["STRATEGIES", "Schedules", "make_schedules", "ring"]

STRATEGIES: dict[str, Callable[[Layout, Mask], Schedules]] = {"ring": ring}


@lru_cache(maxsize=128)
def make_schedules(strategy: str, layout: Layout, mask: Mask) -> Schedules:
    """The forward and backward schedules of `strategy` for `layout` and `mask`.

    Raises:
        RingspanError: for a name that is not one of `STRATEGIES`.
    """
    if strategy not in STRATEGIES:
        raise RingspanError(
            f"strategy {strategy!r}", f"the strategies are {', '.join(STRATEGIES)}", "A strategy is asked for by name", "strategy='ring'"
        )
    return STRATEGIES[strategy](layout, mask)
