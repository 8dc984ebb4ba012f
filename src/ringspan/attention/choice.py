"""The kernel of an attention, the same on every rank."""

from __future__ import annotations

from ringspan.kernels import SPEEDS, Kernel, Problem, Speeds, select_kernel
from ringspan.transport import Transport


def choose_kernel(name: str, problem: Problem, length: int, transport: Transport, speeds: Speeds = SPEEDS) -> Kernel:
    """The kernel called `name`; for `auto`, where kernels are timed, the one that rank 0 finds fastest of those that all ranks have.

    Collective where kernels are timed. Rank 0 times while the others wait: timings differ from rank to rank, and a kernel that the ranks
    do not share would have other tiles, and other schedules of launches, on each.

    Args:
        name: a kernel's, or `auto`.
        problem: what it is to compute.
        length: tokens of the longest shard.
        transport: of the ranks that choose together.
        speeds: what was found so far.

    Raises:
        UnsupportedError: for a name that is unknown, or a kernel that refuses `problem`.
    """
    if name != "auto" or problem.device not in speeds.devices:
        return select_kernel(name, problem)
    capable = transport.gather_objects(speeds.capable(problem))
    everywhere = tuple(each for each in capable[0] if all(each in others for others in capable))
    taken = speeds.compare(problem, length, everywhere).taken if transport.rank == 0 else None
    return speeds.kernels[transport.gather_objects(taken)[0]]
