"""Proves a schedule right from integers alone: coverage, possession, matching, homecoming, thrift; and counts what it holds at once."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from ringspan.errors import ScheduleError
from ringspan.geometry import Layout, Mask, Tile, tiles
from ringspan.schedule.actions import RESULTS, Action, Attend, Combine, Piece, Receive, Schedule, Send
from ringspan.schedule.lifetime import Uses, lifetimes, uses

INPUTS = ("q", "kv", "k", "v", "do")


@dataclass(frozen=True)
class Report:
    """What a valid schedule holds and moves.

    Attributes:
        live_positions: for each rank and kind, the most visiting positions that lie in receive buffers at once.
        sent_positions: for each rank and kind, the positions that it sends.
    """

    live_positions: tuple[dict[str, int], ...]
    sent_positions: tuple[dict[str, int], ...]


def validate(schedule: Schedule, layout: Layout, mask: Mask) -> Report:
    """Proves `schedule` for `layout` and `mask`.

    Raises:
        ScheduleError: naming the rule that is broken, and where.
    """
    if schedule.lengths != layout.shard_lengths:
        raise _broken("shape", f"shards of {schedule.lengths}", f"the layout's shards are {layout.shard_lengths}")
    _check_matching(schedule)
    order = _run_blocking(schedule)
    _check_coverage(schedule, layout, mask)
    _Possession(schedule).check(order)
    used = [uses(program) for program in schedule.programs]
    _check_thrift(schedule, used)
    return Report(live_positions(schedule, used), _sent_positions(schedule))


def _broken(rule: str, asked: str, found: str) -> ScheduleError:
    return ScheduleError(asked, found, rule=f"A schedule keeps {rule}", nearest="the schedule as its strategy makes it")


# ---- matching, and the absence of deadlock ---------------------------------------------------------------------------------------


def _check_matching(schedule: Schedule) -> None:
    sends, receives = [], []
    for rank, program in enumerate(schedule.programs):
        for action in program:
            if isinstance(action, Send):
                sends.append((rank, action.peer, action.piece, action.step, action.due))
            elif isinstance(action, Receive):
                receives.append((action.peer, rank, action.piece, action.step, action.due))
            else:
                continue
            if action.due <= action.step or action.peer == rank or not 0 <= action.peer < schedule.num_ranks:
                raise _broken(
                    "matching", f"rank {rank}: {action} at step {action.step}", "a transfer goes to another rank and arrives later"
                )
    posted, awaited = Counter(sends), Counter(receives)
    if _equal(posted, awaited):
        return
    for kind, other, lonely in ((Send, Receive, posted - awaited), (Receive, Send, awaited - posted)):
        for source, target, piece, step, due in lonely:
            raise _broken(
                "matching",
                f"{piece} from rank {source} to {target}, posted at step {step}, due at {due}",
                f"a {kind.__name__.lower()} without its {other.__name__.lower()}",
            )


def _equal(one: Counter, other: Counter) -> bool:
    """Whether two counts are the same. There are no zeros in them, which a Counter's own comparison would look for."""
    return dict.__eq__(one, other)


def _run_blocking(schedule: Schedule) -> list[tuple[int, Action]]:
    """Runs every rank's program with waits that block, in any order that is possible; returns that order."""
    queues = [_with_waits(program) for program in schedule.programs]
    cursors = [0] * schedule.num_ranks
    posted: set[tuple[int, int, Piece, int]] = set()
    order: list[tuple[int, Action]] = []
    progress = True
    while progress:
        progress = False
        for rank, queue in enumerate(queues):
            start = cursors[rank]
            while cursors[rank] < len(queue):
                waits, action = queue[cursors[rank]]
                if waits:
                    assert isinstance(action, Receive)
                    if (action.peer, rank, action.piece, action.step) not in posted:
                        break
                else:
                    order.append((rank, action))
                    if isinstance(action, Send):
                        posted.add((rank, action.peer, action.piece, action.step))
                cursors[rank] += 1
            progress = progress or cursors[rank] > start
    stuck = {rank: str(queue[cursor][1]) for rank, (queue, cursor) in enumerate(zip(queues, cursors, strict=True)) if cursor < len(queue)}
    if stuck:
        raise _broken("matching", f"schedule {schedule.name!r} with waits that block", f"a cycle of waits: {stuck}")
    return order


def _with_waits(program: tuple[Action, ...]) -> list[tuple[bool, Action]]:
    """(False, action) where the action is done, (True, receive) where its arrival is waited for: before anything of step `due`."""
    waits = [(action.due, -1, True, action) for action in program if isinstance(action, Receive)]
    done = [(action.step, index, False, action) for index, action in enumerate(program)]
    return [(waiting, action) for _, _, waiting, action in sorted(waits + done, key=lambda entry: entry[:2])]


# ---- coverage --------------------------------------------------------------------------------------------------------------------


def _check_coverage(schedule: Schedule, layout: Layout, mask: Mask) -> None:
    """Every allowed pair in exactly one attend: the areas of the attended rectangles' tiles add up, and no two rectangles overlap.

    Where keys and values travel apart, this holds for each of the two.
    """
    rectangles: dict[tuple[str, int, int], list[tuple[Piece, Piece, int]]] = defaultdict(list)
    for rank, program in enumerate(schedule.programs):
        for action in program:
            if isinstance(action, Attend):
                for kv in action.kvs:
                    rectangles[(kv.kind, action.q.owner, kv.owner)].append((action.q, kv, rank))
    kinds = {kind for kind, *_ in rectangles}
    for kind in ("k", "v") if kinds & {"k", "v"} else ("kv",):
        for q_owner in range(schedule.num_ranks):
            for k_owner in range(schedule.num_ranks):
                block = tiles(layout, mask, q_owner, k_owner)
                _check_block(block, rectangles.pop((kind, q_owner, k_owner), []), f"queries of rank {q_owner} × {kind} of rank {k_owner}")
    if rectangles:
        raise _broken(
            "coverage", f"attends of {sorted(rectangles)}", f"there are {schedule.num_ranks} ranks, and each pair is computed once"
        )


def _check_block(block: tuple[Tile, ...], attended: list[tuple[Piece, Piece, int]], what: str) -> None:
    covered = 0
    for index, (q, kv, rank) in enumerate(attended):
        inside = [part for tile in block if (part := tile.clipped(q.start, q.stop, kv.start, kv.stop)) is not None]
        covered += sum(part.pairs for part in inside)
        if not inside:
            raise _broken("coverage", f"rank {rank}: {q}×{kv}", "the mask leaves nothing of it")
        for other_q, other_kv, other in attended[:index]:
            if any(tile.clipped(*_overlap(q, other_q), *_overlap(kv, other_kv)) for tile in block):
                raise _broken("coverage", f"rank {rank}: {q}×{kv}", f"rank {other} computes some of its pairs too")
    wanted = sum(tile.pairs for tile in block)
    if covered != wanted:
        raise _broken("coverage", what, f"{covered} of {wanted} allowed pairs are computed")


def _overlap(one: Piece, other: Piece) -> tuple[int, int]:
    return max(one.start, other.start), min(one.stop, other.stop)


# ---- possession and homecoming ---------------------------------------------------------------------------------------------------


class _Possession:
    """Follows every piece from hand to hand, and every contribution to its owner.

    A contribution is one (query piece, key piece) rectangle; an accumulator holds, for each interval of positions, which contributions
    are in it. Sending an accumulator gives it up.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        ranks = range(schedule.num_ranks)
        self.held: list[dict[tuple[str, int], list[tuple[Piece, int]]]] = [defaultdict(list) for _ in ranks]
        self.accumulators: list[dict[tuple[str, int], list]] = [defaultdict(list) for _ in ranks]
        self.in_flight: dict[tuple, tuple[int, list]] = {}

    def check(self, order: list[tuple[int, Action]]) -> None:
        for rank, program in enumerate(self.schedule.programs):
            for kind in INPUTS:
                self.held[rank][(kind, rank)].append((Piece(kind, rank, 0, self.schedule.lengths[rank]), 0))
            for action in program:
                if isinstance(action, Receive) and action.piece.kind in INPUTS:
                    self.held[rank][(action.piece.kind, action.piece.owner)].append((action.piece, action.due))
        # By steps, so that contributions are followed in the order of their meaning and not of one possible interleaving.
        for rank, action in sorted(order, key=lambda entry: entry[1].step):
            self._do(rank, action)
        self._check_home()

    def _do(self, rank: int, action: Action) -> None:
        if isinstance(action, Send):
            if action.piece.kind not in INPUTS:
                self.in_flight[(rank, action.peer, action.piece)] = (action.due, self._give_up(rank, action))
            else:
                self._need(rank, action.piece, action.piece.kind, action)
        elif isinstance(action, Combine):
            self._combine(rank, action)
        elif isinstance(action, Attend):
            self._need(rank, action.q, action.q.kind, action)
            if self.schedule.direction == "backward":
                self._need(rank, action.q, "do", action)
            for kv in action.kvs:
                self._need(rank, kv, kv.kind, action)
                for kind, of in _results(self.schedule, action.q, kv):
                    self.accumulators[rank][(kind, of.owner)].append((of.start, of.stop, (action.q, kv)))

    def _need(self, rank: int, piece: Piece, kind: str, action: Action) -> None:
        """The positions of `piece`, of that kind, are in the rank's hands at the action's step."""
        if piece.start >= piece.stop:
            return
        for held, since in self.held[rank][(kind, piece.owner)]:
            if since <= action.step and held.start <= piece.start and piece.stop <= held.stop:
                return
        missing = Piece(kind, piece.owner, piece.start, piece.stop)
        raise _broken("possession", f"rank {rank}, step {action.step}: {action}", f"{missing} is not in its hands")

    def _give_up(self, rank: int, action: Send) -> list:
        piece = action.piece
        accumulator = self.accumulators[rank][(piece.kind, piece.owner)]
        taken = [entry for entry in accumulator if entry[0] >= piece.start and entry[1] <= piece.stop]
        if not taken:
            raise _broken("possession", f"rank {rank}, step {action.step}: {action}", "it has computed nothing of it")
        self.accumulators[rank][(piece.kind, piece.owner)] = [
            entry for entry in accumulator if entry[0] < piece.start or entry[1] > piece.stop
        ]
        return taken

    def _combine(self, rank: int, action: Combine) -> None:
        due, entries = self.in_flight.pop((action.peer, rank, action.piece), (None, []))
        if due is None or due > action.step:
            raise _broken("homecoming", f"rank {rank}, step {action.step}: {action}", "nothing to combine has arrived")
        self.accumulators[rank][(action.piece.kind, action.piece.owner)].extend(entries)

    def _check_home(self) -> None:
        for source, target, piece in self.in_flight:
            raise _broken("homecoming", f"{piece} from rank {source} to {target}", "it arrives and is never combined")
        for rank, accumulators in enumerate(self.accumulators):
            for (kind, owner), entries in accumulators.items():
                if owner != rank and entries:
                    raise _broken("homecoming", f"{kind}{owner} on rank {rank}", "it stays away from its owner")
        at_home = Counter(
            (rank, kind, contribution)
            for rank, accumulators in enumerate(self.accumulators)
            for (kind, _), entries in accumulators.items()
            for *_, contribution in entries
        )
        wanted = Counter(
            (of.owner, kind, (action.q, kv))
            for program in self.schedule.programs
            for action in program
            if isinstance(action, Attend)
            for kv in action.kvs
            for kind, of in _results(self.schedule, action.q, kv)
        )
        if not _equal(at_home, wanted):
            rank, kind, (q, kv) = next(iter((wanted - at_home) or (at_home - wanted)))
            raise _broken("homecoming", f"{kind} of {q}×{kv} for rank {rank}", "it does not come home exactly once")


def _results(schedule: Schedule, q: Piece, kv: Piece) -> list[tuple[str, Piece]]:
    """(kind, of which piece) for everything that an attend adds to."""
    return [(kind, kv if kind in ("dkv", "dk", "dv") else q) for kind in RESULTS[(schedule.direction, kv.kind)]]


# ---- thrift, live buffers, traffic -----------------------------------------------------------------------------------------------


def _check_thrift(schedule: Schedule, used_by_rank: Sequence[Uses]) -> None:
    """Every position that travels is read at its target or beyond."""
    for rank, (program, used) in enumerate(zip(schedule.programs, used_by_rank, strict=True)):
        for action in program:
            if isinstance(action, Receive) and action.piece.kind in ("q", "kv", "k", "v"):
                whole = action.piece
                readers = [
                    piece
                    for step, _, piece in used[(whole.kind, whole.owner)]
                    if step >= action.due and whole.holds(piece) and piece.stop > piece.start
                ]
                first, last = min((piece.start for piece in readers), default=0), max((piece.stop for piece in readers), default=0)
                if (first, last) != (whole.start, whole.stop):
                    raise _broken("thrift", f"rank {rank}: {action}", f"of it only positions {first} to {last} are read or passed on")


def live_positions(schedule: Schedule, used_by_rank: Sequence[Uses] | None = None) -> tuple[dict[str, int], ...]:
    """For each rank and kind, the most visiting positions that lie in receive buffers at once.

    Args:
        used_by_rank: `uses` of each rank's program, where they are known already.
    """
    result = []
    for rank, program in enumerate(schedule.programs):
        changes: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
        for received, last in lifetimes(program, None if used_by_rank is None else used_by_rank[rank]):
            changes[received.piece.kind][received.step] += len(received.piece)
            changes[received.piece.kind][last + 1] -= len(received.piece)
        most = {}
        for kind, steps in changes.items():
            live = list(accumulate(steps[step] for step in sorted(steps)))
            most[kind] = max(live)
        result.append(most)
    return tuple(result)


def _sent_positions(schedule: Schedule) -> tuple[dict[str, int], ...]:
    result: list[dict[str, int]] = [defaultdict(int) for _ in schedule.programs]
    for rank, send in schedule.sends():
        result[rank][send.piece.kind] += len(send.piece)
    return tuple(dict(sent) for sent in result)
