"""`ringspan train` forked from a process that has imported it, and its ranks forked from the command: the same code, without the imports.

torchrun's agent starts, watches, ends and restarts the ranks as ever; but where it would run `python -m module arguments` it forks.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from tests.support.server import as_own_process, end_with, server, write_to


class ForkedRank:
    """As much of a `subprocess.Popen` as torchrun's agent asks for."""

    def __init__(self, arguments: tuple[str, ...], environment: Mapping[str, str]) -> None:
        python, dash_p, dash_m, module, *rest = (part for part in arguments if part != "-u")
        assert (python, dash_p, dash_m) == (sys.executable, "-P", "-m"), arguments
        sys.stdout.flush()
        sys.stderr.flush()
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            end_with(lambda: _be_rank(module, rest, environment))

    def poll(self) -> int | None:
        """Its exit status, negative for a signal; None as long as it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float) -> int:
        """The same at the end, or `subprocess.TimeoutExpired`."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode


def _be_rank(module: str, arguments: list[str], environment: Mapping[str, str]) -> int:
    as_own_process(environment)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    # What /proc says of its environment is the server's: the rank's name tells it.
    Path("/proc/self/comm").write_text(f"rank {environment['RANK']}")
    return import_module(module).main(arguments)


def _be_command(arguments: list[str], environment: Mapping[str, str], out: Path, errors: Path) -> None:
    from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler

    from ringspan.cli.main import main

    write_to(out, errors)
    os.environ.clear()
    os.environ.update(environment)
    SubprocessHandler._popen = lambda self, args, env: ForkedRank(args, env)  # type: ignore[method-assign]
    sys.argv = ["ringspan", *arguments]
    end_with(main)


class Command:
    """As much of a `subprocess.Popen` as the tests ask for.

    Args:
        arguments: those of `ringspan`.
        environment: the command's.
        folder: an empty one, for what it prints.
    """

    def __init__(self, arguments: list[str], environment: Mapping[str, str], folder: Path) -> None:
        self._out, self._errors = folder / "out", folder / "errors"
        self._process = server().Process(target=_be_command, args=(arguments, dict(environment), self._out, self._errors))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """Its exit status, negative for a signal; None as long as it runs."""
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        """Sends it."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Ends it, where it runs."""
        self._process.kill()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Waits for its end; what it and its ranks wrote to stdout, and to stderr."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("ringspan", timeout or 0.0)
        return tuple(path.read_text() if path.exists() else "" for path in (self._out, self._errors))  # type: ignore[return-value]


def run(arguments: list[str], environment: Mapping[str, str], folder: Path, timeout: float) -> subprocess.CompletedProcess[Any]:
    """Runs it to its end, as `subprocess.run` does."""
    command = Command(arguments, environment, folder)
    try:
        out, errors = command.communicate(timeout)
    finally:
        command.kill()
    assert command.returncode is not None
    return subprocess.CompletedProcess(["ringspan", *arguments], command.returncode, out, errors)
