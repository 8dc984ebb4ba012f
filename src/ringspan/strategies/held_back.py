"""A backward that keeps half of each rank's own block for the end, so that the last gradients travel home under computing.

A schedule begins with what a rank has at hand, which hides the first keys' way, and ends with gradients of what visited last, under which
nothing is left to compute. The own block is needed at no certain time: half of it hides what comes in, half what goes home. One kernel
call more a rank, and its dk and dv are added in two parts; not a byte more travels.
"""

from __future__ import annotations

from dataclasses import replace

from ringspan.geometry import Layout, Mask
from ringspan.schedule import Action, Attend, Piece, PieceBytes, Receive, Schedule, Send, send_bytes
from ringspan.schedule.draw import pairs_between
from ringspan.strategies.forecast import Machine

GRADIENTS = ("dq", "dkv")
ROWS = 128
"""Kernels compute so many queries at a time: a part is a multiple of them where there are four times as many."""


def held_back(backward: Schedule, layout: Layout, mask: Mask) -> Schedule:
    """`backward` with about half of the work of each own block in the step in which this rank's last gradients travel.

    Args:
        backward: any schedule of that direction.
        layout: whose shards it speaks of.
        mask: what a query sees.

    Worked example, four tokens on two ranks, contiguous, causal. Rank 1's own triangle is split by rows: one pair early, two late.

        0: q0[0:2]×kv0[0:2] | q1[0:2]×kv1[0:2]          0: q0[0:2]×kv0[0:2] | q1[0:1]×kv1[0:2]
        1:                  | q1[0:2]×kv0[0:2]     →    1:                  | q1[0:2]×kv0[0:2]
        2: … dkv0 on its way home                       2: … dkv0 on its way home, q1[1:2]×kv1[0:2]
    """
    return replace(backward, programs=tuple(_held_back(program, rank, layout, mask) for rank, program in enumerate(backward.programs)))


def pays(backward: Schedule, sizes: PieceBytes, machine: Machine) -> bool:
    """Whether the last gradients of some rank are longer on the link than a kernel call takes to launch."""
    most = 0
    for rank, program in enumerate(backward.programs):
        last = _last_attend(program)
        late = [action for action in program if isinstance(action, Send) and action.step > last]
        most = max(most, sum(send_bytes(backward, rank, send, sizes) for send in late))
    return most / machine.link_bytes_per_second > machine.launch_seconds


def _last_attend(program: tuple[Action, ...]) -> int:
    return max((action.step for action in program if isinstance(action, Attend)), default=-1)


def _held_back(program: tuple[Action, ...], rank: int, layout: Layout, mask: Mask) -> tuple[Action, ...]:
    own = [action for action in program if isinstance(action, Attend) and _is_own(action, rank)]
    late = _last_attend(program) + 1
    travels = any(isinstance(action, Send | Receive) and action.piece.kind in GRADIENTS and action.step == late for action in program)
    if len(own) != 1 or own[0].step + 1 >= late or not travels:
        return program
    (whole,) = own
    row = _halfway(whole, layout, mask)
    if row is None:
        return program
    q = whole.q
    early, kept = Piece("q", rank, q.start, row), Piece("q", rank, row, q.stop)
    actions: list[Action] = [replace(action, q=early) if action is whole else action for action in program]
    # Last of its step: its transfers are posted before.
    place = next((index for index, action in enumerate(actions) if action.step > late), len(actions))
    actions.insert(place, Attend(late, kept, whole.kvs))
    return tuple(actions)


def _is_own(action: Attend, rank: int) -> bool:
    return action.q.owner == rank and all(kv.owner == rank and kv.kind == "kv" for kv in action.kvs)


def _halfway(whole: Attend, layout: Layout, mask: Mask) -> int | None:
    """The row before which lies about half of the work of `whole`; None where it has no two parts."""
    q = whole.q

    def before(row: int) -> int:
        return sum(pairs_between(layout, mask, Piece("q", q.owner, q.start, row), kv) for kv in whole.kvs)

    half, low, high = before(q.stop) / 2, q.start, q.stop
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if before(middle) <= half else (low, middle)
    row = low if len(q) < 4 * ROWS else q.start + round((low - q.start) / ROWS) * ROWS
    return row if q.start < row < q.stop and 0 < before(row) < before(q.stop) else None
