"""One process that has imported what tests start processes for, and has done nothing else: ranks and commands are forked from it.

Importing torch and transformers is most of what a process of a few steps does.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, NoReturn

import pytest

ROOT = Path(__file__).parents[2]
IMPORTED = (
    "torch.distributed.fsdp", "torch.distributed.tensor", "torch.distributed.launcher.api", "matplotlib.backends.backend_agg", "tokenizers",
    "ringspan", "ringspan.cli.main", "ringspan.cli.train_rank", "ringspan.viz.loss_curve", "tests.support.models", "tests.support.split",
)  # fmt: skip
"""What it has imported. A module that is not there is passed over, and imported again, and missed, where it is needed."""


def server() -> ForkServerContext:
    """Starts it, unless it runs already; `server().Process` forks from it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    with pytest.MonkeyPatch.context() as patch:
        # OpenMP reads it once, when torch is imported.
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.chdir(ROOT)
        forkserver.ensure_running()
    return context


def write_to(out: Path, errors: Path) -> None:
    """Lets everything that this process and its libraries print go to these files."""
    for descriptor, path in ((1, out), (2, errors)):
        with path.open("a") as stream:
            os.dup2(stream.fileno(), descriptor)


def end_with(function: Callable[[], Any]) -> NoReturn:
    """Calls it and ends this process at once, with its status or that of the SystemExit that it raises."""
    status = 1
    try:
        status = function()
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        if isinstance(status, str):
            print(status, file=sys.stderr)
            status = 1
        # What a process forked from another has of that one's it must leave alone, and so it does not end in order.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status or 0)


def as_own_process(environment: Mapping[str, str]) -> None:
    """Makes of a process that was forked in the middle of something one that has just begun."""
    os.setsid()
    # What the other process holds it neither uses nor, when a finalizer runs, closes: numbers of closed files would be given out again,
    # and a late finalizer would close somebody else's.
    gc.freeze()
    with open(os.devnull, "r+") as nothing:
        for name in os.listdir("/proc/self/fd"):
            with suppress(OSError):  # the listing's own is closed by now
                if int(name) not in (0, 1, 2, nothing.fileno()):
                    os.fstat(int(name))
                    os.dup2(nothing.fileno(), int(name))
    os.environ.clear()
    os.environ.update(environment)
    # Threads that it starts are as those of a main thread.
    threading.current_thread()._daemonic = False  # type: ignore[attr-defined]
