"""Ranks on this machine, started through torchrun's Python API: a rank of ours and a rank under `torchrun` run the same code."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence


def start_ranks(
    num_ranks: int, module: str, arguments: Sequence[str], folder: str, restarts: int = 0, logged_ranks: Sequence[int] = ()
) -> dict[int, int]:
    """Runs `python -P -m module arguments` on `num_ranks` processes, and waits for their end.

    Args:
        num_ranks: how many.
        module: what they run; it finds its rank in torchrun's environment.
        arguments: the same for all.
        folder: for torchrun's files.
        restarts: how often all ranks are started again after one of them has failed.
        logged_ranks: ranks whose standard error goes to a file under `folder`/agent instead of the terminal.

    Returns:
        Exit codes other than 0 by rank, in the order of the ends: the first is the cause, since the agent ends the others because of it.

    Raises:
        KeyboardInterrupt: in the main thread, where this process is asked to end, once the ranks have; with the signal's name, `SIGINT` or
            `SIGTERM`.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in ("torch.distributed.elastic", "torch.distributed.launcher"):
        # The agent tells in its own words, at length, what the caller says in one sentence.
        logging.getLogger(name).addHandler(logging.NullHandler())
        logging.getLogger(name).propagate = False
    logs = os.path.join(folder, "agent")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=restarts,
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(log_dir=logs, redirects=dict.fromkeys(logged_ranks, Std.ERR)),
    )
    try:
        # -P: a folder that somebody stands in is not looked through for modules, as by the command itself it is not.
        elastic_launch(config, sys.executable)("-P", "-m", module, *arguments)
    except ChildFailedError as error:
        return {rank: failure.exitcode for rank, failure in sorted(error.failures.items(), key=lambda item: item[1].timestamp)}
    except SignalException as end:
        raise KeyboardInterrupt(signal.Signals(end.sigval).name) from None
    return {}
