"""What adding up partial results passes through memory, by the action that adds: outputs, and gradients of queries and keys.

A kernel gives its result in the inputs' dtype, and the first that covers a sum is taken as it is. A few more are put off until the last is
there, and then summed in one pass: each is read once, and the sum read and written. What travels, or has more to come, is kept in the
accumulator's dtype: every addition reads the sum and writes it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

from ringspan.schedule import RESULTS, Action, Attend, Combine, PieceBytes, Schedule

TOGETHER, TOGETHER_MADE = 3, 2
"""How many additions are summed in one pass, and how many of gradients that this rank makes, as the executor does."""

Calls = Callable[[Attend], list[tuple[int, int]]]
"""(rows, keys) of the kernel calls of an attend."""


class _Addition(NamedTuple):
    """`size` elements in `width` bytes each, added by `action`; `lent`: in memory that is taken back after its step."""

    action: Action
    size: int
    width: int
    lent: bool


def sum_bytes(schedule: Schedule, sizes: PieceBytes, calls: Calls) -> dict[Action, float]:
    """For each action of `schedule` that adds something: the bytes that pass through memory for it."""
    passed: dict[Action, float] = defaultdict(float)
    query, key = (sizes.batch * heads * sizes.head_dim for heads in (sizes.heads, sizes.kv_heads))
    elements = {"o": query, "dq": query, "dkv": 2 * key, "dk": key, "dv": key}
    single = sizes.single_bytes or sizes.accumulator_bytes
    singles = {(rank, send.peer, send.piece, send.due) for rank, send in schedule.singles}
    for rank, program in enumerate(schedule.programs):
        sums: dict[tuple[str, int], list[_Addition]] = defaultdict(list)
        for action in program:
            if isinstance(action, Attend):
                for kind in RESULTS[(schedule.direction, action.kvs[0].kind)]:
                    if kind in ("o", "dq"):
                        found = [(action.q.owner, rows) for rows, _ in calls(action)]
                    else:
                        found = [(kv.owner, len(kv)) for kv in action.kvs]
                    for owner, rows in found:
                        sums[(kind, owner)].append(_Addition(action, rows * elements[kind], sizes.element_bytes, False))
            elif isinstance(action, Combine):
                piece = action.piece
                width = single if (action.peer, rank, piece, action.step) in singles else sizes.accumulator_bytes
                sums[(piece.kind, piece.owner)].append(_Addition(action, len(piece) * elements[piece.kind], width, True))
        for (kind, owner), additions in sums.items():
            _, *more = additions
            made = kind != "o" and not all(addition.lent for addition in more)
            _add(passed, more, sizes, owner == rank, TOGETHER_MADE if made else TOGETHER)
    return passed


def _add(passed: dict[Action, float], additions: list[_Addition], sizes: PieceBytes, stays: bool, most: int) -> None:
    """All that is added to what was there first; `stays`: the sum does not travel. `most` are summed in one pass."""
    if not additions:
        return
    last = additions[-1]
    early = any(addition.lent and addition.action.step != last.action.step for addition in additions)
    narrow = all(addition.width < sizes.accumulator_bytes for addition in additions)
    together = stays and narrow and not early and len(additions) <= most
    for addition in additions:
        through = 0 if together else 2 * sizes.accumulator_bytes
        passed[addition.action] += addition.size * (addition.width + through)
    if together:
        passed[last.action] += max(addition.size for addition in additions) * 2 * sizes.element_bytes
