"""Draws a schedule: as words in a rank × step table, and as a timeline measured in pairs. Text and numbers only; colour is the viewer's.

`q0×kv3` computes the queries of rank 0 against the keys of rank 3 · `+dkv1←r2` takes in what rank 2 sent · `kv3→r1` sends to rank 1, where
it lies ready at the next step (`kv3→r1@4`: only at step 4). A piece that is not its owner's whole shard shows its cut: `kv3[0:2]`.
Receives are not drawn: each is the other end of a send.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from ringspan.geometry import Layout, Mask, Tile, tiles
from ringspan.schedule.actions import Attend, Combine, Piece, Schedule, Send


@dataclass(frozen=True, slots=True)
class Word:
    """One action in words, in parts: (text, the rank whose piece it names, or None for what joins them)."""

    parts: tuple[tuple[str, int | None], ...]

    @property
    def text(self) -> str:
        """The word without its colours."""
        return "".join(text for text, _ in self.parts)


@dataclass(frozen=True, slots=True)
class Cell:
    """What one rank does at one step: what it computes, what it takes in, what it sends."""

    attends: tuple[Word, ...]
    combines: tuple[Word, ...]
    sends: tuple[Word, ...]

    @property
    def words(self) -> tuple[Word, ...]:
        """All of it, the computing first."""
        return (*self.attends, *self.combines, *self.sends)


def piece_text(piece: Piece, lengths: Sequence[int]) -> str:
    """`kv3`, or `kv3[0:2]` where it is not the whole of a shard of `lengths[3]` positions."""
    whole = (piece.start, piece.stop) == (0, lengths[piece.owner])
    return f"{piece.kind}{piece.owner}" if whole else str(piece)


def is_result(kind: str) -> bool:
    """Whether pieces of `kind` go home to be combined: partials and gradients."""
    return kind in ("o", "dq", "dkv", "dk", "dv")


def visitor(rank: int, q: Piece, kv: Piece) -> Piece:
    """The piece that came to `rank` for an attend: the keys, or the queries where these alone came from elsewhere."""
    return q if kv.owner == rank != q.owner else kv


def cells(schedule: Schedule, letter: str = "r") -> tuple[tuple[Cell, ...], ...]:
    """The table: a row a step, a column a rank, whose name is `letter` and its number."""
    found: list[list[tuple[list[Word], list[Word], list[Word]]]] = [
        [([], [], []) for _ in range(schedule.num_ranks)] for _ in range(schedule.num_steps)
    ]
    for rank, program in enumerate(schedule.programs):
        for action in program:
            attends, combines, sends = found[action.step][rank]
            if isinstance(action, Attend):
                attends.append(_attend_word(rank, action, schedule.lengths))
            elif isinstance(action, Combine):
                combines.append(_moved_word("+", action, f"←{letter}{action.peer}", schedule.lengths))
            elif isinstance(action, Send):
                late = f"@{action.due}" if action.due > action.step + 1 else ""
                sends.append(_moved_word("", action, f"→{letter}{action.peer}{late}", schedule.lengths))
    return tuple(tuple(Cell(*map(tuple, cell)) for cell in row) for row in found)


def _attend_word(rank: int, attend: Attend, lengths: Sequence[int]) -> Word:
    visiting = {visitor(rank, attend.q, kv) for kv in attend.kvs}
    q_text = piece_text(attend.q, lengths)
    parts: list[tuple[str, int | None]] = [(q_text, attend.q.owner if attend.q in visiting else None), ("×", None)]
    for index, kv in enumerate(attend.kvs):
        parts += [("+", None)] if index else []
        parts.append((piece_text(kv, lengths), kv.owner if kv in visiting else None))
    return Word(tuple(parts))


def _moved_word(before: str, action: Send | Combine, after: str, lengths: Sequence[int]) -> Word:
    return Word(((f"{before}{piece_text(action.piece, lengths)}", action.piece.owner), (after, None)))


def draw(schedule: Schedule) -> str:
    """The table as plain text, one line a step and one column a rank, as wide as it has to be."""
    table = cells(schedule)
    columns = [_column([row[rank] for row in table]) for rank in range(schedule.num_ranks)]
    widths = [max(len(text) for text in (f"r{rank}", *column)) for rank, column in enumerate(columns)]
    rows = [["step", *(f"r{rank}" for rank in range(schedule.num_ranks))]]
    rows += [[str(step), *(column[step] for column in columns)] for step in range(schedule.num_steps)]
    return "".join("   ".join(text.ljust(width) for text, width in zip(row, [4, *widths], strict=True)).rstrip() + "\n" for row in rows)


def _column(column: list[Cell]) -> list[str]:
    """One rank's cells as text: computing, taking in and sending each begin at the same place in every row."""
    groups = [[_joined(group) for group in (cell.attends, cell.combines, cell.sends)] for cell in column]
    widths = [max((len(row[index]) for row in groups), default=0) for index in range(3)]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True) if width).rstrip() for row in groups]


def _joined(words: tuple[Word, ...]) -> str:
    return "  ".join(word.text for word in words)


def compact_cells(schedule: Schedule) -> tuple[tuple[str, ...], ...]:
    """The table for many ranks: each cell names only the owners of the visiting pieces that are computed with.

    `3` keys of rank 3 · `q3` queries of rank 3 · `1-3` several at once · `→` nothing is computed, something moves · `` nothing at all.
    """
    table = [["" for _ in range(schedule.num_ranks)] for _ in range(schedule.num_steps)]
    owners: dict[tuple[int, int], list[Piece]] = {}
    for rank, program in enumerate(schedule.programs):
        for action in program:
            if isinstance(action, Attend):
                owners.setdefault((action.step, rank), []).extend(visitor(rank, action.q, kv) for kv in action.kvs)
            elif isinstance(action, Send | Combine):
                table[action.step][rank] = "→"
    for (step, rank), pieces in owners.items():
        queries = {piece.owner for piece in pieces if piece.kind == "q"}
        keys = {piece.owner for piece in pieces if piece.kind != "q"}
        table[step][rank] = " ".join(([_ranges(keys)] if keys else []) + ([f"q{_ranges(queries)}"] if queries else []))
    return tuple(map(tuple, table))


def _ranges(numbers: set[int]) -> str:
    """`0-2,5` for 0, 1, 2, 5."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


# ---- the timeline ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Bar:
    """`rank` computes `q` × `kv` at `step`, from `start` to `stop`, in pairs since the beginning."""

    rank: int
    step: int
    q: Piece
    kv: Piece
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Gap:
    """`rank` has nothing left to compute at `step`, from `start` to `stop`, and waits for the slowest."""

    rank: int
    step: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Flight:
    """`piece` is under way from `source` to `target`, from the beginning of step `posted` to the beginning of step `due`."""

    piece: Piece
    source: int
    target: int
    posted: int
    due: int


@dataclass(frozen=True)
class Timeline:
    """A schedule laid out in time, where one pair takes one unit, a transfer hides, and all ranks begin a step together.

    Attributes:
        starts: when each step begins, and at the end when the last one ends; a step lasts as long as its slowest rank computes.
        bars: everything that is computed.
        flights: everything that travels.
    """

    num_ranks: int
    starts: tuple[int, ...]
    bars: tuple[Bar, ...]
    flights: tuple[Flight, ...]

    @property
    def num_steps(self) -> int:
        """How many steps there are, those included in which gradients only travel."""
        return len(self.starts) - 1

    @property
    def duration(self) -> int:
        """The length of the whole, in pairs."""
        return self.starts[-1]

    @property
    def busy_per_rank(self) -> tuple[int, ...]:
        """How long each rank computes."""
        return self._totals(self.bars)

    @property
    def pairs_per_rank(self) -> tuple[int, ...]:
        """How many pairs each rank computes: as long as it is busy, unless keys and values visit apart and each pair is met twice."""
        return self._totals(bar for bar in self.bars if bar.kv.kind != "k")

    def _totals(self, bars: Iterable[Bar]) -> tuple[int, ...]:
        totals = [0] * self.num_ranks
        for bar in bars:
            totals[bar.rank] += bar.stop - bar.start
        return tuple(totals)

    @property
    def imbalance(self) -> float:
        """The busiest rank's work over the mean: 1 is even, the number of ranks is one rank doing all."""
        total = sum(self.busy_per_rank)
        return max(self.busy_per_rank) * self.num_ranks / total if total else 1.0

    @property
    def least_idle_fraction(self) -> float:
        """The share of the ranks' time spent waiting for the busiest one if they wait only at the end: 1 − 1 / imbalance."""
        return 1.0 - 1.0 / self.imbalance

    @property
    def idle_fraction(self) -> float:
        """The share of the ranks' time spent waiting where all wait for the slowest at every step: the gaps' share of the picture."""
        return 1.0 - sum(self.busy_per_rank) / (self.duration * self.num_ranks) if self.duration else 0.0

    @property
    def gaps(self) -> tuple[Gap, ...]:
        """Every wait."""
        ends = {(rank, step): self.starts[step] for rank in range(self.num_ranks) for step in range(self.num_steps)}
        for bar in self.bars:
            ends[bar.rank, bar.step] = max(ends[bar.rank, bar.step], bar.stop)
        return tuple(Gap(rank, step, end, self.starts[step + 1]) for (rank, step), end in ends.items() if end < self.starts[step + 1])


def tiles_between(layout: Layout, mask: Mask, q: Piece, kv: Piece) -> list[Tile]:
    """The tiles that the mask leaves of the queries of `q` against the keys of `kv`, in local indices of their shards."""
    parts = (tile.clipped(q.start, q.stop, kv.start, kv.stop) for tile in tiles(layout, mask, q.owner, kv.owner))
    return [part for part in parts if part is not None]


def pairs_between(layout: Layout, mask: Mask, q: Piece, kv: Piece) -> int:
    """How many pairs the mask allows between the queries of `q` and the keys of `kv`."""
    return sum(tile.pairs for tile in tiles_between(layout, mask, q, kv))


def timeline(schedule: Schedule, layout: Layout, mask: Mask) -> Timeline:
    """Lays `schedule` out in time. A rank computes the attends of a step one after the other, and the keys of a stage in their order."""
    work = [
        (rank, action.step, action.q, kv, pairs_between(layout, mask, action.q, kv))
        for rank, program in enumerate(schedule.programs)
        for action in program
        if isinstance(action, Attend)
        for kv in action.kvs
    ]
    loads: dict[tuple[int, int], int] = {}
    for rank, step, *_, pairs in work:
        loads[rank, step] = loads.get((rank, step), 0) + pairs
    lasts = [max((loads.get((rank, step), 0) for rank in range(schedule.num_ranks)), default=0) for step in range(schedule.num_steps)]
    starts = (0, *accumulate(lasts))
    bars, done = [], dict.fromkeys(loads, 0)
    for rank, step, q, kv, pairs in work:
        start = starts[step] + done[rank, step]
        done[rank, step] += pairs
        bars.append(Bar(rank, step, q, kv, start, start + pairs))
    flights = tuple(Flight(send.piece, rank, send.peer, send.step, send.due) for rank, send in schedule.sends())
    return Timeline(schedule.num_ranks, starts, tuple(bars), flights)
