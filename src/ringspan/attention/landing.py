"""What lands where while positions are exchanged for heads: the same on every rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ringspan.attention.inbox import ALIGNMENT
from ringspan.geometry import Grid, HeadShare, Layout, shared_keys
from ringspan.kernels import Copy, accumulator_dtype


class Message(NamedTuple):
    """What one message holds: tensors of `shapes`, one after the other, all of `dtype`."""

    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Of all of them."""
        return sum(map(math.prod, self.shapes)) * self.dtype.itemsize

    def views(self, memory: Tensor) -> list[Tensor]:
        """The tensors in the first bytes of `memory`, uint8."""
        flat = memory[: self.nbytes].view(self.dtype)
        sizes = [math.prod(shape) for shape in self.shapes]
        return [part.view(shape) for part, shape in zip(flat.split(sizes), self.shapes, strict=True)]


@dataclass(frozen=True)
class Landing:
    """Tensors of one dtype, of all rows and few heads, that each member puts together out of what all members have of them.

    Attributes:
        mine: what this rank has, `[batch, own rows, all heads, …]` each.
        heads: for each tensor, by place, the heads that a member puts together.
        rows: by place, where a member's rows lie among all: (of the member's, of all), as `rows_within` tells.
        part_lengths: by place, how many rows a member has.
        length: how many there are in all.
        room: the first byte in every inbox.
    """

    mine: Sequence[Tensor]
    heads: Sequence[Sequence[slice]]
    rows: Sequence[Sequence[tuple[slice, slice]]]
    part_lengths: Sequence[int]
    length: int
    room: int

    def whole(self, place: int) -> Message:
        """What the member at `place` puts together."""
        return self._of(place, self.length)

    def part(self, source: int, target: int) -> Message:
        """What `source` has of what `target` puts together."""
        return self._of(target, self.part_lengths[source])

    def pieces(self, target: int) -> list[Tensor]:
        """What this rank has of it."""
        return [tensor[:, :, of_tensor[target]] for tensor, of_tensor in zip(self.mine, self.heads, strict=True)]

    def put(self, wholes: Sequence[Tensor], source: int, parts: Sequence[Tensor]) -> list[Copy]:
        """Copies of the parts of `source` to where they belong."""
        return [
            (whole[:, whole_rows], part[:, part_rows])
            for whole, part in zip(wholes, parts, strict=True)
            for part_rows, whole_rows in self.rows[source]
        ]

    def _of(self, place: int, rows: int) -> Message:
        batch, _, _, *rest = self.mine[0].shape
        return Message(tuple((batch, rows, width(each[place]), *rest) for each in self.heads), self.mine[0].dtype)


@dataclass(frozen=True)
class Rooms:
    """Where in every inbox what one stage of heads exchanges begins, in bytes.

    Forward: `inputs`, then `outputs` and `lse`. Backward: `output_gradients` and `lse_gradients`, then `gradients`.
    """

    inputs: int
    outputs: int
    lse: int
    output_gradients: int
    lse_gradients: int
    gradients: int


def make_rooms(
    grid: Grid, layout: Layout, merged: Layout, q: Tensor, stages: Sequence[Sequence[HeadShare]],
    differentiable: bool = True,
) -> tuple[tuple[Rooms, ...], int]:  # fmt: skip
    """The rooms of each of `stages`, by place the heads, of q `[batch, shard, heads, head_dim]`; and where they end.

    Those of a backward are no rooms where none comes.

    Room for what the largest rank gets: every rank has the same. Nothing of a pass lies where something else of it does, so that ranks say
    once in a pass that all they have may be written.
    """
    batch, head_dim = q.shape[0], q.shape[3]
    element, accumulated = q.element_size(), accumulator_dtype(q.dtype).itemsize
    all_rows, rows = batch * max(merged.shard_lengths), batch * max(layout.shard_lengths)
    found, start = [], 0
    for shares in stages:
        queries, keys = (max(getattr(share, which) for share in shares) for which in ("heads", "kv_heads"))
        query, key, lse = queries * head_dim * element, keys * head_dim * element, queries * accumulated
        # Parts of the gradient of a key head that several ranks have are sums.
        key_gradient = keys * head_dim * (accumulated if any(shared_keys(tuple(shares))) else element)
        # What is put together there, and what lies by its sender.
        inputs, douts, dlse = (aligned(all_rows * size) for size in (query + 2 * key, query, lse))
        outputs, lses, dq, keys_back = ((grid.degree - 1) * aligned(rows * size) for size in (query, lse, query, 2 * key_gradient))
        found.append(Rooms(start, start + inputs, start + inputs + outputs, start, start + douts, start + douts + dlse))
        start += max(inputs + outputs + lses, (douts + dlse + dq + keys_back) * differentiable)
    return tuple(found), start


def width(heads: slice) -> int:
    """How many there are."""
    return heads.stop - heads.start


def aligned(nbytes: int) -> int:
    """Where the next message begins."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
