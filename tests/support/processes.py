"""Real ranks for tests: processes that meet over gloo, run one function, and hand back what it returns."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

from tests.support.server import end_with, server, write_to


@dataclass(frozen=True)
class Ended:
    """How one process ended.

    Attributes:
        status: its exit status.
        result: what the function returned or, with status 1, the exception that it raised; None where the process left nothing.
        errors: the end of what it wrote.
        seconds: from the start of all processes to its own end.
    """

    status: int
    result: Any
    errors: str
    seconds: float


def run_processes(
    num_ranks: int, function: str, folder: Path, *, group_timeout: float = 60.0, timeout: float = 150.0, awaited: Collection[int] = ()
) -> list[Ended]:
    """Runs `function` ("module:name", called with this rank's process group) on that many processes; no process outlives the call.

    Args:
        num_ranks: how many processes.
        function: importable from the repository's root; its result can be pickled.
        folder: an empty one, for their meeting and results.
        group_timeout: how long a rank waits for another, in seconds.
        timeout: how long all may take, in seconds.
        awaited: when these ranks have ended the others are killed; if not given, all are waited for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    processes, ended = [], dict[int, float]()
    try:
        for rank in range(num_ranks):
            # What the tests' process has in its environment now; the server has what there was when it began.
            process = server().Process(target=_be_rank, args=(rank, num_ranks, function, folder, group_timeout, dict(os.environ)))
            process.start()
            processes.append(process)
        while not ended.keys() >= set(awaited or range(num_ranks)) and time.monotonic() - began < timeout:
            for rank, process in enumerate(processes):
                if rank not in ended and process.exitcode is not None:
                    ended[rank] = time.monotonic() - began
            time.sleep(0.02)
    finally:
        for process in processes:
            process.kill()
            process.join()
    outcomes = []
    for rank, process in enumerate(processes):
        left = folder / f"result{rank}"
        result = pickle.loads(left.read_bytes()) if left.exists() else None
        assert process.exitcode is not None, "it has been joined"
        outcomes.append(Ended(process.exitcode, result, (folder / f"log{rank}").read_text()[-4000:], ended.get(rank, timeout)))
        process.close()
    return outcomes


def results(outcomes: list[Ended]) -> list[Any]:
    """What every rank returned; the test fails where one did not end well."""
    for rank, outcome in enumerate(outcomes):
        assert outcome.status == 0, (
            f"rank {rank} ended with {outcome.status} after {outcome.seconds:.0f} s: {outcome.result!r}\n{outcome.errors}"
        )
    return [outcome.result for outcome in outcomes]


def _be_rank(rank: int, num_ranks: int, function: str, folder: Path, group_timeout: float, environment: Mapping[str, str]) -> None:
    write_to(folder / f"log{rank}", folder / f"log{rank}")
    os.environ |= environment
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
    # At once: where a rank has died, leaving a group in order would wait for it.
    end_with(lambda: _run(function, folder, group_timeout))


def _run(function: str, folder: Path, group_timeout: float) -> int:
    import torch.distributed as dist

    rank = int(os.environ["RANK"])
    # A file is a meeting place that no other test can take away.
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timedelta(seconds=group_timeout),
    )  # fmt: skip
    module, name = function.split(":")
    status = 0
    try:
        result = getattr(import_module(module), name)(dist.group.WORLD)
    except Exception as error:
        status, result = 1, error
    partial = folder / f"result{rank}.partial"
    partial.write_bytes(pickle.dumps(result))
    partial.rename(folder / f"result{rank}")
    if status == 0:
        dist.destroy_process_group()
    return status
