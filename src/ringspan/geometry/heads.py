"""Heads shared over ranks: any number of heads, fewer key heads than ranks, uneven shares."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from ringspan.geometry.span import split_evenly


@dataclass(frozen=True, slots=True)
class HeadShare:
    """Query heads `[q_start, q_stop)` and the key heads `[kv_start, kv_stop)` that they attend to; the latter divide the former evenly."""

    q_start: int
    q_stop: int
    kv_start: int
    kv_stop: int

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.q_stop - self.q_start

    @property
    def kv_heads(self) -> int:
        """Key and value heads."""
        return self.kv_stop - self.kv_start


def head_shares(heads: int, kv_heads: int, ranks: int) -> tuple[HeadShare, ...]:
    """Each rank's share of `heads` query heads in groups around `kv_heads` key heads.

    With enough key heads, whole groups are shared as evenly as they go. With fewer, the ranks are shared among the key heads, and those of
    one key head share its query heads: each of them receives that key head. A rank may get no head.

    Nine query heads and three key heads on two ranks: six and three. Eight and two on four ranks: two each, key heads 0 0 1 1.
    """
    group = heads // kv_heads
    if kv_heads >= ranks:
        return tuple(HeadShare(part.start * group, part.stop * group, part.start, part.stop) for part in split_evenly(kv_heads, ranks))
    shares = []
    for kv_head, members in enumerate(split_evenly(ranks, kv_heads)):
        for part in split_evenly(group, len(members)):
            start = kv_head * group
            shares.append(HeadShare(start + part.start, start + part.stop, kv_head, kv_head + bool(len(part))))
    return tuple(shares)


def head_stages(shares: tuple[HeadShare, ...], number: int) -> tuple[tuple[HeadShare, ...], ...]:
    """`number` stages, each with a part of every rank's share: key heads as evenly as they go, with their query heads.

    A rank with fewer key heads than stages has none in the last ones.
    """
    stages: list[list[HeadShare]] = [[] for _ in range(number)]
    for share in shares:
        group = share.heads // share.kv_heads if share.kv_heads else 0
        for stage, part in zip(stages, split_evenly(share.kv_heads, number), strict=True):
            q, kv = share.q_start, share.kv_start
            stage.append(HeadShare(q + part.start * group, q + part.stop * group, kv + part.start, kv + part.stop))
    return tuple(tuple(stage) for stage in stages)


def shared_keys(shares: tuple[HeadShare, ...]) -> tuple[bool, ...]:
    """For each rank of `shares`, whether other ranks have its key heads too: then what each makes of their gradients is only a part.

    Of eight query heads and two key heads on four ranks: all. Of eight and eight: none.
    """
    owners = Counter(share.kv_start for share in shares if share.kv_heads)
    return tuple(bool(share.kv_heads) and owners[share.kv_start] > 1 for share in shares)
