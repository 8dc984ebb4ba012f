"""How a process of the command ends: a rank of several at once, without the groups that it was in, and any other in order."""

from __future__ import annotations

import os
import sys
import traceback
from typing import NoReturn


def leave(status: str | int | None) -> NoReturn:
    """Ends the process with `status`; a rank that a launcher started at once.

    gloo's threads now and then outlive what they work on. The interpreter's way out then aborts, and torch's way out of a group waits for
    a thread that waits for the interpreter (pytorch issues 56297 and 190489): the run is over, and never ends.
    """
    if not _is_rank() or isinstance(status, str):
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)


def fail_unforeseen() -> NoReturn:
    """Ends the process with the error that is being handled, as Python does."""
    if not _is_rank():
        raise
    traceback.print_exc()
    leave(1)


def _is_rank() -> bool:
    return "RANK" in os.environ
