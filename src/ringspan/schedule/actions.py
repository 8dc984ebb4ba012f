"""What a schedule is made of: pieces and typed actions, with a text form that reads back.

A step has four phases, the same on every rank: combine what has arrived, post transfers, attend, wait for what is due at the next step.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from ringspan.errors import ScheduleError

KINDS = ("q", "kv", "k", "v", "o", "do", "dq", "dkv", "dk", "dv")
"""`q` queries · `kv` keys and values in one buffer, or `k` and `v` apart · `o` a partial output with its lse · `do` dO with what its
backward needs · `dq`, `dkv`, `dk`, `dv` gradients."""

RESULTS = {
    ("forward", "kv"): ("o",),
    ("forward", "k"): (),
    ("forward", "v"): ("o",),
    ("backward", "kv"): ("dq", "dkv"),
    ("backward", "k"): ("dq", "dk"),
    ("backward", "v"): ("dv",),
}
"""What an attend adds to, by the direction of its schedule and the kind of its keys."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Local positions `[start, stop)` of the shard of `owner`, of one kind. `kv3[0:512]` in text."""

    kind: str
    owner: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __str__(self) -> str:
        return f"{self.kind}{self.owner}[{self.start}:{self.stop}]"

    def holds(self, other: Piece) -> bool:
        """Whether `other` is the same shard's and lies inside."""
        return (self.kind, self.owner) == (other.kind, other.owner) and self.start <= other.start and other.stop <= self.stop


@dataclass(frozen=True, slots=True)
class Send:
    """Posted at the start of `step`, in the hands of rank `peer` at the start of step `due`. `kv0[0:4]→1@2` in text."""

    step: int
    piece: Piece
    peer: int
    due: int

    def __str__(self) -> str:
        return f"{self.piece}→{self.peer}@{self.due}"


@dataclass(frozen=True, slots=True)
class Receive:
    """The other end of a `Send` by rank `peer`: the buffer stands ready from `step`, and is full at `due`. `kv3[0:4]←3@2` in text."""

    step: int
    piece: Piece
    peer: int
    due: int

    def __str__(self) -> str:
        return f"{self.piece}←{self.peer}@{self.due}"


@dataclass(frozen=True, slots=True)
class Attend:
    """Computes every allowed pair of the queries `q` with the keys `kvs` into this rank's accumulators. `q0[0:4]×kv3[0:2]` in text.

    Several kv pieces are one stage: one kernel launch where the kernel can.
    """

    step: int
    q: Piece
    kvs: tuple[Piece, ...]

    def __str__(self) -> str:
        return f"{self.q}×{'+'.join(map(str, self.kvs))}"


@dataclass(frozen=True, slots=True)
class Combine:
    """Takes the part of `piece` that `peer` sent into this rank's own: merges a partial, or adds a gradient. `+dkv1[0:4]←2` in text."""

    step: int
    piece: Piece
    peer: int

    def __str__(self) -> str:
        return f"+{self.piece}←{self.peer}"


Action = Send | Receive | Attend | Combine
"""What a rank does."""

_PHASES = {Combine: 0, Send: 1, Receive: 2, Attend: 3}


@dataclass(frozen=True)
class Schedule:
    """For each rank its actions in order, forward or backward, with the shard length of each owner. No tensors."""

    name: str
    direction: str
    lengths: tuple[int, ...]
    programs: tuple[tuple[Action, ...], ...]

    @property
    def num_ranks(self) -> int:
        """How many ranks take part."""
        return len(self.programs)

    @cached_property
    def num_steps(self) -> int:
        """The number of steps until everything that was sent is home."""
        return max((_last_step(action) + 1 for program in self.programs for action in program), default=0)

    def at(self, rank: int, step: int) -> list[Action]:
        """The actions of one cell of the table."""
        return [action for action in self.programs[rank] if action.step == step]

    def sends(self) -> Iterator[tuple[int, Send]]:
        """Every (rank, send) of the schedule."""
        for rank, program in enumerate(self.programs):
            yield from ((rank, action) for action in program if isinstance(action, Send))

    @cached_property
    def singles(self) -> frozenset[tuple[int, Send]]:
        """The (rank, send) that carry a result to which one attend of one piece has given: no sum yet."""
        found = set()
        for rank, program in enumerate(self.programs):
            given: Counter[tuple[str, int]] = Counter()
            for action in program:
                if isinstance(action, Attend):
                    for kv in action.kvs:
                        for kind in RESULTS[(self.direction, kv.kind)]:
                            given[(kind, action.q.owner if kind in ("o", "dq") else kv.owner)] += 1
                elif isinstance(action, Combine):
                    given[(action.piece.kind, action.piece.owner)] += 1
                elif isinstance(action, Send) and given[(action.piece.kind, action.piece.owner)] == 1:
                    found.add((rank, action))
        return frozenset(found)

    def __str__(self) -> str:
        lines = [f"{self.name} {self.direction} lengths={','.join(map(str, self.lengths))}"]
        for step in range(self.num_steps):
            cells = [" ".join(map(str, self.at(rank, step))) for rank in range(self.num_ranks)]
            lines.append(f"{step}: " + " | ".join(cells))
        return "\n".join(line.rstrip() for line in lines) + "\n"


def _last_step(action: Action) -> int:
    # What is due at step s is waited for at the end of step s − 1.
    return action.due - 1 if isinstance(action, (Send, Receive)) else action.step


class ScheduleBuilder:
    """Collects actions for all ranks; a transfer is written once and becomes a send and a receive.

    Args:
        name: the strategy.
        direction: `forward` or `backward`.
        lengths: the shard length of each rank.
    """

    def __init__(self, name: str, direction: str, lengths: tuple[int, ...]) -> None:
        self._name, self._direction, self._lengths = name, direction, lengths
        self._actions: list[list[Action]] = [[] for _ in lengths]

    def transfer(self, piece: Piece, source: int, target: int, posted: int, due: int) -> None:
        """`piece` leaves `source` at the start of step `posted` and is in the hands of `target` at the start of `due`."""
        self._actions[source].append(Send(posted, piece, target, due))
        self._actions[target].append(Receive(posted, piece, source, due))

    def attend(self, rank: int, step: int, q: Piece, *kvs: Piece) -> None:
        """`rank` computes every allowed pair of `q` and `kvs` at `step`."""
        self._actions[rank].append(Attend(step, q, kvs))

    def combine(self, rank: int, step: int, piece: Piece, peer: int) -> None:
        """`rank` takes in, at the start of `step`, the part of `piece` that `peer` sent."""
        self._actions[rank].append(Combine(step, piece, peer))

    def build(self) -> Schedule:
        """The schedule, each rank's actions in the order of steps and phases."""
        programs = tuple(tuple(sorted(program, key=lambda action: (action.step, _PHASES[type(action)]))) for program in self._actions)
        return Schedule(self._name, self._direction, self._lengths, programs)


_PIECE = r"(q|kv|k|v|o|dq|dkv|dk|dv|do)(\d+)\[(\d+):(\d+)\]"
_TRANSFER = re.compile(rf"{_PIECE}([→←])(\d+)@(\d+)")
_COMBINE = re.compile(rf"\+{_PIECE}←(\d+)")


def _piece(groups: tuple[str, ...]) -> Piece:
    return Piece(groups[0], int(groups[1]), int(groups[2]), int(groups[3]))


def _parse_action(text: str, step: int) -> Action:
    if match := _COMBINE.fullmatch(text):
        return Combine(step, _piece(match.groups()), int(match[5]))
    if match := _TRANSFER.fullmatch(text):
        kind = Send if match[5] == "→" else Receive
        return kind(step, _piece(match.groups()), int(match[6]), int(match[7]))
    pieces = [re.fullmatch(_PIECE, part) for part in re.split("[×+]", text)]
    if "×" not in text or len(pieces) < 2 or not all(pieces):
        raise ScheduleError(
            f"action {text!r} at step {step}", "it is no send, receive, attend or combine", "", "kv0[0:4]→1@2, q0[0:4]×kv3[0:2]"
        )
    q, *kvs = [_piece(match.groups()) for match in pieces if match]
    return Attend(step, q, tuple(kvs))


def parse_schedule(text: str) -> Schedule:
    """Reads back what `str(schedule)` wrote: `parse_schedule(str(schedule)) == schedule`.

    Raises:
        ScheduleError: naming the line or the action that does not read.
    """
    header, *lines = text.strip().splitlines()
    match = re.fullmatch(r"(\S+) (forward|backward) lengths=([\d,]+)", header)
    if not match:
        raise ScheduleError(f"schedule header {header!r}", "it does not read", "", "'ring forward lengths=4,4'")
    lengths = tuple(map(int, match[3].split(",")))
    programs: list[list[Action]] = [[] for _ in lengths]
    for line in lines:
        step, _, cells = line.partition(":")
        columns = cells.split("|")
        if not step.strip().isdigit() or len(columns) != len(lengths):
            raise ScheduleError(
                f"schedule line {line!r}", f"{len(columns)} columns for {len(lengths)} ranks", "", "'0: … | …', a column a rank"
            )
        for program, cell in zip(programs, columns, strict=True):
            program.extend(_parse_action(action, int(step)) for action in cell.split())
    return Schedule(match[1], match[2], lengths, tuple(tuple(program) for program in programs))
