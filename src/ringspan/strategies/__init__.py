"""Strategies: one paper a file, each a pure function from a layout and a mask to schedules."""

import inspect
from collections.abc import Callable

from ringspan.errors import RingspanError, nearest_name
from ringspan.geometry import Layout, Mask
from ringspan.strategies.all_gather import all_gather
from ringspan.strategies.auto import Choice, choose, complete_ring
from ringspan.strategies.balanced import balanced
from ringspan.strategies.common import Schedules
from ringspan.strategies.cost import MACHINES, SENDING, Cost, LayerForecast, cost, forecast_layer
from ringspan.strategies.direct import direct
from ringspan.strategies.double_ring import double_ring
from ringspan.strategies.forecast import Carried, Forecast, Machine, Prices, forecast, prices_of
from ringspan.strategies.links import link_bytes
from ringspan.strategies.once import once
from ringspan.strategies.pass_query import pass_query
from ringspan.strategies.ring import ring
from ringspan.strategies.ring_self_attention import ring_self_attention
from ringspan.strategies.tree import tree
from ringspan.strategies.two_dimensional import two_dimensional
from ringspan.strategies.ulysses import ulysses

__all__ = [
    "MACHINES",
    "SENDING",
    "STRATEGIES",
    "Carried",
    "Choice",
    "Cost",
    "Forecast",
    "LayerForecast",
    "Machine",
    "Prices",
    "Schedules",
    "choose",
    "complete_ring",
    "cost",
    "forecast",
    "forecast_layer",
    "link_bytes",
    "make_schedules",
    "prices_of",
    "strategy_options",
]

STRATEGIES: dict[str, Callable[..., Schedules]] = {
    "ring": ring,
    "all_gather": all_gather,
    "pass_query": pass_query,
    "balanced": balanced,
    "double_ring": double_ring,
    "direct": direct,
    "tree": tree,
    "ulysses": ulysses,
    "two_dimensional": two_dimensional,
    "ring_self_attention": ring_self_attention,
}
"""Each takes a layout and a mask, and as keywords a few options of its own."""


def strategy_options(strategy: str) -> dict[str, type]:
    """The keywords that `strategy` takes besides the layout and the mask, with their types, `int` or `str`.

    Raises:
        RingspanError: for a name that is not one of `STRATEGIES`.
    """
    if strategy not in STRATEGIES:
        raise RingspanError(
            f"strategy {strategy!r}",
            f"the strategies are {', '.join(STRATEGIES)}, and auto without options",
            "A strategy is asked for by name",
            f"strategy={nearest_name(strategy, ('ring', *STRATEGIES))!r}",
        )
    parameters = list(inspect.signature(STRATEGIES[strategy]).parameters.values())[2:]
    return {parameter.name: str if "str" in str(parameter.annotation) else int for parameter in parameters}


def make_schedules(strategy: str, layout: Layout, mask: Mask, **options: int | str) -> Schedules:
    """The forward and backward schedules of `strategy` for `layout` and `mask`.

    Args:
        strategy: one of `STRATEGIES`.
        layout: who owns which positions.
        mask: what a query sees.
        options: the strategy's own, such as `stages` of `all_gather` or `window` of `double_ring`.

    Raises:
        RingspanError: for an unknown strategy, an option that it does not take, a value that it cannot have, or a mask of another length.
    """
    known = strategy_options(strategy)
    if unknown := sorted(set(options) - set(known)):
        raise RingspanError(
            f"strategy {strategy!r} with {', '.join(unknown)}",
            f"it takes {', '.join(known) or 'no options'}",
            "A strategy is given its own options alone",
            f"strategy {strategy!r} without it",
        )
    for name, value in options.items():
        if type(value) is not known[name]:
            found = f"it is of type {type(value).__name__}"
            raise RingspanError(f"strategy {strategy!r} with {name}={value!r}", found, f"{name} is of type {known[name].__name__}")
    mask.check_length(layout.length)
    return _made(strategy, layout, mask, tuple(sorted(options.items())))


@once(maxsize=128)
def _made(strategy: str, layout: Layout, mask: Mask, options: tuple[tuple[str, int | str], ...]) -> Schedules:
    return STRATEGIES[strategy](layout, mask, **dict(options))
