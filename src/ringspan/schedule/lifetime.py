"""How long a visiting piece is needed on a rank: what the executor frees by, and what the validator counts."""

from __future__ import annotations

from collections import defaultdict

from ringspan.schedule.actions import Action, Attend, Combine, Piece, Receive, Send

Uses = dict[tuple[str, int], list[tuple[int, int, Piece]]]


def uses(program: tuple[Action, ...]) -> Uses:
    """For each (kind, owner) its uses on this rank: (from step, to step, what of it). A send uses its piece until it is over.

    An attend uses `do` wherever it uses `q`: in a forward nothing of that kind is there to be freed.
    """
    found: Uses = defaultdict(list)
    for action in program:
        if isinstance(action, Attend):
            q = action.q
            for piece in (q, Piece("do", q.owner, q.start, q.stop), *action.kvs):
                found[(piece.kind, piece.owner)].append((action.step, action.step, piece))
        elif isinstance(action, Send):
            found[(action.piece.kind, action.piece.owner)].append((action.step, action.due - 1, action.piece))
    return found


def lifetimes(program: tuple[Action, ...], used: Uses | None = None) -> list[tuple[Receive, int]]:
    """Every receive with the last step in which its buffer is needed.

    Args:
        used: `uses(program)`, where it is known already.
    """
    used = uses(program) if used is None else used
    combined = {(action.piece, action.peer): action.step for action in program if isinstance(action, Combine)}
    result = []
    for action in program:
        if isinstance(action, Receive):
            if (action.piece, action.peer) in combined:
                result.append((action, combined[(action.piece, action.peer)]))
                continue
            readers = used[(action.piece.kind, action.piece.owner)]
            result.append(
                (
                    action,
                    max((end for start, end, piece in readers if start >= action.due and action.piece.holds(piece)), default=action.due),
                )
            )
    return result
