"""Where verification runs: ranks inside this process, or the real ones that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from ringspan.attention import ContextParallel
from ringspan.errors import RingspanError
from ringspan.transport import InProcessTransport, Transport, agree, is_launched, make_transport, run_in_process
from ringspan.verify.case import Case

Result = TypeVar("Result")


@dataclass(frozen=True)
class World:
    """The ranks at hand.

    Attributes:
        device: of the tensors.
        transport: over the real ranks, or None where each case gets ranks of its own inside this process.
        timeout_seconds: how long a rank waits for another.
    """

    device: torch.device
    transport: Transport | None
    timeout_seconds: float
    _contexts: dict[tuple, ContextParallel] = field(default_factory=dict)

    @property
    def is_first(self) -> bool:
        """Whether this process prints and writes: the only one, or rank 0."""
        return self.transport is None or self.transport.rank == 0

    @property
    def name(self) -> str:
        """How the ranks reach one another: `in-process`, `gloo` or `nccl`."""
        return "in-process" if self.transport is None else dist.get_backend()

    def run(self, case: Case, function: Callable[[ContextParallel], Result]) -> list[Result]:
        """The results of `function(context)` on every rank, in rank order; small and picklable ones, since real ranks exchange them."""
        if self.transport is None:
            return run_in_process(case.num_ranks, lambda group: function(context_for(case, group)), self.timeout_seconds)
        assert case.num_ranks == self.transport.size
        # Each context has connections of its own between the processes, so those that differ in nothing else share one.
        key = (case.strategy, case.layout, case.kernel, case.weights)
        if key not in self._contexts:
            self._contexts[key] = context_for(case, None)
        return self.transport.gather_objects(function(self._contexts[key]))

    def agree(self, asked: str, problem: RingspanError | None = None, what: str = "verify") -> None:
        """All ranks go on, or all raise: `problem` of any of them, or that they were not asked for the same."""
        if self.transport is not None:
            agree(self.transport, what, asked, problem)
        elif problem is not None:
            raise problem


def context_for(case: Case, group: InProcessTransport | None) -> ContextParallel:
    """The ranks of `group`, or of the default process group, split as `case` asks."""
    return ContextParallel(group, strategy=case.strategy, layout=case.layout, kernel=case.kernel, weights=case.weights)


@contextmanager
def open_world(device: str = "auto", timeout_seconds: float = 120.0) -> Iterator[World]:
    """Joins the ranks of torchrun's environment where there is one, and leaves them at the end.

    Args:
        device: `cpu` (gloo between processes), `cuda` (NCCL, a GPU a rank; one GPU for all in-process ranks), or `auto`.
        timeout_seconds: how long a rank waits for another.

    Raises:
        RingspanError: for a device that this machine has not, or has too few of; where only a part of torchrun's environment is there.
    """
    spread = is_launched()
    local_rank, local_ranks = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    place = _place(device, local_rank if spread else 0, local_ranks if spread else 1)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if not spread:
        yield World(place, None, timeout_seconds)
        return
    timeout = timedelta(seconds=timeout_seconds)
    if place.type == "cuda":
        dist.init_process_group("nccl", timeout=timeout, device_id=place)
    else:
        dist.init_process_group("gloo", timeout=timeout)
    try:
        yield World(place, make_transport(None), timeout_seconds)
    finally:
        dist.destroy_process_group()


def _place(device: str, local_rank: int, local_ranks: int) -> torch.device:
    if device not in ("auto", "cpu", "cuda"):
        raise RingspanError(f"device {device!r}", "there are auto, cpu and cuda", "A device is asked for by name", "--device auto")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cpu" or (device == "auto" and gpus < local_ranks):
        return torch.device("cpu")
    if gpus < local_ranks:
        raise RingspanError(
            f"device 'cuda' for {local_ranks} rank{'s' if local_ranks > 1 else ''} on this machine",
            f"torch {torch.__version__} sees {gpus} CUDA GPUs",
            "Every process has a GPU of its own",
            "--device cpu",
        )
    return torch.device("cuda", local_rank)
