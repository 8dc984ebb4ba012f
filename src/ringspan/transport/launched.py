"""Whether a launcher started this process as one of several ranks, as `torchrun` does, and what that asks of it."""

from __future__ import annotations

import os

from ringspan.errors import RingspanError

_NEEDED = ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def is_launched() -> bool:
    """Whether this process is to join others that a launcher started: `RANK` and `WORLD_SIZE` are in the environment.

    Raises:
        RingspanError: where they are, and what torchrun sets beside them is not.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return False
    if missing := [name for name in _NEEDED if name not in os.environ]:
        raise RingspanError(
            "RANK and WORLD_SIZE in the environment",
            f"{', '.join(missing)} not set",
            "Ranks find each other and their device by what a launcher sets",
            "torchrun --nproc-per-node N …, or RANK and WORLD_SIZE unset",
        )
    return True


def check_not_launched() -> None:
    """That this process, which has joined no process group, was not launched as one of several ranks.

    Each of them would compute all of every sequence by itself, and nobody would notice.

    Raises:
        RingspanError: where `RANK` and a `WORLD_SIZE` above 1 are in the environment.
    """
    rank, ranks = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    if rank.isdecimal() and ranks.isdecimal() and int(ranks) > 1:
        raise RingspanError(
            "the default process group",
            f"torch.distributed is not initialised, and this is rank {rank} of {ranks} that a launcher started (RANK, WORLD_SIZE)",
            "Ranks that were started together share a sequence, or each says that it is alone",
            "torch.distributed.init_process_group() first; or, for one that is to compute alone, the group ringspan.transport.SingleRank()",
        )
