"""Everything that is shown of a strategy under a layout and a mask: its schedules, proved, timed, weighed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ringspan.errors import RingspanError
from ringspan.geometry import Layout, Mask, head_shares, make_layout, parse_mask
from ringspan.schedule import PieceBytes, Report, Schedule, validate
from ringspan.schedule.draw import Timeline, timeline
from ringspan.strategies import MACHINES, Machine, Schedules, choose, link_bytes, make_schedules

DIRECTIONS = ("forward", "backward")
MAX_RANKS = 128
MAX_LENGTH = 2**40
MAX_SIZE = 2**20


@dataclass(frozen=True)
class Study:
    """A strategy's two schedules, each proved by the validator, and what can be read off them.

    In two-dimensional attention the schedules are those of head groups: a *lane* is a head group there, and a rank everywhere else.

    Attributes:
        strategy: its name, with its options where it was given any.
        layout: who owns which positions.
        mask: what a query sees.
        schedules: as the strategy makes them.
        reports: the validator's, forward and backward.
        sizes: what one position of each kind of piece weighs, with all heads.
        reason: why `auto` chose the strategy; empty where it was asked for by name.
    """

    strategy: str
    layout: Layout
    mask: Mask
    schedules: Schedules
    reports: Mapping[str, Report]
    sizes: PieceBytes
    reason: str = ""

    @property
    def num_ranks(self) -> int:
        """How many ranks share the sequence."""
        return self.layout.num_ranks

    @property
    def lane_layout(self) -> Layout:
        """Who owns which positions when the schedules run: the layout, or that of the head groups."""
        return self.schedules.layout

    @property
    def num_lanes(self) -> int:
        """How many lanes the schedules have."""
        return self.lane_layout.num_ranks

    @property
    def lane_letter(self) -> str:
        """`r` for ranks, `g` for head groups."""
        return "r" if self.schedules.grid is None else "g"

    def lane(self, rank: int) -> int:
        """The lane in which `rank` works."""
        return rank if self.schedules.grid is None else self.schedules.grid.group(rank)

    @property
    def title(self) -> str:
        """`ring · zigzag · causal`."""
        return f"{self.strategy} · {self.layout.name} · {self.mask.name}"

    def schedule(self, direction: str) -> Schedule:
        """The forward or the backward schedule."""
        return self.schedules.forward if direction == "forward" else self.schedules.backward

    def timeline(self, direction: str) -> Timeline:
        """The schedule of `direction` laid out in time."""
        return self._timelines[direction]

    @cached_property
    def _timelines(self) -> dict[str, Timeline]:
        return {direction: timeline(self.schedule(direction), self.lane_layout, self.mask) for direction in DIRECTIONS}

    @cached_property
    def rank_sizes(self) -> tuple[PieceBytes, ...]:
        """What a position weighs with the heads that each rank computes."""
        grid = self.schedules.grid
        if grid is None:
            return (self.sizes,) * self.num_ranks
        shares = head_shares(self.sizes.heads, self.sizes.kv_heads, grid.degree)
        own = [shares[grid.place(rank)] for rank in range(self.num_ranks)]
        return tuple(replace(self.sizes, heads=share.heads, kv_heads=share.kv_heads) for share in own)

    def work(self, direction: str) -> tuple[int, ...]:
        """For each rank how long it computes times its heads."""
        busy = self.timeline(direction).busy_per_rank
        return tuple(busy[self.lane(rank)] * self.rank_sizes[rank].heads for rank in range(self.num_ranks))

    def imbalance(self, direction: str) -> float:
        """The busiest rank's work over the mean: 1 is even."""
        work = self.work(direction)
        return max(work) * len(work) / sum(work) if sum(work) else 1.0

    def idle_fraction(self, direction: str) -> float:
        """The share of the ranks' time spent waiting, where all wait for the slowest at every step."""
        longest = self.timeline(direction).duration * max(sizes.heads for sizes in self.rank_sizes)
        return 1.0 - sum(self.work(direction)) / (longest * self.num_ranks) if longest else 0.0

    @cached_property
    def link_bytes(self) -> Mapping[str, Mapping[tuple[int, int], int]]:
        """For each direction the bytes over each link, as `{(source, target): bytes}`."""
        return {direction: link_bytes(self.schedules, self.layout, self.sizes, direction) for direction in DIRECTIONS}

    @cached_property
    def sent_bytes(self) -> Mapping[str, tuple[int, ...]]:
        """For each direction what each rank sends in all."""
        sent = {direction: [0] * self.num_ranks for direction in DIRECTIONS}
        for direction, links in self.link_bytes.items():
            for (source, _), size in links.items():
                sent[direction][source] += size
        return {direction: tuple(sizes) for direction, sizes in sent.items()}

    def visiting_bytes(self, direction: str, rank: int) -> int:
        """The room that `rank` needs for visitors: for each kind the most that lies there at once, added up."""
        live = self.reports[direction].live_positions[self.lane(rank)]
        return sum(count * self.rank_sizes[rank].of(kind) for kind, count in live.items())


def study(
    strategy: str = "ring",
    *,
    layout: str = "zigzag",
    mask: str | Mask = "causal",
    length: int,
    num_ranks: int,
    weights: Sequence[float] | None = None,
    options: Mapping[str, int | str] | None = None,
    sizes: PieceBytes | None = None,
    machine: str = "cuda",
) -> Study:
    """Makes the schedules of `strategy` and has the validator prove both.

    Args:
        strategy: one of `STRATEGIES`, or `auto` for the one that is predicted to end first.
        layout: one of `LAYOUTS`, or `auto` for one that balances the mask.
        mask: a mask, or its name as `parse_mask` reads it.
        length: global positions.
        num_ranks: at most 128: the proof looks at every pair of ranks, and at all that pass between them.
        weights: one for each rank, for the layout `weighted`.
        options: the strategy's own, by name.
        sizes: what a position weighs; else eight heads of 128 elements in two bytes.
        machine: one of `MACHINES`, for which the strategy `auto` chooses.

    Raises:
        RingspanError: for a name that does not exist, or a number out of its range.
        ScheduleError: where the validator finds fault with a schedule.
    """
    check_count("ranks", num_ranks, MAX_RANKS)
    check_count("length", length, MAX_LENGTH)
    made_mask = parse_mask(mask) if isinstance(mask, str) else mask
    made_layout = make_layout(layout, length, num_ranks, tuple(weights) if weights is not None else None, made_mask)
    sizes = sizes or piece_sizes(8, None, 128, 2)
    options, reason = dict(options or {}), ""
    if strategy == "auto" and not options:
        choice = choose(made_layout, made_mask, sizes, _machine(machine), make_schedules)
        strategy, options, reason = choice.strategy, dict(choice.options), choice.reason
    schedules = make_schedules(strategy, made_layout, made_mask, **options)
    reports = {
        direction: validate(schedule, schedules.layout, made_mask)
        for direction, schedule in zip(DIRECTIONS, (schedules.forward, schedules.backward), strict=True)
    }
    named = strategy + "".join(f" {name}={value}" for name, value in options.items())
    return Study(named, made_layout, made_mask, schedules, reports, sizes, reason)


def _machine(name: str) -> Machine:
    if name not in MACHINES:
        raise RingspanError(
            f"machine {name!r}", f"the machines are {', '.join(MACHINES)}", "A machine is asked for by name", "machine cuda"
        )
    return MACHINES[name]


def check_count(name: str, value: int, most: int) -> None:
    """Passes where `1 <= value <= most`.

    Raises:
        RingspanError: where it does not.
    """
    if not 1 <= value <= most:
        nearest = min(max(value, 1), most)
        raise RingspanError(
            f"{name} {value}", f"it lies outside of 1 to {most}", "A schedule is shown within these bounds", f"{name} {nearest}"
        )


def piece_sizes(heads: int, kv_heads: int | None, head_dim: int, dtype_bytes: int) -> PieceBytes:
    """The weight of a position for one sequence; float32 accumulators, float64 ones where the inputs are.

    Raises:
        RingspanError: for a count outside of 1 to 2**20, KV heads that do not divide the heads, or elements not of 1, 2, 4 or 8 bytes.
    """
    kv_heads = heads if kv_heads is None else kv_heads
    for name, value in (("heads", heads), ("kv-heads", kv_heads), ("head-dim", head_dim)):
        check_count(name, value, MAX_SIZE)
    if heads % kv_heads:
        nearest = max(size for size in range(1, min(heads, kv_heads) + 1) if heads % size == 0)
        raise RingspanError(
            f"--heads {heads} --kv-heads {kv_heads}",
            f"{heads} / {kv_heads} leaves {heads % kv_heads}",
            "Each KV head serves equally many heads",
            f"--kv-heads {nearest}",
        )
    if dtype_bytes not in (1, 2, 4, 8):
        raise RingspanError(
            f"--dtype-bytes {dtype_bytes}", "no such number format", "An element has 1, 2, 4 or 8 bytes", "--dtype-bytes 2 (bfloat16)"
        )
    return PieceBytes(heads=heads, kv_heads=kv_heads, head_dim=head_dim, element_bytes=dtype_bytes, accumulator_bytes=max(4, dtype_bytes))
