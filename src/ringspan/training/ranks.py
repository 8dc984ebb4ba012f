"""The ranks of a run: who they are, how they agree to stop, and how an error of one becomes an error of all."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ringspan.errors import RankFailure, RingspanError

Result = TypeVar("Result")
FAILED = "failed"
"""What `Ranks.agree_on_stop` says where a rank's background work failed."""
HEARTBEAT_SECONDS = 0.5
"""How often rank 0 says that it is still at what it does for all."""
_PEER_LOST = ("closed by peer", "connection reset", "broken pipe", "timed out", "timeout", "connection refused", "nccl", "gloo")


@dataclass(eq=False)
class StopSignal:
    """Whether this process, or the one that started it, was asked to stop.

    Args:
        file: a file that the launcher creates to ask for it; its text is the signal's name.
        launcher: the launcher's process id; a rank whose launcher has died asks to stop too.
    """

    file: Path | None = None
    launcher: int | None = None
    received: str | None = field(default=None, init=False)

    def listen(self) -> None:
        """Takes SIGINT and SIGTERM as requests, from now on."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name

    @property
    def name(self) -> str | None:
        """The signal that asks for it; None as long as nothing does."""
        if self.received is None and self.file is not None and self.file.exists():
            self.received = self.file.read_text().strip() or "SIGTERM"
        if self.received is None and self.launcher is not None and os.getppid() != self.launcher:
            self.received = "SIGTERM"
        return self.received


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among the others.

    Attributes:
        control: carries small CPU messages beside the data, so that neither waits for the other's order.
        saving: the same for the thread that writes checkpoints.
    """

    rank: int
    num_ranks: int
    device: torch.device
    control: dist.ProcessGroup
    saving: dist.ProcessGroup
    stop: StopSignal

    @property
    def is_first(self) -> bool:
        """Rank 0 alone writes files and speaks."""
        return self.rank == 0

    def agree_on_stop(self, *, failed: bool = False) -> str | None:
        """The signal that any rank was asked to stop by, on every rank; None where no rank was.

        Args:
            failed: whether something in this rank's background failed; every rank then gets `FAILED`.
        """
        names = (None, "SIGINT", "SIGTERM", FAILED)
        mine = FAILED if failed else self.stop.name
        with self._naming_lost_peers():
            code = torch.tensor([names.index(mine) if mine in names else 2])
            dist.all_reduce(code, op=dist.ReduceOp.MAX, group=self.control)
        return names[int(code)]

    def require_equal(self, value: float, what: str, among: int = 0) -> None:
        """Checks that every rank has the same value, bit for bit.

        Args:
            among: ranks that name the same number here are compared; the others hold something else.

        Raises:
            RankFailure: on every rank, naming those that differ from the first of theirs.
        """
        said = self.gather([float(among), value])
        first: dict[float, float] = {}
        others = [rank for rank, (where, theirs) in enumerate(said) if first.setdefault(where, theirs) != theirs]
        if others:
            raise RankFailure(
                f"the {what} of rank {', '.join(map(str, others))}",
                "they differ from those of the ranks before it",
                "Every rank takes the same optimizer step",
                "the last checkpoint, and a look at the hardware of that rank",
            )

    def gather(self, values: list[float]) -> list[list[float]]:
        """Every rank's `values`, in the order of the ranks, on every rank."""
        parts = [torch.zeros(len(values), dtype=torch.float64) for _ in range(self.num_ranks)]
        with self._naming_lost_peers():
            dist.all_gather(parts, torch.tensor(values, dtype=torch.float64), group=self.control)
        return [part.tolist() for part in parts]

    def on_first(self, function: Callable[[], Result]) -> Result:
        """Calls `function` on rank 0 and returns its result on every rank, or raises its RingspanError on every rank."""
        with self._naming_lost_peers():
            return on_first(function, self.control)

    @contextlib.contextmanager
    def _naming_lost_peers(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if not is_peer_loss(error):
                raise
            raise RankFailure(
                f"rank {self.rank}", "another rank died or did not answer", "The ranks go on together or not at all"
            ) from error


def on_first(function: Callable[[], Result], group: dist.ProcessGroup | None) -> Result:
    """Calls `function` on rank 0 of `group`, and returns its result on every rank, or raises there what it raised.

    Args:
        function: its result and errors can be pickled.
        group: for messages of the CPU; None for a process alone.
    """
    if group is None:
        return function()
    box: list[Any] = [None, None]
    if dist.get_rank(group) == 0:
        _while_others_hear(function, box, group)
    else:
        code = torch.zeros(1)
        while not code.item():
            dist.broadcast(code, group=group, group_src=0)
    dist.broadcast_object_list(box, group=group, group_src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]


def _while_others_hear(function: Callable[[], Result], box: list[Any], group: dist.ProcessGroup) -> None:
    """Puts the result, or the error, of `function` into `box`, and says to the others every now and then that it is still at work.

    What rank 0 does for all, such as reading a large text or hashing a checkpoint, may take longer than they would wait for a message.
    """
    unforeseen: list[BaseException] = []

    def work() -> None:
        try:
            box[0] = function()
        except (RingspanError, OSError) as error:
            box[1] = error
        except BaseException as error:
            unforeseen.append(error)

    thread = threading.Thread(target=work, name="ringspan-first", daemon=True)
    thread.start()
    done = False
    while not done:
        thread.join(HEARTBEAT_SECONDS)
        done = not thread.is_alive()
        if unforeseen:
            raise unforeseen[0]
        dist.broadcast(torch.tensor([float(done)]), group=group, group_src=0)


def is_peer_loss(error: BaseException) -> bool:
    """Whether an error of a collective says that another rank is gone, rather than that this one is wrong."""
    if isinstance(error, RankFailure | dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _PEER_LOST)


def open_store(timeout_seconds: float) -> dist.Store:
    """The store at which the ranks that torchrun's environment describes meet. Keep it as long as they do: rank 0 may be hosting it."""
    store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout_seconds)))
    return store


@contextlib.contextmanager
def join_ranks(
    store: dist.Store, purpose: str, device: str, timeout_seconds: float, stop: StopSignal, *, leaves: bool = True
) -> Iterator[Ranks]:
    """Joins the process group that torchrun's environment describes, and leaves it at the end.

    Args:
        store: from `open_store`.
        purpose: another one each time that the same ranks meet, or they would find what they said before.
        device: `"cpu"` (gloo) or `"cuda"` (NCCL, the GPU of LOCAL_RANK).
        leaves: whether the process goes on without the others; otherwise it ends next, by `ringspan.cli.leave`.
    """
    local_rank, local_ranks = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    # Ranks that share cores and also spread over all of them slow each other down.
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_ranks))
    place = torch.device("cuda", local_rank) if device == "cuda" else torch.device("cpu")
    timeout = timedelta(seconds=timeout_seconds)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    dist.init_process_group(
        "nccl" if place.type == "cuda" else "gloo",
        # Ranks that are started again meet at the same store, where what the earlier ones said still stands.
        store=dist.PrefixStore(f"{purpose}-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timeout,
        device_id=place if place.type == "cuda" else None,
    )
    try:
        control, saving = (dist.new_group(backend="gloo", timeout=timeout) for _ in range(2))
        assert isinstance(control, dist.ProcessGroup) and isinstance(saving, dist.ProcessGroup), "every rank is a member of them"
        yield Ranks(rank=dist.get_rank(), num_ranks=dist.get_world_size(), device=place, control=control, saving=saving, stop=stop)
    finally:
        if leaves:
            # A group whose other end is gone cannot be left in order.
            with contextlib.suppress(Exception):
                dist.destroy_process_group()
