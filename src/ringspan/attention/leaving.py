"""When what stages of heads give leaves: so that links which nobody uses rest, where that saves more than it costs. And when they keep what
they were given.

NVLink's links rest after 50 ms without use (`nvidia-smi nvlink -gLowPwrInfo`), and the power that they take when awake is the
multiprocessors' then: a GPU at its limit of power is 2 to 3% faster.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ringspan.attention.swap import Keeping, Leaving
from ringspan.geometry import HeadShare
from ringspan.schedule import PieceBytes
from ringspan.strategies import Machine


def when_stages_leave(
    stages: Sequence[Sequence[HeadShare]], pairs: int, length: int, sizes: PieceBytes, machine: Machine, direction: str
) -> tuple[Leaving, ...]:
    """For each stage when what it gives leaves in a pass of `direction`.

    Links may rest from when all that the stages need has come until the last stage begins, if all that was made before leaves beside it;
    or until that ends, if it leaves with what that gives, and nothing hides it. Where neither saves anything each leaves at once.

    Args:
        stages: by stage and by place, who computes which heads.
        pairs: of a query and a key that are computed for each head.
        length: how many positions the places have together.
        sizes: of the tensors.
        machine: speeds, and after how long its links rest.
        direction: `forward` or `backward`.
    """
    at_once: tuple[Leaving, ...] = (*("beside" for _ in stages[1:]), "last")
    if machine.rest_seconds is None or len(stages) < 2:
        return at_once
    heads, kv_heads = _most(stages)
    factor, keys = (1.0, 0) if direction == "forward" else (machine.backward_factor, 2)
    seconds_of_a_head = 4 * sizes.batch * pairs * (sizes.head_dim + machine.softmax_width) * factor / machine.flops_per_second
    bytes_of_a_head = sizes.batch * length * sizes.head_dim * sizes.element_bytes
    sent_bytes = (sum(heads[:-1]) + keys * sum(kv_heads[:-1])) * bytes_of_a_head * (len(stages[0]) - 1) / len(stages[0])
    beside = (sum(heads[:-1]) * seconds_of_a_head - machine.rest_seconds) * machine.rest_saves
    at_the_end = (sum(heads) * seconds_of_a_head - machine.rest_seconds) * machine.rest_saves
    at_the_end -= sent_bytes / (machine.exchange_bytes_per_second or machine.link_bytes_per_second)
    if max(beside, at_the_end) <= 0:
        return at_once
    return (*("together" for _ in stages[2:]), "beside" if beside >= at_the_end else "together", "last")


def when_inputs_are_kept(stages: Sequence[Sequence[HeadShare]], length: int, sizes: PieceBytes, machine: Machine) -> tuple[Keeping, ...]:
    """For each stage when what it was given in a forward is copied for the backward: `beside` what is computed, or `last`.

    Last of all a link carries what the last stage gave, and memory is that much faster: what it copies meanwhile takes no time, and beside
    a kernel it takes the kernel's. As many of the last stages as that leaves time for. Arguments as of `when_stages_leave`.
    """
    heads, kv_heads = _most(stages)
    bytes_of_a_head = sizes.batch * length * sizes.head_dim * sizes.element_bytes
    sent_bytes = heads[-1] * bytes_of_a_head * (len(stages[0]) - 1) / len(stages[0])
    left = sent_bytes / (machine.exchange_bytes_per_second or machine.link_bytes_per_second)
    found: list[Keeping] = []
    for queries, keys in zip(reversed(heads), reversed(kv_heads), strict=True):
        # Each byte is read and written.
        left -= 2 * (queries + 2 * keys) * bytes_of_a_head / (machine.memory_bytes_per_second or math.inf)
        found.append("last" if left >= 0 else "beside")
    return tuple(reversed(found))


def _most(stages: Sequence[Sequence[HeadShare]]) -> tuple[list[int], list[int]]:
    """Of each stage the most query heads and the most key heads of any place."""
    return [max(each.heads for each in shares) for shares in stages], [max(each.kv_heads for each in shares) for shares in stages]
