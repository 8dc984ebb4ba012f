"""What strategies are made of: which part of a shard a rank reads, how a shard goes from reader to reader, how gradients get home."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from ringspan.geometry import Grid, Layout, Mask, Tile, tiles
from ringspan.schedule import Action, Attend, Piece, Schedule, ScheduleBuilder, Send


@dataclass(frozen=True)
class Schedules:
    """The two halves of a strategy: its forward and its backward.

    Attributes:
        forward: the schedule of the forward.
        backward: the schedule of the backward.
        layout: whose shards the schedules speak of.
        grid: for two-dimensional attention, the head groups that exchange positions for heads before and after; a head group is one rank
            of the schedules.
        head_stages: in how many stages heads are exchanged and computed, one while another travels, as far as a rank's key heads go.
    """

    forward: Schedule
    backward: Schedule
    layout: Layout
    grid: Grid | None = None
    head_stages: int = 1


class Visit(NamedTuple):
    """At `step`, `rank` attends `q` to `kv`: the smallest pieces that hold every allowed pair of two shards."""

    step: int
    rank: int
    q: Piece
    kv: Piece


@lru_cache(maxsize=65536)
def block(layout: Layout, mask: Mask, q_rank: int, k_rank: int, keys: tuple[int, int] | None = None) -> tuple[Piece, Piece] | None:
    """The smallest (queries, keys) pieces that hold every allowed pair of two shards, or None where there is no such pair.

    `keys`: of pairs with keys in these rows alone.
    """
    found = tiles(layout, mask, q_rank, k_rank)
    if keys is not None:
        clipped = (tile.clipped(tile.q_start, tile.q_stop, *keys) for tile in found)
        found = tuple(tile for tile in clipped if tile is not None)
    if not found:
        return None
    q = Piece("q", q_rank, min(tile.q_start for tile in found), max(tile.q_stop for tile in found))
    return q, Piece("kv", k_rank, min(tile.k_start for tile in found), max(tile.k_stop for tile in found))


def is_seen_whole(found: list[Tile], mask: Mask) -> bool:
    """Whether the tiles of two pieces are one, all of whose queries see all of its keys, whatever their positions.

    Keys of several shards that the same queries see so may be one kernel call.
    """
    return len(found) == 1 and found[0].kind == "full" and mask.mod is None


def hull(pieces: list[Piece]) -> Piece:
    """The smallest piece that holds all of `pieces`, which are of one kind and owner."""
    first = pieces[0]
    return Piece(first.kind, first.owner, min(piece.start for piece in pieces), max(piece.stop for piece in pieces))


def key_visits(layout: Layout, mask: Mask, owner: int, stops: list[tuple[int, int]], keys: tuple[int, int] | None = None) -> list[Visit]:
    """The visits of the keys of `owner` at `stops`, (step, rank) in order, without the ranks that read nothing of them.

    `keys`: of those in these rows alone.
    """
    found = ((step, rank, block(layout, mask, rank, owner, keys)) for step, rank in stops)
    return [Visit(step, rank, *pieces) for step, rank, pieces in found if pieces is not None]


def query_visits(layout: Layout, mask: Mask, owner: int, stops: list[tuple[int, int]]) -> list[Visit]:
    """The visits of the queries of `owner` at `stops`, (step, rank) in order, without the ranks of which they read nothing."""
    found = ((step, rank, block(layout, mask, owner, rank)) for step, rank in stops)
    return [Visit(step, rank, *pieces) for step, rank, pieces in found if pieces is not None]


def walk(builder: ScheduleBuilder, visits: list[Visit], kinds: tuple[str, ...], start: tuple[int, int]) -> None:
    """A shard goes from reader to reader, each attends, and from each goes on what is still read ahead.

    Args:
        builder: takes the actions.
        visits: in the order of the walk.
        kinds: what travels: `kv` (`k` or `v` alone), or `q` and, in a backward, `do` with it.
        start: (step, rank) where the shard is at first.
    """
    since, here = start
    for index, visit in enumerate(visits):
        if visit.rank != here:
            ahead = hull([later.q if "q" in kinds else later.kv for later in visits[index:]])
            for kind in kinds:
                piece = Piece(kind, ahead.owner, ahead.start, ahead.stop)
                builder.transfer(piece, here, visit.rank, posted=since, due=visit.step)
        builder.attend(visit.rank, visit.step, visit.q, visit.kv)
        here, since = visit.rank, visit.step


def ride_home(builder: ScheduleBuilder, owner: int, visits: list[Visit], kind: str = "dkv") -> None:
    """The gradient of what walks rides behind it from reader to reader, one step later and growing, and makes one last hop home.

    What the owner itself computed waits at home. `kind` is `dkv`, `dk`, `dv` or `dq`.
    """
    away = [visit for visit in visits if visit.rank != owner]
    for index, visit in enumerate(away):
        grown = hull([earlier.q if kind == "dq" else earlier.kv for earlier in away[: index + 1]])
        rides = Piece(kind, owner, grown.start, grown.stop)
        last = index + 1 == len(away)
        target, due = (owner, visit.step + 2) if last else (away[index + 1].rank, away[index + 1].step + 1)
        builder.transfer(rides, visit.rank, target, posted=visit.step + 1, due=due)
        builder.combine(target, due, rides, visit.rank)


def straight_backward(forward: Schedule) -> Schedule:
    """The backward that repeats the forward's transfers of inputs and its attends, and sends every gradient straight to its owner.

    Where queries travelled, dO travels with them. A gradient leaves in the step after its last contribution, and the owner adds what
    arrives in the order of the ranks: the same sum at every run.
    """
    builder = ScheduleBuilder(forward.name, "backward", forward.lengths)
    for rank, program in enumerate(forward.programs):
        for action in program:
            if isinstance(action, Send) and action.piece.kind in ("q", "kv"):
                builder.transfer(action.piece, rank, action.peer, action.step, action.due)
                if action.piece.kind == "q":
                    dout = Piece("do", action.piece.owner, action.piece.start, action.piece.stop)
                    builder.transfer(dout, rank, action.peer, action.step, action.due)
            elif isinstance(action, Attend):
                builder.attend(rank, action.step, action.q, *action.kvs)
        for piece, last in _gradients_elsewhere(program, rank):
            builder.transfer(piece, rank, piece.owner, posted=last + 1, due=last + 2)
            builder.combine(piece.owner, last + 2, piece, rank)
    return builder.build()


def _gradients_elsewhere(program: tuple[Action, ...], rank: int) -> list[tuple[Piece, int]]:
    """(piece, step of its last contribution) for each gradient that `rank` computes for others; overlapping parts go as one."""
    parts: dict[tuple[str, int], list[tuple[int, int, int]]] = defaultdict(list)
    for action in program:
        if isinstance(action, Attend):
            for kind, piece in (("dq", action.q), *(("dkv", kv) for kv in action.kvs)):
                if piece.owner != rank:
                    parts[(kind, piece.owner)].append((piece.start, piece.stop, action.step))
    result = []
    for (kind, owner), spans in parts.items():
        start, stop, last = None, -1, -1
        for low, high, step in sorted(spans):
            if start is not None and low >= stop:
                result.append((Piece(kind, owner, start, stop), last))
                start, last = None, -1
            start = low if start is None else start
            stop, last = max(stop, high), max(last, step)
        assert start is not None
        result.append((Piece(kind, owner, start, stop), last))
    return result
