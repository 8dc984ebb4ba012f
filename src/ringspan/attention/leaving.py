"""When what stages of heads give leaves: so that links which nobody uses rest, where that saves more than it costs.

NVLink's links rest after 50 ms without use (`nvidia-smi nvlink -gLowPwrInfo`), and the power that they take when awake is the
multiprocessors' then: a GPU at its limit of power is 2 to 3% faster.
"""

from __future__ import annotations

from collections.abc import Sequence

from ringspan.attention.swap import Leaving
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
    # The most of any place.
    heads, kv_heads = ([max(getattr(share, which) for share in shares) for shares in stages] for which in ("heads", "kv_heads"))
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
