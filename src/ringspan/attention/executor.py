"""The executor: runs one rank's program on real tensors, forward and backward, over any transport and with any kernel.

A step posts its transfers, launches its kernels while they travel, and then waits for what the next step needs: communication under
computation, for every strategy, because the schedule says so.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ringspan.attention.observe import Observer, watch
from ringspan.attention.program import LANES, Batch, Launch, RankProgram
from ringspan.attention.scoring import TileScores
from ringspan.attention.shelf import Accumulator, Shelf
from ringspan.kernels import Kernel, accumulator_dtype, batch_first, merge_, rows_first
from ringspan.schedule import Piece, Receive, Send
from ringspan.transport import Parcel, Pending, Transport


class Pass:
    """One run of one direction. Subclasses say what a launch computes and what a combine does.

    Args:
        program: this rank's resolved program.
        transport: moves the pieces.
        scores: makes the scores of each tile.
    """

    def __init__(self, program: RankProgram, transport: Transport, scores: TileScores) -> None:
        self.program, self.transport, self.scores = program, transport, scores
        self.shelf = Shelf()
        self._arrived: dict[tuple[Piece, int], list[Tensor]] = {}

    def run(self, observer: Observer | None = None) -> None:
        """All steps of the program, an `observer` looking on."""
        # Parcels stay in the list until they are over, so that nothing under way is freed.
        waiting: list[tuple[Batch, Pending, list[Parcel], Any]] = []
        for index, step in enumerate(self.program.steps):
            for combine in step.combines:
                with watch(observer, index, "merge", combine):
                    self.combine(combine.piece, self._arrived.pop((combine.piece, combine.peer)))
            for batch in step.batches:
                with watch(observer, index, "post", batch):
                    sends = [Parcel(tensor, send.peer) for send in batch.sends for tensor in self._outgoing(send)]
                    receives = [Parcel(tensor, receive.peer) for receive in batch.receives for tensor in self._incoming(receive)]
                    pending = self.transport.exchange(sends, receives, batch.lane)
                token = None if observer is None else observer.begin(index, "transfer", batch, pending)
                waiting.append((batch, pending, sends + receives, token))
            for launch in step.launches:
                with watch(observer, index, "attend", launch):
                    self.attend(launch)
            for batch, pending, _, token in waiting:
                if batch.due <= index + 1:
                    with watch(observer, index, "wait", batch):
                        pending.wait()
                    if observer is not None:
                        observer.end(token)
            waiting = [entry for entry in waiting if entry[0].due > index + 1]
            for piece in step.releases:
                self.shelf.drop(piece)

    def _outgoing(self, send: Send) -> list[Tensor]:
        if LANES[send.piece.kind] == 0:
            return [tensor.contiguous() for tensor in self.shelf.view(send.piece)]
        return self.partial(send.piece)

    def _incoming(self, receive: Receive) -> list[Tensor]:
        tensors = self.empty(receive.piece)
        if LANES[receive.piece.kind] == 0:
            self.shelf.put(receive.piece, tensors)
        else:
            self._arrived[(receive.piece, receive.peer)] = tensors
        return tensors

    def attend(self, launch: Launch) -> None:
        """Computes one tile into this rank's accumulators."""
        raise NotImplementedError

    def combine(self, piece: Piece, arrived: list[Tensor]) -> None:
        """Takes in a partial that came from elsewhere."""
        raise NotImplementedError

    def partial(self, piece: Piece) -> list[Tensor]:
        """What this rank has accumulated of `piece`, to be sent."""
        raise NotImplementedError

    def empty(self, piece: Piece) -> list[Tensor]:
        """Buffers for `piece` to arrive in."""
        raise NotImplementedError


class ForwardPass(Pass):
    """q, k, v `[batch, shard, heads, head_dim]` to `out` and `lse`. See `Pass` for the other arguments."""

    def __init__(
        self, program: RankProgram, kernel: Kernel, transport: Transport, scores: TileScores, q: Tensor, k: Tensor, v: Tensor
    ) -> None:
        super().__init__(program, transport, scores)
        self.kernel = kernel
        self.wide = accumulator_dtype(q.dtype)
        self._q, self._k = q, k
        rank = program.rank
        self.shelf.put(Piece("q", rank, 0, q.shape[1]), [rows_first(q)])
        self.shelf.put(Piece("kv", rank, 0, k.shape[1]), [pack(k, v, program)])
        self._partials: dict[int, tuple[Piece, Tensor, Tensor]] = {}
        self._fresh: set[int] = set()
        spans = {**program.accumulators, ("o", rank): (0, q.shape[1])}
        for (_, owner), (start, stop) in spans.items():
            out, lse = self.empty(Piece("o", owner, start, stop))
            self._fresh.add(owner)
            self._partials[owner] = (Piece("o", owner, start, stop), out, lse)

    def attend(self, launch: Launch) -> None:
        """Merges the tile's partial attention into the partial of its queries' owner."""
        q_owner, kv_owner, tile = launch.q_owner, launch.kv_owner, launch.tile
        (q,) = self.shelf.view(Piece("q", q_owner, tile.q_start, tile.q_stop))
        (kv,) = self.shelf.view(Piece("kv", kv_owner, tile.k_start, tile.k_stop))
        out, lse = self.kernel.forward(batch_first(q), batch_first(kv[:, 0]), batch_first(kv[:, 1]), self.scores(q_owner, kv_owner, tile))
        self._merge(q_owner, tile.q_start, tile.q_stop, rows_first(out), lse.permute(2, 0, 1))

    def combine(self, piece: Piece, arrived: list[Tensor]) -> None:
        """Merges a partial that another rank computed."""
        self._merge(piece.owner, piece.start, piece.stop, *arrived)

    def partial(self, piece: Piece) -> list[Tensor]:
        """`out` and `lse` of the rows of `piece`."""
        whole, out, lse = self._partials[piece.owner]
        if piece.owner in self._fresh:
            self._fresh.remove(piece.owner)
            out.zero_()
            lse.fill_(float("-inf"))
        rows = slice(piece.start - whole.start, piece.stop - whole.start)
        return [out[rows], lse[rows]]

    def empty(self, piece: Piece) -> list[Tensor]:
        """Buffers for visiting q, kv or o."""
        batch, heads = self._q.shape[0], self._q.shape[2:]
        if piece.kind == "kv":
            return [self._k.new_empty((len(piece), 2, batch, *self._k.shape[2:]))]
        if piece.kind == "q":
            return [self._q.new_empty((len(piece), batch, *heads))]
        return [self._q.new_empty((len(piece), batch, *heads[:width]), dtype=self.wide) for width in (2, 1)]

    def result(self) -> tuple[Tensor, Tensor]:
        """`out [batch, shard, heads, head_dim]` in the dtype of q, `lse [batch, heads, shard]`."""
        out, lse = self.partial(Piece("o", self.program.rank, 0, self._q.shape[1]))
        return batch_first(out).to(self._q.dtype).contiguous(), lse.permute(1, 2, 0).contiguous()

    def _merge(self, owner: int, start: int, stop: int, out: Tensor, lse: Tensor) -> None:
        whole, whole_out, whole_lse = self._partials[owner]
        if owner in self._fresh and (start, stop) == (whole.start, whole.stop):
            self._fresh.remove(owner)
            whole_out.copy_(out)
            whole_lse.copy_(lse)
            return
        into_out, into_lse = self.partial(Piece("o", owner, start, stop))
        merge_(into_out, into_lse, out, lse.to(self.wide))


class BackwardPass(Pass):
    """dO and what the forward saved to dq, dk, dv. `dlse` is None where nothing depends on lse."""

    def __init__(
        self, program: RankProgram, kernel: Kernel, transport: Transport, scores: TileScores,
        q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None,
    ) -> None:  # fmt: skip
        super().__init__(program, transport, scores)
        self.kernel = kernel
        self.wide = accumulator_dtype(q.dtype)
        self._q, self._k = q, k
        rank, rows = program.rank, q.shape[1]
        stats = [lse.permute(2, 0, 1)] + ([] if dlse is None else [dlse.permute(2, 0, 1)])
        self.shelf.put(Piece("q", rank, 0, rows), [rows_first(q)])
        self.shelf.put(Piece("kv", rank, 0, k.shape[1]), [pack(k, v, program)])
        self.shelf.put(Piece("do", rank, 0, rows), [rows_first(dout), rows_first(out), *stats])
        self._accumulators: dict[tuple[str, int], Accumulator] = {}
        spans = {**program.accumulators, ("dq", rank): (0, rows), ("dkv", rank): (0, k.shape[1])}
        for (kind, owner), (start, stop) in spans.items():
            piece = Piece(kind, owner, start, stop)
            self._accumulators[(kind, owner)] = Accumulator(piece, self.empty(piece)[0])

    def attend(self, launch: Launch) -> None:
        """Adds the tile's share of dq, dk and dv."""
        q_owner, kv_owner, tile = launch.q_owner, launch.kv_owner, launch.tile
        (q,) = self.shelf.view(Piece("q", q_owner, tile.q_start, tile.q_stop))
        (kv,) = self.shelf.view(Piece("kv", kv_owner, tile.k_start, tile.k_stop))
        dout, out, lse, *dlse = self.shelf.view(Piece("do", q_owner, tile.q_start, tile.q_stop))
        dlse = dlse[0].permute(1, 2, 0) if dlse else None
        dq, dk, dv = self.kernel.backward(
            batch_first(dout), batch_first(q), batch_first(kv[:, 0]), batch_first(kv[:, 1]), batch_first(out),
            lse.permute(1, 2, 0), dlse, self.scores(q_owner, kv_owner, tile),
        )  # fmt: skip
        self._accumulators[("dq", q_owner)].add(tile.q_start, tile.q_stop, rows_first(dq))
        self._accumulators[("dkv", kv_owner)].add(tile.k_start, tile.k_stop, rows_first(dk), rows_first(dv))

    def combine(self, piece: Piece, arrived: list[Tensor]) -> None:
        """Adds a gradient that came from elsewhere."""
        self._accumulators[(piece.kind, piece.owner)].add(piece.start, piece.stop, arrived[0])

    def partial(self, piece: Piece) -> list[Tensor]:
        """The accumulated rows of `piece`."""
        return [self._accumulators[(piece.kind, piece.owner)].rows(piece.start, piece.stop)]

    def empty(self, piece: Piece) -> list[Tensor]:
        """Buffers for visiting q, kv, do, and for dq and dkv."""
        batch, heads = self._q.shape[0], self._q.shape[2:]
        kv = (len(piece), 2, batch, *self._k.shape[2:])
        match piece.kind:
            case "kv":
                return [self._k.new_empty(kv)]
            case "dkv":
                return [self._k.new_empty(kv, dtype=self.wide)]
            case "dq":
                return [self._q.new_empty((len(piece), batch, *heads), dtype=self.wide)]
            case "q":
                return [self._q.new_empty((len(piece), batch, *heads))]
        rows = [self._q.new_empty((len(piece), batch, *heads)) for _ in range(2)]
        own = self.shelf.view(Piece("do", self.program.rank, 0, 0))
        return rows + [self._q.new_empty((len(piece), batch, heads[0]), dtype=self.wide) for _ in own[2:]]

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv `[batch, shard, heads, head_dim]` in the dtypes of q, k and v."""
        rank = self.program.rank
        dq = self._accumulators[("dq", rank)].rows(0, self._q.shape[1])
        dkv = self._accumulators[("dkv", rank)].rows(0, self._k.shape[1])
        dk, dv = (batch_first(dkv[:, index]).to(self._k.dtype).contiguous() for index in (0, 1))
        return batch_first(dq).to(self._q.dtype).contiguous(), dk, dv


def pack(k: Tensor, v: Tensor, program: RankProgram) -> Tensor:
    """k and v as one `[rows, 2, batch, kv_heads, head_dim]` buffer, so that any span of both is one contiguous transfer."""
    return torch.stack((rows_first(k), rows_first(v)), 1)
