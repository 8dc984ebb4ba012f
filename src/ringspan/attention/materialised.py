"""Ring Self-Attention's passes: a shard's scores against the whole sequence are kept between the ring of keys and that of values.

Li et al. (2105.13120). One of the two places where scores exist as a tensor (the other is the reference kernel); there to be compared with.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ringspan.attention.accumulate import Accumulator
from ringspan.attention.executor import Pass
from ringspan.attention.mail import Component, Courier
from ringspan.attention.program import Launch, RankProgram
from ringspan.attention.scoring import TileScores
from ringspan.attention.streams import OneStream
from ringspan.errors import UnsupportedError
from ringspan.kernels import accumulator_dtype, batch_first, rows_first
from ringspan.schedule import Piece

Blocks = dict[int, Tensor]
"""By owner of the keys: `[batch, heads, own queries, owner's keys]`."""


class _MaterialisedPass(Pass):
    """What both directions share: k and v apart, rows first, and grouped heads."""

    def __init__(self, program: RankProgram, courier: Courier, scores: TileScores, q: Tensor, k: Tensor, v: Tensor) -> None:
        super().__init__(program, courier, scores, OneStream())
        self.wide = accumulator_dtype(q.dtype)
        self._q, self._k = q, k
        rank = program.rank
        self.shelf.put(Piece("q", rank, 0, q.shape[1]), [rows_first(q)])
        self.shelf.put(Piece("k", rank, 0, k.shape[1]), [rows_first(k)])
        self.shelf.put(Piece("v", rank, 0, v.shape[1]), [rows_first(v)])
        self.lengths = scores.shard_lengths

    def components(self, piece: Piece, single: bool) -> list[Component]:
        """Of visiting k and v, and of gradients."""
        like = self._q if piece.kind in ("q", "dq", "o") else self._k
        dtype = like.dtype if piece.kind in ("q", "k", "v") else self.wide
        return [Component((len(piece), like.shape[0], *like.shape[2:]), dtype)]

    def keys(self, launch: Launch) -> Tensor:
        """The k or v of a launch, wide, expanded to the query heads: `[batch, keys, heads, head_dim]`."""
        (rows,) = self.shelf.view(Piece(launch.kind, launch.kv_owner, launch.tile.k_start, launch.tile.k_stop))
        return batch_first(rows).to(self.wide).repeat_interleave(self._q.shape[2] // self._k.shape[2], 2)

    def allowed(self, launch: Launch) -> Tensor | None:
        """Which pairs of a launch's tile are allowed; None for all."""
        scores = self.scores(launch.q_owner, launch.kv_owner, launch.tile)
        return scores.allowed(slice(0, launch.tile.num_queries), self._q.shape[0], self._q.shape[2], self._q.device)

    def ungrouped(self, gradient: Tensor) -> Tensor:
        """The gradient of `keys`, summed over the query heads of each key head, rows first."""
        return rows_first(gradient.unflatten(2, (self._k.shape[2], -1)).sum(3))

    def blocks(self, value: float) -> Blocks:
        """A block of `value` for each owner."""
        batch, rows, heads, _ = self._q.shape
        return {owner: self._q.new_full((batch, heads, rows, length), value, dtype=self.wide) for owner, length in enumerate(self.lengths)}


def _masked(block: Tensor, allowed: Tensor | None, value: float) -> Tensor:
    return block if allowed is None else block.masked_fill(~allowed, value)


class MaterialisedForward(_MaterialisedPass):
    """q, k, v to out, lse and the attention weights, which the backward reads."""

    def __init__(self, program: RankProgram, courier: Courier, scores: TileScores, q: Tensor, k: Tensor, v: Tensor) -> None:
        super().__init__(program, courier, scores, q, k, v)
        self._scores = self.blocks(float("-inf"))
        self.weights: Blocks | None = None
        self.lse = q.new_empty(0)
        rank = program.rank
        self._out = Accumulator(Piece("o", rank, 0, q.shape[1]), q, program.additions[("o", rank)], rounds=False)

    def attend(self, launch: Launch) -> None:
        """With k: scores. With v: the weights, which the first of these completes, times v."""
        tile = launch.tile
        rows, columns = slice(tile.q_start, tile.q_stop), slice(tile.k_start, tile.k_stop)
        if launch.kind == "k":
            block = torch.einsum("bqhd,bkhd->bhqk", self._q[:, rows].to(self.wide), self.keys(launch)) * self.scores.scoring.scale
            block = _masked(block, self.allowed(launch), float("-inf"))
            # Tiles of a block are disjoint in their allowed pairs and may overlap as rectangles: −inf must not wipe out a score.
            self._scores[launch.kv_owner][:, :, rows, columns] = torch.maximum(self._scores[launch.kv_owner][:, :, rows, columns], block)
            return
        weights = _masked(self.softmax()[launch.kv_owner][:, :, rows, columns], self.allowed(launch), 0)
        self._out.add(tile.q_start, tile.q_stop, rows_first(torch.einsum("bhqk,bkhd->bqhd", weights, self.keys(launch))))

    def accumulators(self) -> Iterable[Accumulator]:
        """See `Pass.accumulators`."""
        return [self._out]

    def softmax(self) -> Blocks:
        """The weights of every block, from the complete rows."""
        if self.weights is None:
            self.lse = torch.logsumexp(torch.cat(list(self._scores.values()), -1), -1)
            finite = torch.where(torch.isneginf(self.lse), torch.zeros_like(self.lse), self.lse).unsqueeze(-1)
            self.weights = {owner: torch.exp(block - finite) for owner, block in self._scores.items()}
            self._scores.clear()
        return self.weights

    def result(self) -> tuple[Tensor, Tensor]:
        """`out [batch, shard, heads, head_dim]` and `lse [batch, heads, shard]`, both in the accumulator's precision."""
        self.softmax()
        return self._out.result()[0], self.lse


class MaterialisedBackward(_MaterialisedPass):
    """dO and the kept weights to dq, dk, dv: first the ring of values, for dV and dP, then that of keys, for dQ and dK."""

    def __init__(
        self, program: RankProgram, courier: Courier, scores: TileScores, q: Tensor, k: Tensor, v: Tensor,
        out: Tensor, weights: Blocks, dout: Tensor, dlse: Tensor | None,
    ) -> None:  # fmt: skip
        super().__init__(program, courier, scores, q, k, v)
        rank = program.rank
        self._dout, self._weights = dout.to(self.wide), weights
        delta = (self._dout * out.to(self.wide)).sum(-1).transpose(1, 2)
        self._delta = (delta if dlse is None else delta - dlse).unsqueeze(-1)
        self._dweights = self.blocks(0.0)
        self._accumulators: dict[tuple[str, int], Accumulator] = {}
        own = {("dq", rank): (0, q.shape[1]), ("dk", rank): (0, k.shape[1]), ("dv", rank): (0, k.shape[1])}
        for (kind, owner), (start, stop) in {**program.accumulators, **own}.items():
            self._accumulators[(kind, owner)] = Accumulator(
                Piece(kind, owner, start, stop), q if kind == "dq" else k, program.additions[(kind, owner)], rounds=False
            )

    def attend(self, launch: Launch) -> None:
        """With v: dP of the block, and dV. With k: dS from it, and dQ and dK."""
        tile, owner = launch.tile, launch.kv_owner
        rows, columns = slice(tile.q_start, tile.q_stop), slice(tile.k_start, tile.k_stop)
        allowed = self.allowed(launch)
        weights = _masked(self._weights[owner][:, :, rows, columns], allowed, 0)
        if launch.kind == "v":
            dweights = torch.einsum("bqhd,bkhd->bhqk", self._dout[:, rows], self.keys(launch))
            self._dweights[owner][:, :, rows, columns] += _masked(dweights, allowed, 0)
            dv = self.ungrouped(torch.einsum("bhqk,bqhd->bkhd", weights, self._dout[:, rows]))
            self._accumulators[("dv", owner)].add(tile.k_start, tile.k_stop, dv)
            return
        dscores = weights * (self._dweights[owner][:, :, rows, columns] - self._delta[:, :, rows]) * self.scores.scoring.scale
        dq = rows_first(torch.einsum("bhqk,bkhd->bqhd", dscores, self.keys(launch)))
        self._accumulators[("dq", self.program.rank)].add(tile.q_start, tile.q_stop, dq)
        dk = self.ungrouped(torch.einsum("bhqk,bqhd->bkhd", dscores, self._q[:, rows].to(self.wide)))
        self._accumulators[("dk", owner)].add(tile.k_start, tile.k_stop, dk)

    def combine(self, piece: Piece, arrived: list[Tensor]) -> None:
        """Adds a gradient that came from elsewhere."""
        self._accumulators[(piece.kind, piece.owner)].add(piece.start, piece.stop, arrived[0], lent=self.courier.lends)

    def accumulators(self) -> Iterable[Accumulator]:
        """See `Pass.accumulators`."""
        return self._accumulators.values()

    def partial(self, piece: Piece) -> list[Tensor]:
        """The accumulated rows of `piece`."""
        return self._accumulators[(piece.kind, piece.owner)].rows(piece.start, piece.stop)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv of this rank's shard, in the accumulator's precision."""
        dq, dk, dv = (self._accumulators[(kind, self.program.rank)].result()[0] for kind in ("dq", "dk", "dv"))
        return dq, dk, dv


def check_materialised(kernel: str, softcap: float | None, sinks: Tensor | None) -> None:
    """Ring Self-Attention computes its scores itself.

    Raises:
        UnsupportedError: for a kernel of its own, a softcap or sinks.
    """
    given = {f"kernel={kernel!r}": kernel not in ("auto", "reference"), "softcap": softcap is not None, "sinks": sinks is not None}
    asked = [name for name, is_given in given.items() if is_given]
    if asked:
        raise UnsupportedError(
            f"strategy 'ring_self_attention' with {', '.join(asked)}",
            "it is the baseline of 2021, kept for comparison",
            "It materialises plain softmax scores itself",
            "strategy='ring'",
        )
