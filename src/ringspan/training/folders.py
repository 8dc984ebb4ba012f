"""Which folder a run gets, and which one is gone on with, where none is named."""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import shlex
from collections.abc import Iterator
from pathlib import Path

from ringspan.errors import RingspanError
from ringspan.training.plan import RunFiles

_MARK, _LOCK = ".torchrun", ".lock"


def going_on(out: Path) -> str:
    """What to try after the run in `out` ended on its way."""
    return f"--resume --out {shlex.quote(str(out))}, which goes on from the last checkpoint; before there is one, another --out"


def free_folder(wanted: Path) -> Path:
    """`wanted`, or the first of `wanted-2`, `wanted-3` … that does not exist yet."""
    candidate, number = wanted, 2
    while candidate.exists():
        candidate, number = wanted.with_name(f"{wanted.name}-{number}"), number + 1
    return candidate


def newest_folder(wanted: Path) -> Path:
    """The last run that `free_folder` made room for and that has a configuration; `wanted` where there is none."""
    return _newest(_runs(wanted)) or wanted


def own_folder(wanted: Path) -> Path | None:
    """The last of those runs that bears the `mark` of this job of torchrun's; None where the job has none yet.

    Raises:
        RingspanError: where there are runs, none is marked, and the job has no id: an earlier start on another host may have made one.
    """
    runs, job = _runs(wanted), _job()
    own = [path for path in runs if (path / _MARK).is_file() and (path / _MARK).read_text() == job]
    if runs and not own and _run_id() is None:
        raise RingspanError(
            "a second start without --out",
            f"none of the runs in {wanted.parent} is marked as this job's",
            "Ranks that torchrun starts again go on in the folder of the first start, and in no other",
            "--out DIR, or torchrun with a --rdzv-id of its own for each job",
        )
    return _newest(own)


@contextlib.contextmanager
def occupied(out: Path) -> Iterator[None]:
    """Keeps other runs from `out`, on this host and on those that share its locks, until it is left or the process ends, however it ends.

    Where the file system knows no locks nobody is kept from it.

    Raises:
        RingspanError: where a run is at work there: two would clear away each other's unfinished checkpoints.
    """
    # Without a buffer: what a full disk refuses would be tried again, and raised, on the way out.
    with (out / _LOCK).open("ab+", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise RingspanError(
                f"--out {out}",
                f"{file.read().decode(errors='replace').strip() or 'another process'} trains there",
                "One run writes into a folder at a time",
                "waiting for its end or stopping it, or another --out",
            ) from None
        except OSError:
            pass
        # Who it is is said to the next one; on a full disk it is not.
        with contextlib.suppress(OSError):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}".encode())
        yield


def mark(out: Path) -> None:
    """Writes into `out` which job of torchrun's it belongs to."""
    (out / _MARK).write_text(_job())


def _job() -> str:
    """What all starts of a job have in common and no other job has: its id, or the process that starts the ranks."""
    if (run_id := _run_id()) is not None:
        return run_id
    launcher = os.getppid()
    status = Path(f"/proc/{launcher}/stat")
    # Numbers of processes come again; the time of the start, field 22, does not. Field 2 is a name in brackets and may hold spaces.
    began = status.read_text().rpartition(")")[2].split()[19] if status.is_file() else ""
    return f"process {launcher} {began} on {platform.node()}"


def _run_id() -> str | None:
    """The id that torchrun was given, or draws with --standalone."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return None if run_id == "none" else run_id


def _runs(wanted: Path) -> list[Path]:
    return [path for path in wanted.parent.glob(f"{wanted.name}*") if RunFiles(path).config.is_file()]


def _newest(runs: list[Path]) -> Path | None:
    return max(runs, key=lambda path: RunFiles(path).config.stat().st_mtime, default=None)
