"""One rank of `ringspan bench`: joins the others, times, and on rank 0 prints and writes what was found."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ringspan.bench import PEERS, Bench, BenchReport, Clock, Grid, about, open_meter
from ringspan.bench.case import FEWEST_SAMPLES
from ringspan.cli.bench_progress import Progress
from ringspan.cli.leave import leave
from ringspan.errors import RingspanError
from ringspan.transport import SingleRank, agree, is_launched
from ringspan.verify import open_world

_PR_SET_PDEATHSIG = 1
"""Which signal Linux gives a process at its parent's end. torchrun's agent ends its ranks where it is asked to, not where it is killed."""

_DEFAULTS: dict[str, dict[str, Any]] = {
    "cuda": {
        "tokens": (2048, 8192, 32768, 131072),
        "heads": ((32, 8),),
        "head_dims": (128,),
        "dtypes": ("bfloat16",),
        "strategies": ("ring", "all_gather", "direct", "ulysses", "auto"),
    },
    "cpu": {"tokens": (512, 1024), "heads": ((8, 2),), "head_dims": (64,), "dtypes": ("float32",), "strategies": ("ring", "auto")},
}


@dataclass(frozen=True, kw_only=True)
class Request:
    """Everything that was asked for, settled. Files are paths as text, or None."""

    grid: Grid
    device: str
    samples: int
    warmup: int
    timeout_seconds: float
    json_file: str | None
    png: str | None
    markdown: str | None

    def save(self, path: Path) -> None:
        """Writes it for the ranks."""
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> Request:
        """What `save` wrote."""
        fields = json.loads(path.read_text())
        lists = {name: _tuples(value) for name, value in fields["grid"].items()}
        return cls(**{**fields, "grid": Grid(**lists)})


def outcome_file(path: Path) -> Path:
    """Where rank 0 leaves the exit status of the run that the request at `path` asks for, once all is written."""
    return path.with_suffix(".status")


def count_file(path: Path) -> Path:
    """Where rank 0 keeps how many records are timed so far."""
    return path.with_suffix(".timed")


def _tuples(value: Any) -> Any:
    return tuple(_tuples(entry) for entry in value) if isinstance(value, list) else value


def prepare(
    given: dict[str, Any], *, device: str, samples: int, warmup: int, timeout_seconds: float, files: dict[str, Path | None]
) -> Request:
    """The request, with defaults for the device at hand, checked.

    Raises:
        RingspanError: for what does not exist here or cannot be written.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise RingspanError(f"device {device!r}", "there are auto, cpu and cuda", "A device is asked for by name", "--device auto")
    spread = is_launched()
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    kind = device if device != "auto" else "cuda" if gpus else "cpu"
    started = int(os.environ["WORLD_SIZE"]) if spread else None
    asked = given.get("num_ranks")
    if started is not None and asked not in (None, started):
        raise RingspanError(f"--ranks {asked} under torchrun", f"it started {started}", "Its ranks are those that are timed", "no --ranks")
    num_ranks = started or (asked if asked is not None else max(1, gpus) if kind == "cuda" else 2)
    if kind == "cuda" and not spread and gpus < max(1, num_ranks):
        raise RingspanError(
            f"device 'cuda' for {num_ranks} rank{'s' if num_ranks > 1 else ''} on this machine",
            f"torch {torch.__version__} sees {gpus} CUDA GPUs", "Every process has a GPU of its own", "--device cpu",
        )  # fmt: skip
    if samples < FEWEST_SAMPLES:
        raise RingspanError(f"--samples {samples}", "", f"A median is of at least {FEWEST_SAMPLES} samples", f"--samples {FEWEST_SAMPLES}")
    if warmup < 1 or not timeout_seconds > 0:
        found = f"--warmup {warmup}" if warmup < 1 else f"--timeout-seconds {timeout_seconds:g}"
        raise RingspanError(found, "", "There is a call before the first sample, and a rank waits for a while", "--warmup 5")
    values = {name: value for name, value in given.items() if value is not None}
    grid = Grid(**{"peers": tuple(PEERS), **_DEFAULTS[kind], **values, "num_ranks": num_ranks})
    grid.check(kind)
    if int(os.environ.get("RANK", 0)) == 0:
        for option, path in (("--json", files["json_file"]), ("--png", files["png"]), ("--markdown", files["markdown"])):
            _require_writable(option, path)
    paths = {name: None if path is None else str(path) for name, path in files.items()}
    if paths["png"] is not None:
        _require_matplotlib()
    return Request(grid=grid, device=kind, samples=samples, warmup=warmup, timeout_seconds=timeout_seconds, **paths)


def run_rank(request: Request, plan: Path | None = None) -> int:
    """Joins the ranks of torchrun's environment, where there are any, and runs the whole grid. Returns the exit status of this rank.

    Args:
        plan: the request's file. Beside it rank 0 leaves what `outcome_file` and `count_file` name.

    Raises:
        RingspanError: where the ranks cannot be joined, or one is lost.
    """
    if request.device == "cpu":
        local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        # Ranks that share cores and also spread over all of them slow each other down.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local))
    with open_world(request.device, request.timeout_seconds) as world:
        transport = world.transport or SingleRank()
        agree(transport, "bench", str(request.grid))
        clock = Clock(world.device, transport, request.warmup, request.samples)
        meter = open_meter(world.device)
        known = about(world.device, transport.size, world.name)
        known |= {"samples": request.samples, "warmup": request.warmup, "dtypes": list(request.grid.dtypes)}
        known |= {"joules": meter.missing or "NVML's total energy counter, all ranks together, idle parts of the GPUs included"}
        progress = None
        if world.is_first:
            progress = Progress(known, request.json_file, request.markdown, request.png, plan and count_file(plan))
        report = BenchReport(known, tuple(Bench(clock, meter).run(request.grid, progress)))
        if progress is not None:
            progress.finish(report)
        # Rank 0 has spoken and written before any rank leaves: whoever started them ends the others when one has left.
        status = 0 if report.passed or not world.is_first else 1
        if plan is not None and world.is_first:
            outcome_file(plan).write_text(str(status))
        transport.gather_objects(None)
    return status


def _require_writable(option: str, path: Path | None) -> None:
    if path is None:
        return
    there = path.exists()
    try:
        path.open("a").close()
    except OSError as error:
        raise RingspanError(f"{option} {path}", error.strerror or str(error), "The file can be written", f"{option} bench") from None
    if not there:
        # What is ended early leaves no empty file.
        path.unlink()


def _require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise RingspanError(
            "--png", "matplotlib is not installed", "Pictures want the extra plot", "pip install 'ringspan[plot]', or no --png"
        ) from None


def _end_with_the_launcher() -> None:
    """Ends this rank at once, without a word, with the process that started it: a rank left over would be timed along with the next run."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    launcher = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:
        # It ended before Linux was asked.
        os._exit(1)


def main(arguments: list[str]) -> int:
    """`python -m ringspan.cli.bench_rank REQUEST`, as `ringspan bench` starts it."""
    path = Path(arguments[0])
    _end_with_the_launcher()
    first = int(os.environ["RANK"]) == 0
    try:
        status = run_rank(Request.load(path), path)
    except RingspanError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        if not first:
            # Rank 0 says the same, and would be ended before it does.
            time.sleep(2.0)
        return 2
    return status


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
