"""How the launcher and its ranks exchange the plan, the wish to stop, and word of how each rank ended."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ringspan.errors import RingspanError
from ringspan.training.folders import going_on
from ringspan.training.loop import Outcome
from ringspan.training.manifest import write_whole
from ringspan.training.ranks import is_peer_loss

PLAN, STOP = "plan.json", "stop"


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a rank left behind: an outcome; an `error` to put right; a `lost` peer; or a `crash`, which is a fault of the program."""

    kind: str
    message: str = ""
    outcome: Outcome | None = None
    time: float = 0.0


@dataclass(frozen=True)
class Post:
    """The folder through which the launcher and its ranks exchange the plan, the wish to stop, and reports.

    Args:
        folder: the same for every start of the ranks.
        attempt: how often the ranks have been started before; each start has reports of its own.
    """

    folder: Path
    attempt: int = 0

    @property
    def plan(self) -> Path:
        """What the launcher has settled."""
        return self.folder / PLAN

    @property
    def stop(self) -> Path:
        """Exists once the ranks shall stop; its text is the signal's name."""
        return self.folder / STOP

    @property
    def _place(self) -> Path:
        return self.folder / f"attempt-{self.attempt}"

    def attempts(self) -> list[Post]:
        """Every start of the ranks so far, this one at least, in their order."""
        numbers = sorted(int(place.name.rpartition("-")[2]) for place in self.folder.glob("attempt-*"))
        return [replace(self, attempt=number) for number in numbers] or [self]

    def enter(self, rank: int) -> None:
        """Leaves this process's id for the launcher."""
        self._place.mkdir(exist_ok=True)
        self.process(rank).write_text(str(os.getpid()))

    def process(self, rank: int) -> Path:
        """Holds the rank's process id."""
        return self._place / f"rank-{rank}.pid"

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
        return self._place / f"rank-{rank}.json"

    def write_report(self, rank: int, report: Report) -> None:
        """Whole or not there."""
        self._place.mkdir(exist_ok=True)
        write_whole(self.report(rank), json.dumps(asdict(report) | {"time": time.time()}))

    def read_reports(self, num_ranks: int) -> dict[int, Report]:
        """By rank; a rank that died without a word has none."""
        reports = {}
        for rank in range(num_ranks):
            if self.report(rank).is_file():
                fields = json.loads(self.report(rank).read_text())
                outcome = Outcome(**fields["outcome"]) if fields["outcome"] else None
                reports[rank] = Report(**fields | {"outcome": outcome})
        return reports

    def is_over(self, num_ranks: int) -> bool:
        """Whether there is nothing to start the ranks again for: they shall stop, or one of them met what no other start would change."""
        return self.stop.exists() or any(
            report.kind == "error" for earlier in self.attempts() for report in earlier.read_reports(num_ranks).values()
        )


def report_of(error: BaseException, out: Path) -> Report:
    """The report that a rank of the run in `out` writes about an error that ended it."""
    if is_peer_loss(error):
        return Report(kind="lost", message=str(error))
    if isinstance(error, RingspanError):
        return Report(kind="error", message=str(error))
    if isinstance(error, OSError) and error.strerror:
        where = f" ({error.filename})" if error.filename else ""
        return Report(kind="error", message=f"writing the run's files: {error.strerror}{where}. Try: {going_on(out)}")
    return Report(kind="crash", message=f"{type(error).__name__}: {error}")
