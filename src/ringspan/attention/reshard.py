"""The exchange of positions for heads, and back: DeepSpeed-Ulysses' all-to-alls, for any shards and any heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Generic, TypeVar

import torch
from torch import Tensor

from ringspan.attention.landing import Landing, Message, Rooms, width
from ringspan.attention.observe import Observer
from ringspan.attention.swap import Found, Group, Keeping, Landed, Leaving, Mail, Swapper, nothing
from ringspan.geometry import Grid, HeadShare, Layout, rows_within, shared_keys
from ringspan.kernels import Copy, accumulator_dtype, add_, copy_all, rows_first
from ringspan.transport import Pending

Result = TypeVar("Result")
Inputs = tuple[Tensor, Tensor, Tensor]
"""q, k and v."""
OutputGradients = tuple[Tensor, Tensor | None]
"""dO, and that of lse where there is one."""
Into = Callable[[], list[Tensor]]
"""Results of all heads, the same at every call: each stage of the heads fills in its own."""


class Coming(Generic[Result]):
    """What an exchange brings.

    Attributes:
        under_way: what is waited for, with what it reads; nothing after that.
    """

    def __init__(self, pending: Sequence[Pending], result: Callable[[], Result]) -> None:
        self.under_way, self._result = pending, result

    def wait(self) -> Result:
        """Once it is there: what the current stream does from here on comes after it. What it travelled in is let go."""
        pending, self.under_way = self.under_way, ()
        for each in pending:
            each.wait()
        return self._result()


class Heads(Coming[Result]):
    """Tensors of a rank's heads and everyone's rows. They lie where they landed, and may be overwritten once the pass is over."""

    def __init__(self, landed: Sequence[Landed], tensors: Callable[[], Result]) -> None:
        super().__init__([each.pending for each in landed], tensors)
        self._landed = [replace(each, pending=nothing) for each in landed]

    def kept(self) -> list[Tensor]:
        """The same in this rank's own memory, from the pass's end on, if that was asked for. They are there once `settle` was called."""
        return [tensor for each in self._landed for tensor in each.kept]

    def settle(self) -> None:
        """What the current stream does from here on may overwrite what landed."""
        for each in self._landed:
            each.keeping.wait()


def at_hand(tensors: Result, kept: list[Tensor]) -> Heads[Result]:
    """What nobody exchanges."""
    return Heads([Landed(kept, kept, nothing, nothing)], lambda: tensors)


@dataclass(frozen=True)
class Exchange:
    """Who exchanges what within one head group. Every method begins an exchange; that which `wait`s ends it.

    Attributes:
        swapper: carries what the ranks of this rank's head group give each other.
        group: these ranks, by place.
        stages: of each stage of the heads each place's share.
        rooms: of each stage, where in peer memory what travels lies.
        rows: for each place, where its rows lie among the head group's, as `rows_within` tells.
        part_lengths: for each place, how many positions it owns.
        length: how many positions the head group owns.
        leaving: by direction, when what each stage gives leaves.
        keeping: of each stage, when what it was given in a forward is copied for the backward.
        observer: looks on.
    """

    swapper: Swapper
    group: Group
    stages: tuple[tuple[HeadShare, ...], ...]
    rooms: tuple[Rooms, ...]
    rows: tuple[tuple[tuple[slice, slice], ...], ...]
    part_lengths: tuple[int, ...]
    length: int
    leaving: Mapping[str, tuple[Leaving, ...]]
    keeping: tuple[Keeping, ...]
    observer: Observer | None = None

    @property
    def place(self) -> int:
        """This rank's in its head group."""
        return self.group.place

    @cached_property
    def q_heads(self) -> list[list[slice]]:
        """Of each stage each place's query heads."""
        return [[slice(share.q_start, share.q_stop) for share in shares] for shares in self.stages]

    @cached_property
    def kv_heads(self) -> list[list[slice]]:
        """Of each stage each place's key heads."""
        return [[slice(share.kv_start, share.kv_stop) for share in shares] for shares in self.stages]

    def key_gradients_in(self, dtype: torch.dtype, stage: int, place: int | None = None) -> torch.dtype:
        """What dk and dv of keys in `dtype` travel in from `place` (this rank's, if not given) to their owners.

        A place that alone has its key heads has their whole gradient, and rounds it. Of a head that several places share each has a part,
        which the owner adds up: parts stay in the accumulator's precision, so that the sum alone is rounded.
        """
        shared = shared_keys(self.stages[stage])[self.place if place is None else place]
        return accumulator_dtype(dtype) if shared else dtype

    def inputs_to_heads(self, q: Tensor, k: Tensor, v: Tensor, keep: bool) -> list[Heads[Inputs]]:
        """`[batch, own rows, all heads, head_dim]` to `[batch, group's rows, own heads, head_dim]`, stage by stage; `keep`: to be kept."""
        stages = [
            [self._landing([q, k, v], [queries, keys, keys], rooms.inputs)]
            for queries, keys, rooms in zip(self.q_heads, self.kv_heads, self.rooms, strict=True)
        ]

        def all_three(tensors: list[Tensor]) -> Inputs:
            return tensors[0], tensors[1], tensors[2]

        landings = self.swapper.land(stages, self.keeping if keep else (), self.observer)
        return [Heads(landed, partial(all_three, landed[0].tensors)) for landed in landings]

    def outputs_to_positions(self, stage: int, out: Tensor, lse: Tensor | None, into: Into) -> Coming[tuple[Tensor, Tensor | None]]:
        """out, and lse `[batch, heads, rows]` where it is wanted, of own heads and the group's rows to those of own rows and all heads.

        `into`: out, and lse `[batch, own rows, heads]` where it is wanted.
        """
        places, pending, rooms = len(self.stages[stage]), [], self.rooms[stage]
        leaves = self.leaving["forward"][stage]
        every = (out, rooms.outputs), (None if lse is None else lse.transpose(1, 2), rooms.lse)
        for index, (each, room) in enumerate(every):
            if each is not None:
                sent = [[each.dtype] * places]
                one_of_them = partial(_one, into, index)
                pending.append(self._to_positions(stage, [each], [self.q_heads[stage]], sent, one_of_them, room, leaves))
        return Coming(pending, lambda: (into()[0], None if lse is None else into()[1].transpose(1, 2)))

    def output_gradients_to_heads(self, dout: Tensor, dlse: Tensor | None) -> list[Heads[OutputGradients]]:
        """The gradients of what `outputs_to_positions` returned to those of what it was given, stage by stage."""
        stages = [
            [self._landing([dout], [queries], rooms.output_gradients)]
            + ([] if dlse is None else [self._landing([dlse.transpose(1, 2)], [queries], rooms.lse_gradients)])
            for queries, rooms in zip(self.q_heads, self.rooms, strict=True)
        ]

        def both(of_dout: list[Tensor], *of_dlse: list[Tensor]) -> OutputGradients:
            return of_dout[0], of_dlse[0][0].transpose(1, 2) if of_dlse else None

        landed = self.swapper.land(stages, (), self.observer)
        return [Heads(of_stage, partial(both, *(each.tensors for each in of_stage))) for of_stage in landed]

    def input_gradients_to_positions(
        self, stage: int, dq: Tensor, dk: Tensor, dv: Tensor, into: Into
    ) -> Coming[tuple[Tensor, Tensor, Tensor]]:
        """The gradients of what `inputs_to_heads` brought to those of what it was given, all in the dtype of `dq`.

        `dk` and `dv` are in `key_gradients_in` that dtype. What several places made of a key head is added.
        """
        places = len(self.stages[stage])
        keys = [self.key_gradients_in(dq.dtype, stage, place) for place in range(places)]
        split = [self.q_heads[stage], self.kv_heads[stage], self.kv_heads[stage]]
        sent, leaves = [[dq.dtype] * places, keys, keys], self.leaving["backward"][stage]
        pending = self._to_positions(stage, [dq, dk, dv], split, sent, into, self.rooms[stage].gradients, leaves)
        return Coming([pending], lambda: (into()[0], into()[1], into()[2]))

    def _landing(self, mine: list[Tensor], heads: list[list[slice]], room: int) -> Landing:
        return Landing(mine, heads, self.rows, self.part_lengths, self.length, room)

    def _to_positions(
        self, stage: int, wholes: list[Tensor], heads: list[list[slice]], sent: list[list[torch.dtype]], into: Into, room: int,
        leaves: Leaving,
    ) -> Pending:  # fmt: skip
        """The way back: heads that several places have add up.

        Args:
            stage: whose heads these are.
            wholes: `[batch, group's rows, own heads, …]` each.
            heads: `heads[i][place]`, those of tensor i that a place has.
            sent: `sent[i][place]`, the dtype that tensor i has there, in which it travels.
            into: the results `[batch, own rows, all heads, …]`.
            room: where it travels in peer memory.
            leaves: when.
        """
        batch, rest = wholes[0].shape[0], wholes[0].shape[3:]
        # What is of one dtype at a place travels from there as one message.
        alike = [_alike([of_tensor[place] for of_tensor in sent]) for place in range(len(self.group.members))]

        def messages(source: int, target: int) -> Sequence[Message]:
            rows = batch, self.part_lengths[target]
            return [Message(tuple((*rows, width(heads[i][source]), *rest) for i in same), sent[same[0]][source]) for same in alike[source]]

        def copies(target: int, index: int, segments: list[Tensor]) -> list[Copy]:
            return [
                (segment[:, part_rows], wholes[i][:, whole_rows])
                for segment, i in zip(segments, alike[self.place][index], strict=True)
                for part_rows, whole_rows in self.rows[target]
            ]

        def of_own(i: int) -> list[tuple[slice, Tensor]]:
            return [(part_rows, wholes[i][:, whole_rows]) for part_rows, whole_rows in self.rows[self.place]]

        def own() -> list[Copy]:
            alone = [i for i, of_tensor in enumerate(heads) if _sharers(of_tensor, self.place) == [self.place]]
            return [(into()[i][:, rows, heads[i][self.place]], part) for i in alone for rows, part in of_own(i)]

        def arrived(found: Found, few: bool) -> None:
            late: list[Copy] = []
            for i, of_tensor in enumerate(heads):
                came = {place: self._came(i, alike[place], tensors) for place, tensors in found.items()}
                for place, of_place in enumerate(of_tensor):
                    sharers, here = _sharers(of_tensor, place), into()[i][:, :, of_place]
                    if sharers == [place]:
                        late += [(here, came[place])] if place != self.place else []
                    elif place == sharers[0] and width(of_place):
                        # In the order of the places: the same at every run. Of the first two either may be, and one that came has all rows.
                        first, *others = sharers if place != self.place else [sharers[1], place, *sharers[2:]]
                        parts: list[tuple[int, Tensor]] = []
                        for other in others:
                            parts += [(rows.start, part) for rows, part in of_own(i)] if other == self.place else [(0, came[other])]
                        add_(rows_first(came[first]), [(start, rows_first(part)) for start, part in parts], into=rows_first(here))
            copy_all(late, few)

        return self.swapper.swap(Mail(messages, copies, own, room), arrived, wholes[0].device, self.observer, leaves)

    @staticmethod
    def _came(i: int, alike: list[list[int]], tensors: list[list[Tensor]]) -> Tensor:
        """What came of tensor i in the messages of one place."""
        return next(of_message[same.index(i)] for same, of_message in zip(alike, tensors, strict=True) if i in same)


def make_exchange(
    swapper: Swapper, group: Group, grid: Grid, layout: Layout, merged: Layout, stages: tuple[tuple[HeadShare, ...], ...],
    rooms: tuple[Rooms, ...], leaving: Mapping[str, tuple[Leaving, ...]], keeping: tuple[Keeping, ...],
) -> Exchange:  # fmt: skip
    """The exchange of the rank of `group`, where each place has the heads in `stages`, some after the others; the rest: see `Exchange`."""
    mine = grid.group(group.members[group.place])
    return Exchange(
        swapper,
        group,
        stages,
        rooms,
        tuple(tuple(rows_within(layout.shards[rank], merged.shards[mine])) for rank in group.members),
        tuple(layout.shard_length(rank) for rank in group.members),
        merged.shard_length(mine),
        leaving,
        keeping,
    )


def head_group(grid: Grid, rank: int) -> Group:
    """Who `rank` exchanges with."""
    return Group(grid.head_group(grid.group(rank)), grid.place(rank))


def _one(into: Into, index: int) -> list[Tensor]:
    """One of the results alone."""
    return [into()[index]]


def _sharers(heads: list[slice], place: int) -> list[int]:
    """All places that have the heads that `place` has."""
    return [other for other, theirs in enumerate(heads) if theirs == heads[place]]


def _alike(dtypes: list[torch.dtype]) -> list[list[int]]:
    """Indices of `dtypes` by dtype, each dtype where it first stands."""
    return [[i for i, other in enumerate(dtypes) if other == dtype] for dtype in dict.fromkeys(dtypes)]
