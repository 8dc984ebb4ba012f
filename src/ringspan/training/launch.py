"""Starting the ranks of a run on this machine, stopping them in order, and one clear error where one of them fails.

The ranks are started by torchrun's Python API, as a command, so that a rank of ours and a rank under `torchrun` run the same code.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from ringspan.errors import RankFailure, RingspanError
from ringspan.training.loop import Outcome
from ringspan.training.plan import Plan
from ringspan.training.ranks import is_peer_loss
from ringspan.transport import start_ranks

PLAN, STOP = "plan.json", "stop"
# After one rank failed: time for the others to notice and to say what they know.
GRACE_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a rank left behind: an outcome; an `error` to put right; a `lost` peer; or a `crash`, which is a fault of the program."""

    kind: str
    message: str = ""
    outcome: Outcome | None = None
    time: float = 0.0


@dataclass(frozen=True)
class Post:
    """The folder through which the launcher and its ranks exchange the plan, the wish to stop, and reports."""

    folder: Path

    @property
    def stop(self) -> Path:
        """Exists once the ranks shall stop; its text is the signal's name."""
        return self.folder / STOP

    def process(self, rank: int) -> Path:
        """Holds the rank's process id."""
        return self.folder / f"rank-{rank}.pid"

    def has_died(self, rank: int) -> bool:
        """Whether the rank's process was there and is no more."""
        try:
            os.kill(int(self.process(rank).read_text()), 0)
        except ProcessLookupError:
            return True
        except (OSError, ValueError):
            pass
        return False

    def end(self, rank: int) -> bool:
        """Kills the rank's process; False where there is none any more."""
        try:
            os.kill(int(self.process(rank).read_text()), signal.SIGKILL)
        except (OSError, ValueError):
            return False
        return True

    def report(self, rank: int) -> Path:
        """Holds the rank's report."""
        return self.folder / f"rank-{rank}.json"

    def write_report(self, rank: int, report: Report) -> None:
        """Whole or not there."""
        partial = self.folder / f"rank-{rank}.partial"
        partial.write_text(json.dumps(asdict(report) | {"time": time.time()}))
        partial.replace(self.report(rank))

    def read_reports(self, num_ranks: int) -> dict[int, Report]:
        """By rank; a rank that died without a word has none."""
        reports = {}
        for rank in range(num_ranks):
            if self.report(rank).is_file():
                fields = json.loads(self.report(rank).read_text())
                outcome = Outcome(**fields["outcome"]) if fields["outcome"] else None
                reports[rank] = Report(**fields | {"outcome": outcome})
        return reports


def report_of(error: BaseException) -> Report:
    """The report that a rank writes about an error that ended it."""
    if is_peer_loss(error):
        return Report(kind="lost", message=str(error))
    if isinstance(error, RingspanError):
        return Report(kind="error", message=str(error))
    if isinstance(error, OSError) and error.strerror:
        where = f" ({error.filename})" if error.filename else ""
        return Report(kind="error", message=f"writing the run's files: {error.strerror}{where}. --resume goes on from the last checkpoint")
    return Report(kind="crash", message=f"{type(error).__name__}: {error}")


def launch(plan: Plan, module: str, say: Callable[[str], None]) -> Outcome:
    """Runs `python -m module FOLDER` on every rank of `plan`, and waits for the end.

    The first SIGINT or SIGTERM lets the ranks finish their step and write a checkpoint; the second ends them at once.

    Args:
        module: joins the ranks, trains, and leaves a report; FOLDER is a `Post` with the plan.
        say: prints a line to the user.

    Raises:
        RankFailure: where a rank died, hung or crashed; it names the rank.
        RingspanError: what a rank refused.
    """
    num_ranks = plan.config.ranks
    with tempfile.TemporaryDirectory(prefix="ringspan-") as folder:
        post = Post(Path(folder))
        plan.save(post.folder / PLAN)
        agent = _Agent(num_ranks, module, folder)
        with _forwarding_signals(post, num_ranks, say) as was_killed:
            agent.start()
            hung = _wait(agent, post, num_ranks)
        reports = post.read_reports(num_ranks)
    if was_killed:
        raise KeyboardInterrupt
    if agent.error is not None:
        raise RankFailure(
            "starting the ranks", f"{type(agent.error).__name__}: {agent.error}", "torchrun's agent starts them on this machine"
        )
    finished, exits = reports.get(0), agent.exits
    if not exits and finished is not None and finished.outcome is not None:
        return finished.outcome
    raise diagnose(num_ranks, reports, exits, plan.files.logs, hung)


def _wait(agent: threading.Thread, post: Post, num_ranks: int) -> set[int]:
    """Waits for the ranks' end. Those that are left a while after another failed are ended; returns which."""
    hung: set[int] = set()
    failed_at: float | None = None
    while agent.is_alive():
        agent.join(0.2)
        reports = post.read_reports(num_ranks)
        failed = {rank for rank, report in reports.items() if report.outcome is None}
        dead = {rank for rank in range(num_ranks) if rank not in reports and post.has_died(rank)}
        if failed_at is None and failed | dead:
            failed_at = time.monotonic()
        if failed_at is not None and not hung and time.monotonic() - failed_at > GRACE_SECONDS:
            hung = {rank for rank in range(num_ranks) if rank not in reports and rank not in dead and post.end(rank)}
    return hung


def diagnose(num_ranks: int, reports: dict[int, Report], exits: dict[int, int], logs: Path, hung: Collection[int] = ()) -> RingspanError:
    """The one error that explains the others: what a rank refused, else where a rank crashed, else which rank fell silent.

    Args:
        exits: exit codes other than 0 by rank, negative for a signal, in the order of the ends.
        hung: ranks that did not answer and were ended for it.
    """
    resume = "--resume, which goes on from the last checkpoint"
    earliest = sorted(reports, key=lambda rank: reports[rank].time)
    for rank in earliest:
        if reports[rank].kind == "error":
            return RingspanError(reports[rank].message)
    for rank in earliest:
        if reports[rank].kind == "crash":
            return RankFailure(
                f"rank {rank}", f"it failed with {reports[rank].message}", f"Its traceback is in {logs / f'rank-{rank}.txt'}", resume
            )
    silent = [rank for rank in dict.fromkeys((*exits, *range(num_ranks))) if rank not in reports]
    for rank in sorted(silent, key=lambda rank: rank in hung):
        if rank in hung:
            return RankFailure(f"rank {rank}", "it did not answer, and was ended", f"What it printed is in {logs}", resume)
        code = exits.get(rank, 0)
        how = f"it was ended by {signal.Signals(-code).name}" if code < 0 else f"it ended with status {code} and without a word"
        rule = (
            "A rank that uses up the memory is ended by the system with SIGKILL"
            if code == -signal.SIGKILL
            else f"What it printed is in {logs}"
        )
        return RankFailure(f"rank {rank}", f"{how}, and the other ranks stopped", rule, resume)
    lost = [rank for rank in earliest if reports[rank].kind == "lost"]
    if lost:
        return RankFailure(reports[lost[0]].message)
    return RankFailure("the ranks", "they ended without a result", f"What they printed is in {logs}", resume)


class _Agent(threading.Thread):
    """torchrun's agent, in a thread: in the main one it would take the signals, and allow a rank 30 seconds to write its checkpoint."""

    def __init__(self, num_ranks: int, module: str, folder: str) -> None:
        super().__init__(name="ringspan-agent", daemon=True)
        self._arguments = (num_ranks, module, (folder,), folder)
        self.exits: dict[int, int] = {}
        self.error: Exception | None = None

    def run(self) -> None:
        """Starts the ranks and waits for them."""
        try:
            self.exits = start_ranks(*self._arguments)
        except Exception as error:
            self.error = error


@contextlib.contextmanager
def _forwarding_signals(post: Post, num_ranks: int, say: Callable[[str], None]) -> Iterator[list[int]]:
    """Turns signals into the wish to stop; the list that it yields is filled by the second one."""
    killed: list[int] = []

    def forward(number: int, frame: object) -> None:
        if not post.stop.exists():
            post.stop.write_text(signal.Signals(number).name)
            say("\nStopping after this step, with a checkpoint. Once more to end at once.")
            return
        killed.append(number)
        for rank in range(num_ranks):
            post.end(rank)

    if threading.current_thread() is not threading.main_thread():
        yield killed
        return
    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield killed
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
