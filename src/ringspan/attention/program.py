"""One rank's column of a schedule, resolved once for a layout, a mask and a kernel: what the executor then only runs."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from ringspan.geometry import Layout, Mask, Tile
from ringspan.kernels import lowered, packed
from ringspan.schedule import RESULTS, Action, Attend, Combine, Piece, Receive, Schedule, Send, lifetimes
from ringspan.schedule.draw import tiles_between

LANES = {"kv": 0, "k": 0, "v": 0, "q": 0, "do": 0, "o": 1, "dq": 1, "dkv": 1, "dk": 1, "dv": 1}
"""Results travel on a lane of their own, so that they do not queue behind what the next step needs."""


@dataclass(frozen=True)
class Launch:
    """One kernel call: `tile` of the queries of one rank against the keys of another, in local indices of their shards.

    `kind` says which of the keys and values are at hand: `kv`, `k` or `v`. `parts` are the tiles of a call that computes several, such as
    the documents of a shard; `tile` then is the rectangle that holds them. `joined` are the keys of a call that computes one tile against
    several pieces, one after the other: `tile` is full then and counts along all of them, and `kv_owner` is the first one's.
    """

    q_owner: int
    kv_owner: int
    tile: Tile
    kind: str = "kv"
    parts: tuple[Tile, ...] = ()
    joined: tuple[Piece, ...] = ()

    @property
    def keys(self) -> tuple[Piece, ...]:
        """What is read of keys and values, in the order in which the tile counts them."""
        return self.joined or (Piece(self.kind, self.kv_owner, self.tile.k_start, self.tile.k_stop),)

    @property
    def blocks(self) -> tuple[tuple[int, Tile], ...]:
        """(owner of the keys, tile in local indices) of all that is computed."""
        if self.joined:
            return tuple((keys.owner, replace(self.tile, k_start=keys.start, k_stop=keys.stop)) for keys in self.joined)
        return tuple((self.kv_owner, tile) for tile in self.parts or (self.tile,))

    @property
    def pairs(self) -> int:
        """How many pairs are computed."""
        return sum(tile.pairs for _, tile in self.blocks)


@dataclass(frozen=True)
class Batch:
    """Transfers that are posted together, on one lane, and due together; the `index`-th of its rank.

    `singles` are the pieces among them, each with the peer, that are results of one attend: they travel as the kernel gave them.
    `neighbours` are the receives, by index: keys that are needed equally long together, all else by itself.
    `idle`: no kernel is launched any more when it is posted.
    """

    index: int
    lane: int
    due: int
    sends: tuple[Send, ...]
    receives: tuple[Receive, ...]
    singles: frozenset[Send | Receive] = frozenset()
    neighbours: tuple[tuple[int, ...], ...] = ()
    idle: bool = False


@dataclass(frozen=True)
class Step:
    """What a rank does in one step, phase by phase. `releases` are the visitors that no later step reads."""

    combines: tuple[Combine, ...]
    batches: tuple[Batch, ...]
    launches: tuple[Launch, ...]
    releases: tuple[Piece, ...]


@dataclass(frozen=True)
class RankProgram:
    """All steps of one rank.

    Attributes:
        rank: whose.
        steps: in order.
        accumulators: the span of each accumulator that it needs: `accumulators[(kind, owner)] = (start, stop)`.
        additions: how often each is added to: the last addition may round.
        again: the span of each that is added to after the first addition, which may cover all of it.
        beside: launches that the next one need not wait for: between them nothing is freed or taken in.
    """

    rank: int
    steps: tuple[Step, ...]
    accumulators: dict[tuple[str, int], tuple[int, int]]
    additions: Counter[tuple[str, int]]
    again: dict[tuple[str, int], tuple[int, int]]
    beside: frozenset[Launch]


def resolve(schedule: Schedule, layout: Layout, mask: Mask, shapes: frozenset[str], rank: int, varlen: bool = False) -> RankProgram:
    """The program of `rank`, its tiles lowered to the `shapes` that a kernel computes; with `varlen`, many in one launch."""
    actions = schedule.programs[rank]
    spans: dict[tuple[str, int], tuple[int, int]] = {}
    additions: Counter[tuple[str, int]] = Counter()
    again: dict[tuple[str, int], tuple[int, int]] = {}

    def grow(kind: str, owner: int, start: int, stop: int) -> None:
        for hulls in [spans, again] if (kind, owner) in spans else [spans]:
            low, high = hulls.get((kind, owner), (start, stop))
            hulls[(kind, owner)] = (min(low, start), max(high, stop))
        additions[(kind, owner)] += 1

    releases: dict[int, list[Piece]] = defaultdict(list)
    for received, last in lifetimes(actions):
        if LANES[received.piece.kind] == 0:
            releases[last].append(received.piece)
    cells: dict[int, list[Action]] = defaultdict(list)
    for action in actions:
        cells[action.step].append(action)
    steps: list[Step] = []
    batches = {step: tuple(_marked(batch, schedule, rank) for batch in found) for step, found in rank_batches(actions).items()}
    for step in range(schedule.num_steps):
        cell = cells[step]
        launches = []
        for attend in (action for action in cell if isinstance(action, Attend)):
            found = [launch for kv in attend.kvs for launch in _launches(layout, mask, shapes, attend.q, kv, varlen)]
            # A function of positions is asked for each owner's.
            launches.extend(found if mask.mod is not None or attend.kvs[0].kind != "kv" else _joined(found))
        for launch in launches:
            tile = launch.tile
            for kind in RESULTS[(schedule.direction, launch.kind)]:
                if kind in ("o", "dq"):
                    grow(kind, launch.q_owner, tile.q_start, tile.q_stop)
                else:
                    for keys in launch.keys:
                        grow(kind, keys.owner, keys.start, keys.stop)
        combines = tuple(action for action in cell if isinstance(action, Combine))
        for combine in combines:
            grow(combine.piece.kind, combine.piece.owner, combine.piece.start, combine.piece.stop)
        steps.append(Step(combines, batches.get(step, ()), tuple(launches), tuple(releases[step])))
    last = max((index for index, step in enumerate(steps) if step.launches), default=-1)
    steps[last + 1 :] = [replace(step, batches=tuple(replace(batch, idle=True) for batch in step.batches)) for step in steps[last + 1 :]]
    return RankProgram(rank, tuple(steps), spans, additions, again, frozenset(_beside(steps)))


def _beside(steps: list[Step]) -> Iterator[Launch]:
    """Of launches that follow each other, every first of two."""
    first: Launch | None = None
    for step in steps:
        if step.combines:
            first = None
        for launch in step.launches:
            if first is not None:
                yield first
            first = launch if first is None else None
        if step.releases:
            first = None


def _marked(batch: Batch, schedule: Schedule, rank: int) -> Batch:
    """`batch` with its singles. What arrives is one where its sender says so."""
    if batch.lane == 0:
        return batch
    sends = (send for send in batch.sends if (rank, send) in schedule.singles)
    receives = (
        receive for receive in batch.receives if (receive.peer, Send(receive.step, receive.piece, rank, receive.due)) in schedule.singles
    )
    return replace(batch, singles=frozenset((*sends, *receives)))


def sent_spans(actions: tuple[Action, ...], rank: int) -> dict[str, tuple[int, int]]:
    """Of each input that `rank` owns the span that holds all that it sends of it."""
    spans: dict[str, tuple[int, int]] = {}
    for action in actions:
        if isinstance(action, Send) and action.piece.owner == rank and LANES[action.piece.kind] == 0:
            piece = action.piece
            low, high = spans.get(piece.kind, (piece.start, piece.stop))
            spans[piece.kind] = (min(low, piece.start), max(high, piece.stop))
    return spans


def rank_batches(actions: tuple[Action, ...]) -> dict[int, tuple[Batch, ...]]:
    """By step what a rank posts, counted from its first batch to its last."""
    posted: dict[int, list[Send | Receive]] = defaultdict(list)
    for action in actions:
        if isinstance(action, (Send, Receive)):
            posted[action.step].append(action)
    result: dict[int, tuple[Batch, ...]] = {}
    needed = dict(lifetimes(actions))
    count = 0
    for step in sorted(posted):
        result[step] = _batches(posted[step], count, needed)
        count += len(result[step])
    return result


def _launches(layout: Layout, mask: Mask, shapes: frozenset[str], q: Piece, kv: Piece, varlen: bool) -> list[Launch]:
    found = [part for tile in tiles_between(layout, mask, q, kv) for part in lowered(tile, shapes)]
    runs = packed(found) if varlen else [(tile,) for tile in found]
    return [Launch(q.owner, kv.owner, _hull(run), kv.kind, run if len(run) > 1 else ()) for run in runs]


def _joined(launches: list[Launch]) -> list[Launch]:
    """The launches of one attend, those of which all queries see all keys as one: a call then reads the queries once, and gives one sum.

    The keys are in the order of their owners, as a batch brings them.
    """
    result: list[Launch] = []
    runs: dict[tuple[int, int], list[Launch]] = defaultdict(list)
    for launch in launches:
        if launch.tile.kind == "full" and not launch.parts:
            runs[launch.tile.q_start, launch.tile.q_stop].append(launch)
        else:
            result.append(launch)
    for (q_start, q_stop), run in runs.items():
        if len(run) == 1:
            result.append(run[0])
            continue
        keys = tuple(sorted((piece for launch in run for piece in launch.keys), key=lambda piece: (piece.owner, piece.start)))
        tile = Tile(q_start, q_stop, 0, sum(map(len, keys)))
        result.append(Launch(run[0].q_owner, keys[0].owner, tile, run[0].kind, joined=keys))
    return result


def _hull(run: tuple[Tile, ...]) -> Tile:
    return run[0] if len(run) == 1 else Tile(run[0].q_start, run[-1].q_stop, run[0].k_start, run[-1].k_stop)


def _batches(transfers: list[Send | Receive], first: int, needed: Mapping[Receive, int]) -> tuple[Batch, ...]:
    """Both ends sort alike, so that what two ranks exchange in one batch pairs up in order."""
    groups: dict[tuple[int, int], list[Send | Receive]] = defaultdict(list)
    for transfer in transfers:
        groups[(LANES[transfer.piece.kind], transfer.due)].append(transfer)
    result = []
    for (lane, due), members in sorted(groups.items()):
        members.sort(key=lambda member: (member.peer, str(member.piece)))
        sends = tuple(member for member in members if isinstance(member, Send))
        receives = tuple(member for member in members if isinstance(member, Receive))
        together: dict[int, list[int]] = defaultdict(list)
        for index, receive in enumerate(receives):
            together[needed[receive] if receive.piece.kind == "kv" else -1 - index].append(index)
        neighbours = tuple(map(tuple, together.values()))
        result.append(Batch(first + len(result), lane, due, sends, receives, neighbours=neighbours))
    return tuple(result)
