"""Starting the ranks of a run on this machine, stopping them in order, and one clear error where one of them fails.

The ranks are started by torchrun's Python API, as a command, so that a rank of ours and a rank under `torchrun` run the same code.
"""

from __future__ import annotations

import contextlib
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from ringspan.errors import RankFailure, RingspanError
from ringspan.training.folders import going_on
from ringspan.training.loop import Outcome
from ringspan.training.plan import Plan, RunFiles
from ringspan.training.post import Post, Report
from ringspan.transport import start_ranks

# After one rank failed: time for the others to notice and to say what they know.
GRACE_SECONDS = 10.0


def launch(plan: Plan, module: str, say: Callable[[str], None]) -> Outcome:
    """Runs `python -m module FOLDER` on every rank of `plan`, and waits for the end.

    Where a rank dies, hangs or crashes, all are started again up to `restarts` times, and go on from the last checkpoint; what a rank
    refuses ends the run at once. The first SIGINT or SIGTERM lets the ranks finish their step and write a checkpoint; the second ends
    them at once.

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
        plan.save(post.plan)
        agent = _Agent(num_ranks, module, folder, plan.config.restarts)
        with _forwarding_signals(post, num_ranks, say) as was_killed:
            agent.start()
            hung = _wait(agent, post, plan, say)
        attempts = [attempt.read_reports(num_ranks) for attempt in post.attempts()]
    # What was refused is the reason for the end; else the last start tells it.
    reports = next((each for each in attempts if any(report.kind == "error" for report in each.values())), attempts[-1])
    if was_killed:
        raise KeyboardInterrupt(signal.Signals(was_killed[0]).name)
    if agent.error is not None:
        raise RankFailure(
            "starting the ranks", f"{type(agent.error).__name__}: {agent.error}", "torchrun's agent starts them on this machine"
        )
    finished, exits = reports.get(0), agent.exits
    if not exits and finished is not None and finished.outcome is not None:
        return finished.outcome
    raise diagnose(num_ranks, reports, exits, plan.files, hung)


def _wait(agent: threading.Thread, first: Post, plan: Plan, say: Callable[[str], None]) -> set[int]:
    """Waits for the ranks' end. Those that are left a while after another failed are ended; returns which, of the last start."""
    num_ranks, post = plan.config.ranks, first
    hung: set[int] = set()
    failed_at: float | None = None
    while agent.is_alive():
        agent.join(0.2)
        if (latest := first.attempts()[-1]) != post:
            say(f"A rank was lost. Restart {latest.attempt} of {plan.config.restarts}, from the last checkpoint.")
            post, hung, failed_at = latest, set(), None
        reports = post.read_reports(num_ranks)
        failed = {rank for rank, report in reports.items() if report.outcome is None}
        dead = {rank for rank in range(num_ranks) if rank not in reports and post.has_died(rank)}
        if failed_at is None and failed | dead:
            failed_at = time.monotonic()
        if failed_at is not None and not hung and time.monotonic() - failed_at > GRACE_SECONDS:
            hung = {rank for rank in range(num_ranks) if rank not in reports and rank not in dead and post.end(rank)}
    return hung


def diagnose(
    num_ranks: int, reports: dict[int, Report], exits: dict[int, int], files: RunFiles, hung: Collection[int] = ()
) -> RingspanError:
    """The one error that explains the others: what a rank refused, else where a rank crashed, else which rank fell silent.

    Args:
        exits: exit codes other than 0 by rank, negative for a signal, in the order of the ends.
        hung: ranks that did not answer and were ended for it.
    """
    logs, nearest = files.logs, going_on(files.out)
    earliest = sorted(reports, key=lambda rank: reports[rank].time)
    for rank in earliest:
        if reports[rank].kind == "error":
            return RingspanError(reports[rank].message)
    for rank in earliest:
        if reports[rank].kind == "crash":
            return RankFailure(
                f"rank {rank}", f"it failed with {reports[rank].message}", f"Its traceback is in {logs / f'rank-{rank}.txt'}", nearest
            )
    silent = [rank for rank in dict.fromkeys((*exits, *range(num_ranks))) if rank not in reports]
    for rank in sorted(silent, key=lambda rank: rank in hung):
        if rank in hung:
            return RankFailure(f"rank {rank}", "it did not answer, and was ended", f"What it printed is in {logs}", nearest)
        code = exits.get(rank, 0)
        how = f"it was ended by {signal.Signals(-code).name}" if code < 0 else f"it ended with status {code} and without a word"
        rule = (
            "A rank that uses up the memory is ended by the system with SIGKILL"
            if code == -signal.SIGKILL
            else f"What it printed is in {logs}"
        )
        return RankFailure(f"rank {rank}", f"{how}, and the other ranks stopped", rule, nearest)
    lost = [rank for rank in earliest if reports[rank].kind == "lost"]
    if lost:
        return RankFailure(reports[lost[0]].message)
    return RankFailure("the ranks", "they ended without a result", f"What they printed is in {logs}", nearest)


class _Agent(threading.Thread):
    """torchrun's agent, in a thread: in the main one it would take the signals, and allow a rank 30 seconds to write its checkpoint."""

    def __init__(self, num_ranks: int, module: str, folder: str, restarts: int) -> None:
        super().__init__(name="ringspan-agent", daemon=True)
        self._arguments = (num_ranks, module, (folder,), folder, restarts)
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
            post.attempts()[-1].end(rank)

    if threading.current_thread() is not threading.main_thread():
        yield killed
        return
    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield killed
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
