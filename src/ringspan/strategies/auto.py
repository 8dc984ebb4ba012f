"""`auto`: the strategy that is predicted to end first, and why.

The rule: every strategy that the layout, the mask and the heads allow is priced from its own schedules (`ringspan.strategies.cost`). Those
that hold more visitors at once than `memory_bytes` are out, and so are those that Python would take twice as long to launch as another: a
caller may capture what he calls in a graph or may not. Of the others the quickest on the device wins, where a forward and backward count,
and a forward once more, since it is called alone as well; of those within half a percent of it the first in the order of `candidates`,
which begins with the strategies that hold least. Where queries travel, or heads are exchanged in stages, a forecast is less sure: a
few percent are no reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ringspan.errors import RingspanError
from ringspan.geometry import Layout, Mask
from ringspan.schedule import PieceBytes
from ringspan.strategies.common import Schedules
from ringspan.strategies.cost import Cost, cost
from ringspan.strategies.forecast import Machine, forecast
from ringspan.strategies.links import link_bytes
from ringspan.strategies.once import once

CLOSE = 1.005
"""Predictions nearer than this are not told apart."""

SURE = 1.03
"""By as much must be better what a forecast is less sure of: strategies whose queries travel (partial outputs go home under little
computing, and none was timed on GPUs), and exchanges in stages, whose share of what they go on beside is an average."""

FORWARD = 1.2
"""As many times as long as the quickest forward may one take whose heads are exchanged in stages. Where forecasts for four GPUs say 1.12
to 1.17 it was found to be 0.92 to 1.10; where it is slower nothing was timed."""

LAUNCHING = 2.0
"""As many times as long as the least may launching from Python take."""

_QUERIES_TRAVEL = ("balanced", "pass_query")


@dataclass(frozen=True)
class Choice:
    """What `auto` picked.

    Attributes:
        strategy: its name.
        options: its options, a ring's as `complete_ring` leaves them.
        reason: a sentence with the numbers.
        costs: every candidate's, by name and options.
    """

    strategy: str
    options: tuple[tuple[str, int | str], ...]
    reason: str
    costs: dict[str, Cost]


Make = Callable[..., Schedules]


def candidates(num_ranks: int) -> list[tuple[str, dict[str, int | str]]]:
    """The strategies that are compared, those that hold least first."""
    found: list[tuple[str, dict[str, int | str]]] = [("ring", {}), ("direct", {})]
    found.extend(("direct", {"shards_at_once": shards}) for shards in (2, 4, 8) if 2 < num_ranks >= shards)
    found.extend([("all_gather", {}), ("balanced", {}), ("pass_query", {}), ("ulysses", {})])
    found.extend(("ulysses", {"stages": stages}) for stages in (2, 4, 8))
    degrees = [degree for degree in range(2, num_ranks) if num_ranks % degree == 0]
    found.extend(("two_dimensional", {"ulysses": degree}) for degree in degrees)
    return found


MOST_IN_PARTS = 8
"""Ranks of a ring whose shards may travel in parts: of a longer one the first visit, which alone is sooner, is too little of it."""


@once(maxsize=256)
def complete_ring(
    options: tuple[tuple[str, int | str], ...], layout: Layout, mask: Mask, sizes: PieceBytes, machine: Machine, make: Make
) -> dict[str, int | str]:
    """`options` (name and value) of a ring, and those that it leaves open: what the backward rotates, in how many parts shards travel.

    By the forecast of each on `machine`, since bytes alone do not tell: the results of what visits last go home under no computing, and
    that is one dq or a dk and a dv; a shard in two parts is a launch more, which pays where it is longer under way than its reader has to
    compute before. Queries that are more bytes than keys by a tenth are no candidate: a forecast is not that sure of what is hidden.
    """
    completed = dict(options)

    def seconds(direction: str, **option: int | str) -> float:
        schedules = make("ring", layout, mask, **{**completed, **option})
        return forecast(getattr(schedules, direction), layout, mask, sizes, machine).seconds

    if "rotate" not in completed:
        keys, queries = (
            link_bytes(make("ring", layout, mask, rotate=what), layout, sizes, "backward").total() for what in ("keys", "queries")
        )
        rotated = ("keys", "queries") if queries <= 1.1 * keys else ("keys",)
        completed["rotate"] = min(rotated, key=lambda what: seconds("backward", rotate=what))
    if "parts" not in completed and layout.num_ranks <= MOST_IN_PARTS:
        completed["parts"] = 2 if CLOSE * seconds("forward", parts=2) < seconds("forward", parts=1) else 1
    return completed


@once(maxsize=256)
def choose(
    layout: Layout,
    mask: Mask,
    sizes: PieceBytes,
    machine: Machine,
    make: Make,
    memory_bytes: int | None = None,
    replayed: bool = False,
) -> Choice:
    """The strategy for `layout` and `mask` with tensors of `sizes` on `machine`.

    Args:
        layout: of all ranks.
        mask: what a query sees.
        sizes: of attention's tensors.
        machine: speeds of the ranks and links.
        make: `make_schedules`.
        memory_bytes: the most that visitors may take at once on a rank; None for no limit.
        replayed: whether graphs are known to be replayed, so that nothing is launched from Python.

    Raises:
        RingspanError: where no strategy holds as little as `memory_bytes`.
    """
    costs: dict[str, Cost] = {}
    named: dict[str, tuple[str, dict[str, int | str]]] = {}
    for strategy, options in candidates(layout.num_ranks):
        name = strategy + "".join(f" {key}={value}" for key, value in options.items())
        try:
            if strategy == "ring" and layout.num_ranks > 1:
                options = complete_ring((), layout, mask, sizes, machine, make)
            schedules = make(strategy, layout, mask, **options)
        except RingspanError:
            # What a strategy refuses is no candidate: striped positions in neighbouring head groups, say.
            continue
        named[name], costs[name] = (strategy, options), cost(schedules, layout, mask, sizes, machine)
    fitting = [name for name, priced in costs.items() if memory_bytes is None or priced.live_bytes <= memory_bytes]
    if not fitting:
        least = min(costs, key=lambda name: costs[name].live_bytes)
        raise RingspanError(
            f"strategy 'auto' with {memory_bytes} bytes for visitors",
            f"the least is {costs[least].live_bytes} bytes, by {least}",
            "A rank holds what visits it",
            f"memory_bytes={costs[least].live_bytes}",
        )
    least = min(costs[name].launched_seconds for name in fitting)
    near = [name for name in fitting if replayed or costs[name].launched_seconds <= LAUNCHING * least]
    forward = FORWARD * min(costs[name].forward_seconds for name in near)
    near = [name for name in near if "stages" not in named[name][1] or costs[name].forward_seconds <= forward]
    weighed = {name: _weighed(*named[name], costs[name]) for name in near}
    picked = next(name for name in near if weighed[name] <= CLOSE * min(weighed.values()))
    mine, slowest = costs[picked], max(fitting, key=lambda name: costs[name].seconds)
    slower = not replayed and mine.launched_seconds > CLOSE * mine.seconds
    launched = f", {mine.launched_seconds * 1e3:.3g} launched from Python" if slower else ""
    # Under a mask that allows nothing, there is nothing to compare with.
    beside = f"; {slowest} would take {costs[slowest].seconds / mine.seconds:.2f} times as long" if mine.seconds else ""
    reason = (
        f"{picked}: {mine.seconds * 1e3:.3g} ms a layer predicted on {machine.name}{launched}, computing {mine.computing:.0%} of it, "
        f"{mine.sent_bytes / 1e6:.3g} MB sent by the busiest rank{beside}"
    )
    strategy, options = named[picked]
    return Choice(strategy, tuple(options.items()), reason, costs)


def _weighed(strategy: str, options: dict[str, int | str], priced: Cost) -> float:
    """What is compared: seconds, those of the forward once more."""
    return (priced.seconds + priced.forward_seconds) * (SURE if strategy in _QUERIES_TRAVEL or "stages" in options else 1.0)
