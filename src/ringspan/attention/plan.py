"""Everything that one attention needs besides tensors: resolved once, used at every call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

from torch import Tensor

from ringspan.attention.inbox import Inbox
from ringspan.attention.mail import Courier, TransportCourier, Wire
from ringspan.attention.observe import Observer
from ringspan.attention.peer_courier import PeerCourier
from ringspan.attention.program import RankProgram
from ringspan.attention.replay import Replays
from ringspan.attention.reshard import Exchange
from ringspan.attention.scoring import TileScores
from ringspan.attention.streams import MOST_ROWS, OneStream, Result, Streams, streams_for
from ringspan.errors import RingspanError
from ringspan.kernels import Kernel, accumulator_dtype
from ringspan.transport import PeerMemory, Transport


class Turn(Protocol):
    """Does the work of one stage, of which there are several."""

    def __call__(self, index: int, work: Callable[[], Result], /) -> Result:
        """`work()`."""
        ...


@dataclass(frozen=True)
class Plan:
    """Everything that attention needs besides tensors: resolved once, used at every call.

    `transport` is of the ranks that the programs speak of, `everyone` of all: they are others where there is an `exchange`, which
    is there where positions are exchanged for heads around the programs, and `stages` where some heads after others are, each with a plan
    of its own, which is number `stage`; `materialised` where these are Ring Self-Attention's;
    `kv_heads_per_stage` where heads take turns; `lse_gradient_refusal` where the kernel computes no gradient through lse, with the reason;
    `peers` where pieces go through peer memory, with this rank's part in each direction; `return_lse` whether lse is wanted, and a gradient
    of it may come; `differentiable` whether a backward may, for which its forward keeps what it needs; `replays` where passes are captured
    and replayed; `observer` where somebody looks on, who wants to see each launch.
    """

    forward: RankProgram
    backward: RankProgram
    kernel: Kernel
    transport: Transport
    everyone: Transport
    scores: TileScores
    exchange: Exchange | None = None
    materialised: bool = False
    kv_heads_per_stage: int | None = None
    lse_gradient_refusal: str | None = None
    peers: tuple[PeerMemory, Mapping[str, Inbox]] | None = None
    return_lse: bool = False
    differentiable: bool = False
    replays: Replays | None = None
    observer: Observer | None = None
    stages: tuple[Plan, ...] = ()
    stage: int = 0

    def launched(self, direction: str, inputs: tuple[Tensor | None, ...], work: Callable[..., tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """`work(*inputs)`, one direction of this plan, replayed where that is wanted."""
        if self.replays is None:
            return work(*inputs)
        memory = None if self.peers is None or not self.peers[1][direction].messages else self.peers[0]
        return self.replays.run(self, direction, inputs, work, self.everyone, memory)

    @contextmanager
    def in_one_piece(self) -> Iterator[list[object]]:
        """What an error ends between an exchange and a pass is left as one that it ends within: the other ranks wait in the next.

        An error of ringspan's own comes before the first, or is shared by all ranks. For what is under way, which is kept then.
        """
        held: list[object] = []
        try:
            yield held
        except RingspanError:
            raise
        except BaseException:
            if self.exchange is not None and self.peers is not None:
                self.peers[0].leave(held)
            raise

    @cached_property
    def lse_gradient_travels(self) -> bool:
        """Whether a gradient of lse goes from rank to rank: then every rank has one, of zeros where its loss did not use lse.

        So it has where passes are replayed: the ranks must capture the same ones together.
        """
        if not self.return_lse or self.lse_gradient_refusal is not None:
            return False
        if self.replays is not None:
            return True
        transfers = (transfer for step in self.backward.steps for batch in step.batches for transfer in (*batch.sends, *batch.receives))
        return self.exchange is not None or any(transfer.piece.kind == "do" for transfer in transfers)

    def observed(self, observer: Observer) -> Plan:
        """The same, an `observer` looking on."""
        exchange = self.exchange and replace(self.exchange, observer=observer)
        stages = tuple(stage.observed(observer) for stage in self.stages)
        return replace(self, observer=observer, exchange=exchange, stages=stages, replays=None)

    def streams(self, q: Tensor, most_rows: float = MOST_ROWS) -> Streams:
        """Where the kernels of one pass run: one after the other where somebody looks on, so that each is seen by itself."""
        return OneStream() if self.observer is not None else streams_for(q, self.kernel, self.peers is not None, most_rows)

    @contextmanager
    def in_turns(self, q: Tensor, most_rows: float = MOST_ROWS) -> Iterator[Turn]:
        """How stages are computed: given the number of one and its work, each beside the one before, and after its blocks.

        They fill up what the last blocks of the one before leave of a GPU, and what that one gave leaves as early as it can. The last is
        computed on the current stream, below the others: what is made of the one before it when its blocks are done, and then sent, would
        otherwise wait until the last has no block left that has not begun.

        Args:
            q: with the heads of all stages.
            most_rows: see `streams_for`, of the heads of one: those of a call.
        """
        # Graphs share their memory: one after the other.
        some = self.stages and self.replays is None and self.observer is None
        sides = [
            streams_for(q, self.kernel, self.peers is not None, most_rows * len(self.stages), side=side) if some else OneStream()
            for side in (1, 2)
        ]

        def turn(index: int, work: Callable[[], Result]) -> Result:
            if index == 0:
                # What the first needs has come on the current stream.
                for side in sides:
                    side.fork(lambda: None)
            mine = sides[index % 2]
            if index < len(self.stages) - 1:
                return mine.beside(work)
            # After the one before the one before it, as the others.
            mine.join()
            return work()

        try:
            yield turn
        except BaseException:
            for side in sides:
                side.leave()
            raise
        for side in sides:
            side.join()
            side.let_go()

    def courier(self, direction: str, q: Tensor) -> Courier:
        """Who carries what travels in one pass."""
        wide = accumulator_dtype(q.dtype)
        wire = Wire(wide, q.dtype if self.kernel.rounds and not self.materialised else wide)
        if self.peers is None:
            return TransportCourier(self.transport, wire, q.device)
        memory, inboxes = self.peers
        return PeerCourier(inboxes[direction], memory, self.transport, wire)
