"""Every rank of a group gives something to every other, all at once, through peer memory: written into the receiver's inbox."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor

from ringspan.attention.landing import Landing, Message, aligned
from ringspan.attention.mail import UnderWay
from ringspan.attention.observe import AFTER, BEFORE, Observer, watch
from ringspan.attention.swap import Arrived, Group, Keeping, Landed, Leaving, Mail, nothing
from ringspan.kernels import AT_ONCE, Copy, copy_all
from ringspan.transport import PeerMemory, Pending, WhenWaited


class _Letter(NamedTuple):
    """What a rank gives, and what reads what it gets for it."""

    own: list[Copy]
    remote: list[Copy]
    arrived: Callable[[bool], None]


@dataclass
class PeerSwapper:
    """Through peer memory: a sender writes into the receiver's inbox, and what lands there is read there.

    All ranks meet when all that lay in their inboxes may be overwritten, once a pass, and when all is there, those of other groups too,
    which swap at the same time: a launch each. To wait for each other rank by itself would take one a rank, and the last of them is waited
    for in any case.

    A link that is slower than the multiprocessors holds up the blocks that write to it. While nothing is computed that does not matter.
    Beside a kernel few blocks write what is to be found among other heads, from before that kernel begins: a copy engine would need it
    packed. What a kernel gave is contiguous, and copy engines write it: blocks would wait for a multiprocessor until then. Few blocks copy
    what is kept, and what came home, as well: the pass would wait for those that wait until there is nothing else to do, and many would
    take all multiprocessors between two rounds of a kernel's blocks, for as long as memory needs. What is kept last is copied while a link
    is waited for.

    Attributes:
        memory: of all ranks of the transport, with room in every inbox for what comes.
        sent: counts the bytes that go to each rank.
        group: who swaps.
    """

    memory: PeerMemory
    sent: Counter[int]
    group: Group
    _beside: list[Pending] = field(default_factory=list)
    _own: list[Copy] = field(default_factory=list)
    _late: list[Copy] = field(default_factory=list)
    _letters: list[_Letter] = field(default_factory=list)
    _gone: list[Pending] = field(default_factory=list)

    def land(self, stages: Sequence[Sequence[Landing]], keeping: Sequence[Keeping], observer: Observer | None) -> list[list[Landed]]:
        """See `Swapper`. All but the first stage comes beside what is computed."""
        self._beside.clear()
        # An error may have left something.
        self._forget()
        self.memory.begin()
        if observer is None:
            landed = self._land(stages, keeping, None)
        else:
            # Whoever looks on sees one after the other.
            now: list[Keeping] = ["beside"] * bool(keeping)
            landed = [each for stage in stages for each in self._land([stage], now, observer)]
        self.memory.end()
        return landed

    def _land(self, stages: Sequence[Sequence[Landing]], keeping: Sequence[Keeping], observer: Observer | None) -> list[list[Landed]]:
        memory, group = self.memory, self.group
        mine = [[self._lying(landing, group.place) for landing in stage] for stage in stages]
        # The caller's stream's, as all that is read after the pass.
        kept = [[[torch.empty_like(each) for each in wholes] * bool(keeping) for wholes in of_stage] for of_stage in mine]
        at_once, *own = (
            [
                copy
                for wholes, landing in zip(of_stage, stage, strict=True)
                for copy in landing.put(wholes, group.place, landing.pieces(group.place))
            ]
            for of_stage, stage in zip(mine, stages, strict=True)
        )
        first, *later = ([copy for other in group.others for landing in stage for copy in self._put(landing, other)] for stage in stages)
        # What this rank gives itself is copied while a link is waited for, as much as one launch can, and the rest with its stage.
        for copies, carried_with in zip(own, later, strict=True):
            (at_once if len(first) + len(at_once) + len(copies) <= AT_ONCE else carried_with).extend(copies)
        for other in group.others:
            self._count(other, [landing.part(group.place, other) for stage in stages for landing in stage])
        carried: list[Pending] = []

        def write() -> None:
            memory.meet()
            copy_all(_mixed(first, at_once))
            carried.extend(memory.beside("carry", partial(copy_all, copies, few=True)) for copies in later)

        self._exchanged(lambda source, target: [landing.part(source, target) for landing in stages[0]], write, observer, BEFORE)
        pending = [nothing, *(memory.beside("arrive", memory.meet, [each]) for each in carried)]
        copied = [nothing] * len(stages)
        if keeping:
            copied = [self._kept(*each, observer) for each in zip(mine, kept, pending, keeping, strict=True)]
        return [
            [Landed(wholes, copies, ready, done) for wholes, copies in zip(of_stage, kept_of_stage, strict=True)]
            for of_stage, kept_of_stage, ready, done in zip(mine, kept, pending, copied, strict=True)
        ]

    def _kept(
        self, mine: list[list[Tensor]], kept: list[list[Tensor]], ready: Pending, when: Keeping, observer: Observer | None
    ) -> Pending:  # fmt: skip
        copies = [copy for of_kept, wholes in zip(kept, mine, strict=True) for copy in zip(of_kept, wholes, strict=True)]
        if when == "last":
            self._late += copies
            return nothing
        keep = partial(copy_all, copies, few=True)
        if observer is None:
            return self.memory.beside("keep", keep, [ready])
        keep()
        return nothing

    def swap(self, mail: Mail, arrived: Arrived, device: torch.device, observer: Observer | None, leaves: Leaving) -> Pending:
        """See `Swapper`."""
        group, memory = self.group, self.memory
        # Memory for what came is the caller's stream's, who keeps it.
        own = [*mail.own()]
        remote: list[Copy] = []
        for other in group.others:
            views = _views(mail, group.place, other, self._room(mail, group.place, other))
            remote += [copy for index, tensors in enumerate(views) for copy in mail.copies(other, index, tensors)]
            self._count(other, mail.messages(group.place, other))
        found = {other: _views(mail, other, group.place, self._room(mail, other, group.place)) for other in group.others}
        letter, gone = _Letter(own, remote, partial(arrived, found)), self._gone
        if observer is None and leaves != "last":
            self._letters.append(letter)
            if leaves == "together":
                # Whatever stream made it, it leaves after that.
                self._beside.append(memory.beside("carry", lambda: None))
            else:
                self._leave()
            # What is read beside must not be freed before.
            return UnderWay(WhenWaited(lambda: gone[0].wait()), [mail, own, remote])
        # Ranks meet in the same order; and what is copied within this rank now was computed on other streams.
        for each in self._beside:
            each.wait()
        earlier, self._own = self._letters, [*self._own, *own]
        if earlier:
            copy_all(_mixed([copy for each in earlier for copy in each.remote], [copy for each in earlier for copy in each.own]))
            memory.meet()

            def read() -> None:
                for each in earlier:
                    each.arrived(False)

            # While the link carries the rest.
            gone.append(memory.beside("arrive", read))
        else:
            gone.append(nothing)
        self._exchanged(mail.messages, partial(copy_all, _mixed(remote, [*self._own, *self._late])), observer, AFTER)
        letter.arrived(False)
        gone[0].wait()
        self._forget()
        return nothing

    def _forget(self) -> None:
        """All has been sent."""
        self._own, self._late, self._letters, self._gone = [], [], [], []

    def _leave(self) -> None:
        """Sends off, beside what is computed, all that was to leave together."""
        letters, gone, memory = self._letters, self._gone, self.memory
        self._letters, self._gone = [], []
        own: list[Copy] = []
        for letter in letters:
            # What this rank gives itself waits until a link is waited for, where that launch has room for it beside the last stage's.
            waits = len(self._own) + 2 * len(letter.own) + len(letter.remote) <= AT_ONCE
            (self._own if waits else own).extend(letter.own)

        def arrive() -> None:
            memory.meet()
            copy_all(own, few=True)
            for letter in letters:
                letter.arrived(True)

        gone.append(memory.beside("arrive", arrive, self._carried(copy for letter in letters for copy in letter.remote)))
        self._beside += gone

    def _exchanged(
        self, messages: Callable[[int, int], Sequence[Message]], write: Callable[[], None], observer: Observer | None, step: int
    ) -> None:
        """Has `messages` written, and waits until all ranks have."""
        swap = None if observer is None else self.group.sizes(messages)
        token = None if observer is None else observer.begin(step, "transfer", swap, nothing)
        with watch(observer, step, "post", swap):
            write()
        with watch(observer, step, "wait", swap):
            self.memory.meet()
        if observer is not None:
            observer.end(token)

    def _carried(self, copies: Iterable[Copy]) -> list[Pending]:
        """The copies, begun beside what is computed."""
        # Rows that follow each other are contiguous within a batch, and then a copy engine's.
        of_batches = [pair for target, source in copies for pair in zip(target.unbind(), source.unbind(), strict=True) if target.numel()]

        def carry() -> None:
            for target, source in of_batches:
                target.copy_(source)

        return [self.memory.beside("carry", carry)] if of_batches else []

    def _lying(self, landing: Landing, target: int) -> list[Tensor]:
        """Where it lands, at `target`."""
        inbox, message = self.memory.inbox(self.group.members[target]), landing.whole(target)
        stop = landing.room + message.nbytes
        assert stop <= inbox.numel(), f"{stop} bytes in an inbox of {inbox.numel()}"
        return message.views(inbox[landing.room : stop])

    def _put(self, landing: Landing, target: int) -> list[Copy]:
        return landing.put(self._lying(landing, target), self.group.place, landing.pieces(target))

    def _count(self, target: int, messages: Sequence[Message]) -> None:
        if nbytes := sum(message.nbytes for message in messages):
            self.sent[self.group.members[target]] += nbytes

    def _room(self, mail: Mail, source: int, target: int) -> Tensor:
        """For what `source` sends to `target`, where it is to lie: after what those of lower places send."""
        sizes = [sum(aligned(message.nbytes) for message in mail.messages(place, target)) for place in range(source + 1) if place != target]
        inbox, stop = self.memory.inbox(self.group.members[target]), mail.room + sum(sizes)
        assert stop <= inbox.numel(), f"{stop} bytes in an inbox of {inbox.numel()}"
        return inbox[stop - sizes[-1] : stop]


def _views(mail: Mail, source: int, target: int, memory: Tensor) -> list[list[Tensor]]:
    """The tensors of what `source` sends to `target`, one message after the other in `memory`."""
    offset, views = 0, []
    for message in mail.messages(source, target):
        views.append(message.views(memory[offset:]))
        offset += aligned(message.nbytes)
    return views


def _mixed(remote: list[Copy], local: list[Copy]) -> list[Copy]:
    """One of each in turn: blocks that a link holds up leave room for others."""
    return [copy for pair in zip_longest(remote, local) for copy in pair if copy is not None]
