"""What every strategy starts from: which part of which shard a rank's queries read."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from ringspan.geometry import Layout, Mask, tiles
from ringspan.schedule import Piece, Schedule


@dataclass(frozen=True)
class Schedules:
    """The two halves of a strategy: its forward and its backward."""

    forward: Schedule
    backward: Schedule


@lru_cache(maxsize=65536)
def block(layout: Layout, mask: Mask, q_rank: int, k_rank: int) -> tuple[Piece, Piece] | None:
    """The smallest (queries, keys) pieces that hold every allowed pair of two shards, or None where there is no such pair."""
    found = tiles(layout, mask, q_rank, k_rank)
    if not found:
        return None
    q = Piece("q", q_rank, min(tile.q_start for tile in found), max(tile.q_stop for tile in found))
    return q, Piece("kv", k_rank, min(tile.k_start for tile in found), max(tile.k_stop for tile in found))


def hull(pieces: list[Piece]) -> Piece:
    """The smallest piece that holds all of `pieces`, which are of one kind and owner."""
    first = pieces[0]
    return Piece(first.kind, first.owner, min(piece.start for piece in pieces), max(piece.stop for piece in pieces))
