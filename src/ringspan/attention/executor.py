"""The executor: runs one rank's program on real tensors, forward and backward, over any transport and with any kernel.

A step posts its transfers, launches its kernels while they travel, and then waits for what the next step needs: communication under
computation, for every strategy, because the schedule says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ringspan.attention.accumulate import Accumulator, Partial
from ringspan.attention.mail import Component, Courier
from ringspan.attention.observe import Observer, watch
from ringspan.attention.program import LANES, Batch, Launch, RankProgram
from ringspan.attention.scoring import TileScores
from ringspan.attention.shelf import Shelf, joined
from ringspan.attention.streams import Result, Streams
from ringspan.attention.turns import Sum, Turns
from ringspan.kernels import Kernel, Scores, accumulator_dtype, batch_first, rows_first
from ringspan.kernels.lse_gradient import backward as kernel_backward
from ringspan.schedule import Piece, Send
from ringspan.transport import Pending


class Pass:
    """One run of one direction. Subclasses say what a launch computes and what a combine does.

    Args:
        program: this rank's resolved program.
        courier: carries the pieces.
        scores: makes the scores of each tile.
        streams: where its kernels run.
    """

    def __init__(self, program: RankProgram, courier: Courier, scores: TileScores, streams: Streams) -> None:
        self.program, self.courier, self.scores, self.turns = program, courier, scores, Turns(streams)
        self.shelf = Shelf()
        self._arrived: dict[tuple[Piece, int], list[Tensor]] = {}
        self._waiting: list[tuple[Batch, Pending, Any]] = []

    def run(self, observer: Observer | None = None) -> None:
        """All steps of the program, an `observer` looking on."""
        try:
            self._run(observer)
        except BaseException:
            self.turns.streams.leave()
            self.courier.leave(self._waiting)
            raise

    def _run(self, observer: Observer | None) -> None:
        self.courier.begin()
        for index, step in enumerate(self.program.steps):
            for combine in step.combines:
                self.turns.take((combine.piece.kind, combine.piece.owner))
                with watch(observer, index, "merge", combine):
                    self.combine(combine.piece, self._arrived.pop((combine.piece, combine.peer)))
            for batch in step.batches:
                with watch(observer, index, "post", batch):
                    incoming = self._incoming(batch)
                    # Inputs, and results of the calls beside, need not wait for what the current stream still computes.
                    with self.turns.aside(batch.lane == 0 or all(self.leaves_aside(send.piece) for send in batch.sends)) as is_aside:
                        posted = replace(batch, idle=False) if is_aside else batch
                        pending = self.courier.post(posted, [self._outgoing(send) for send in batch.sends], incoming)
                self._waiting.append((batch, pending, None if observer is None else observer.begin(index, "transfer", batch, pending)))
            self.settle(observer, index)
            for launch in step.launches:
                with watch(observer, index, "attend", launch):
                    self.attend(launch)
            for batch, pending, token in self._waiting:
                if batch.due <= index + 1:
                    with watch(observer, index, "wait", batch):
                        self.turns.streams.arrived(pending)
                    if observer is not None:
                        observer.end(token)
            self._waiting = [entry for entry in self._waiting if entry[0].due > index + 1]
            if (step.releases or step.combines) and self.courier.frees(index):
                # Whoever writes there next must not overtake a call that reads it.
                self.turns.join()
            for piece in step.releases:
                self.shelf.drop(piece)
            if step.combines and self.courier.lends:
                with watch(observer, index, "merge"):
                    for accumulator in self.accumulators():
                        accumulator.settle(lent=True)
            self.courier.give_back(index)
        self.settle(observer, len(self.program.steps) - 1)
        self.turns.join()
        self.courier.end()

    def settle(self, observer: Observer | None = None, index: int = 0) -> None:
        """Does what an attend put off until its results are on their way."""

    def compute(self, launch: Launch, sums: Iterable[Sum], call: Callable[[], Result]) -> Result:
        """`call()`, the kernel's of this launch, of which something is added to `sums`: beside the one before, or the next beside it."""
        return self.turns.compute(launch in self.program.beside, sums, call)

    def leaves_aside(self, piece: Piece) -> bool:
        """Whether the current stream has added nothing to what `piece` is of since calls run beside it, and has nothing to add."""
        return self.turns.leaves_aside((piece.kind, piece.owner))

    @contextmanager
    def ending(self) -> Iterator[list[Tensor]]:
        """Within it the last of the pass is read. For its results, which are all that is left."""
        results: list[Tensor] = []
        try:
            yield results
        finally:
            self.turns.streams.let_go()
            self.turns.streams.outlive(*results)

    def _outgoing(self, send: Send) -> list[Tensor]:
        return self.shelf.view(send.piece) if LANES[send.piece.kind] == 0 else self.partial(send.piece)

    def _incoming(self, batch: Batch) -> list[list[Tensor]]:
        incoming = self.courier.buffers(batch, [self.components(receive.piece, receive in batch.singles) for receive in batch.receives])
        for receive, tensors in zip(batch.receives, incoming, strict=True):
            if LANES[receive.piece.kind] == 0:
                self.shelf.put(receive.piece, tensors)
            else:
                self._arrived[(receive.piece, receive.peer)] = tensors
        return incoming

    def attend(self, launch: Launch) -> None:
        """Computes one tile into this rank's accumulators."""
        raise NotImplementedError

    def combine(self, piece: Piece, arrived: list[Tensor]) -> None:
        """Takes in a partial that came from elsewhere."""
        raise NotImplementedError

    def partial(self, piece: Piece) -> list[Tensor]:
        """What this rank has accumulated of `piece`, to be sent."""
        raise NotImplementedError

    def accumulators(self) -> Iterable[Partial | Accumulator]:
        """All that this rank adds up: what was lent to them is read before it is given back."""
        raise NotImplementedError

    def components(self, piece: Piece, single: bool) -> list[Component]:
        """What `piece` consists of when it arrives; `single`: as the kernel gave it."""
        raise NotImplementedError


class _FlashPass(Pass):
    """What forward and backward share: q on the shelf, and keys with their values."""

    def __init__(
        self, program: RankProgram, courier: Courier, scores: TileScores, streams: Streams,
        kernel: Kernel, q: Tensor, k: Tensor, v: Tensor,
    ) -> None:  # fmt: skip
        super().__init__(program, courier, scores, streams)
        self.kernel, self.wide = kernel, accumulator_dtype(q.dtype)
        # Kernels take any strides but of the heads' own width.
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        self._q, self._k = q, k
        rank = program.rank
        self.shelf.put(Piece("q", rank, 0, q.shape[1]), [rows_first(q)])
        self.shelf.put(Piece("kv", rank, 0, k.shape[1]), [rows_first(k), rows_first(v)])

    def keys(self, launch: Launch) -> list[list[Tensor]]:
        """What a launch reads of k and v, `[rows, batch, kv_heads, head_dim]` each: to be joined where they are read."""
        k, v = zip(*map(self.shelf.view, launch.keys), strict=True)
        return [list(k), list(v)]

    def components(self, piece: Piece, single: bool) -> list[Component]:
        """Of what visits."""
        result = self._q.dtype if single and self.kernel.rounds else self.wide
        batch, heads, head_dim = self._q.shape[0], *self._q.shape[2:]
        query, key = (len(piece), batch, heads, head_dim), (len(piece), batch, *self._k.shape[2:])
        match piece.kind:
            case "kv":
                # Apart, so that nothing is packed and kernels read contiguous rows.
                return [Component(key, self._k.dtype)] * 2
            case "dkv":
                return [Component(key, result)] * 2
            case "q":
                return [Component(query, self._q.dtype)]
            case "dq":
                return [Component(query, result)]
            case "o":
                return [Component(query, result), Component(query[:3], self.wide)]
        own = self.shelf.view(Piece("do", self.program.rank, 0, 0))
        return [Component(query[: tensor.ndim], tensor.dtype) for tensor in own]


class ForwardPass(_FlashPass):
    """q, k, v `[batch, shard, heads, head_dim]` to `out` and `lse`. `rounds`: to the dtype of q, at the last merge. See `Pass`."""

    def __init__(
        self, program: RankProgram, courier: Courier, scores: TileScores, streams: Streams, kernel: Kernel,
        q: Tensor, k: Tensor, v: Tensor, rounds: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(program, courier, scores, streams, kernel, q, k, v)
        spans = {**program.accumulators, ("o", program.rank): (0, q.shape[1])}
        self._partials = {
            owner: Partial(
                Piece(kind, owner, start, stop),
                q,
                program.additions[(kind, owner)],
                program.again.get((kind, owner), (start, stop)),
                rounds and owner == program.rank,
                before=partial(self.turns.before, (kind, owner)),
                after=self.turns.streams.let_go,
            )
            for (kind, owner), (start, stop) in spans.items()
        }

    def attend(self, launch: Launch) -> None:
        """Merges the tile's partial attention into the partial of its queries' owner."""
        tile = launch.tile
        (q,) = self.shelf.view(Piece("q", launch.q_owner, tile.q_start, tile.q_stop))
        scores = self.scores(launch.q_owner, launch.kv_owner, tile, launch.parts)

        call = partial(_partial_attention, self.kernel, batch_first(q), self.keys(launch), scores, self.wide)
        out, lse = self.compute(launch, [("o", launch.q_owner)], call)
        self._partials[launch.q_owner].add(tile.q_start, tile.q_stop, out, lse)

    def combine(self, piece: Piece, arrived: list[Tensor]) -> None:
        """Merges a partial that another rank computed."""
        self._partials[piece.owner].add(piece.start, piece.stop, *arrived, lent=self.courier.lends)

    def accumulators(self) -> Iterable[Partial]:
        """See `Pass.accumulators`."""
        return self._partials.values()

    def partial(self, piece: Piece) -> list[Tensor]:
        """`out` and `lse` of the rows of `piece`."""
        return self._partials[piece.owner].rows(piece.start, piece.stop)

    def result(self) -> tuple[Tensor, Tensor]:
        """`out [batch, shard, heads, head_dim]`, rounded to the dtype of q if it may be, and `lse [batch, heads, shard]`."""
        with self.ending() as results:
            results += self._partials[self.program.rank].result()
        out, lse = results
        return out, lse


def _partial_attention(
    kernel: Kernel, q: Tensor, keys: list[list[Tensor]], scores: Scores, wide: torch.dtype
) -> tuple[Tensor, Tensor]:  # fmt: skip
    k, v = (batch_first(joined(parts)) for parts in keys)
    out, lse = kernel.forward(q, k, v, scores)
    return rows_first(out), lse.permute(2, 0, 1).to(wide)


def _gradients(
    kernel: Kernel, dout: Tensor, q: Tensor, keys: list[list[Tensor]], out: Tensor, lse: Tensor, dlse: Tensor | None, scores: Scores
) -> tuple[Tensor, Tensor, Tensor]:
    k, v = (batch_first(joined(parts)) for parts in keys)
    return kernel_backward(kernel, dout, q, k, v, out, lse, dlse, scores)


_Gradients = list[tuple[Piece, list[Tensor]]]


class BackwardPass(_FlashPass):
    """dO and what the forward saved to dq, dk, dv. `dlse` is None where nothing depends on lse; `rounds_keys`: dk and dv are whole."""

    def __init__(
        self, program: RankProgram, courier: Courier, scores: TileScores, streams: Streams, kernel: Kernel,
        q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None,
        rounds_keys: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(program, courier, scores, streams, kernel, q, k, v)
        rank, rows = program.rank, q.shape[1]
        stats = [lse.permute(2, 0, 1)] + ([] if dlse is None else [dlse.permute(2, 0, 1)])
        dout = dout if dout.stride(-1) == 1 else dout.contiguous()
        self.shelf.put(Piece("do", rank, 0, rows), [rows_first(dout), rows_first(out), *stats])
        spans = {**program.accumulators, ("dq", rank): (0, rows), ("dkv", rank): (0, k.shape[1])}
        self._accumulators = {
            (kind, owner): Accumulator(
                Piece(kind, owner, start, stop),
                q if kind == "dq" else k,
                program.additions[(kind, owner)],
                rounds=owner == rank and (kind == "dq" or rounds_keys),
                parts=1 if kind == "dq" else 2,
                before=partial(self.turns.before, (kind, owner)),
                after=self.turns.streams.let_go,
            )
            for (kind, owner), (start, stop) in spans.items()
        }
        self._late: _Gradients = []

    def settle(self, observer: Observer | None = None, index: int = 0) -> None:
        """Adds those gradients of the last tile that stay here: the others, which may travel, need not wait for that."""
        if self._late:
            late, self._late = self._late, []
            with watch(observer, index, "merge"):
                self._add(late)

    def attend(self, launch: Launch) -> None:
        """Adds the tile's share of dq, dk and dv."""
        self.settle()
        q_owner, kv_owner, tile = launch.q_owner, launch.kv_owner, launch.tile
        (q,) = self.shelf.view(Piece("q", q_owner, tile.q_start, tile.q_stop))
        dout, out, lse, *dlse = self.shelf.view(Piece("do", q_owner, tile.q_start, tile.q_stop))
        dlse = dlse[0].permute(1, 2, 0) if dlse else None
        call = partial(
            _gradients, self.kernel, batch_first(dout), batch_first(q), self.keys(launch), batch_first(out), lse.permute(1, 2, 0), dlse,
            self.scores(q_owner, kv_owner, tile, launch.parts),
        )  # fmt: skip
        dq, dk, dv = self.compute(launch, [("dq", q_owner), *(("dkv", keys.owner) for keys in launch.keys)], call)
        of_queries: _Gradients = [(Piece("dq", q_owner, tile.q_start, tile.q_stop), [rows_first(dq)])]
        rows = [len(keys) for keys in launch.keys]
        each = zip(launch.keys, rows_first(dk).split(rows), rows_first(dv).split(rows), strict=True)
        of_keys: _Gradients = [(replace(keys, kind="dkv"), parts) for keys, *parts in each]
        first, self._late = (of_keys, of_queries) if q_owner == self.program.rank else (of_queries, of_keys)
        self._add(first)

    def _add(self, found: _Gradients) -> None:
        for piece, gradients in found:
            self._accumulators[(piece.kind, piece.owner)].add(piece.start, piece.stop, *gradients)

    def combine(self, piece: Piece, arrived: list[Tensor]) -> None:
        """Adds a gradient that came from elsewhere."""
        self._settle_before(piece)
        self._accumulators[(piece.kind, piece.owner)].add(piece.start, piece.stop, *arrived, lent=self.courier.lends)

    def accumulators(self) -> Iterable[Accumulator]:
        """See `Pass.accumulators`."""
        return self._accumulators.values()

    def partial(self, piece: Piece) -> list[Tensor]:
        """The accumulated rows of `piece`."""
        self._settle_before(piece)
        return self._accumulators[(piece.kind, piece.owner)].rows(piece.start, piece.stop)

    def leaves_aside(self, piece: Piece) -> bool:
        """See `Pass.leaves_aside`."""
        return super().leaves_aside(piece) and not self._is_late(piece)

    def _settle_before(self, piece: Piece) -> None:
        if self._is_late(piece):
            self.settle()

    def _is_late(self, piece: Piece) -> bool:
        return any((late.kind, late.owner) == (piece.kind, piece.owner) for late, _ in self._late)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv `[batch, shard, heads, head_dim]`, in the dtypes of q, k and v where they round."""
        rank = self.program.rank
        with self.ending() as results:
            results += [*self._accumulators[("dq", rank)].result(), *self._accumulators[("dkv", rank)].result()]
        dq, dk, dv = results
        return dq, dk, dv
