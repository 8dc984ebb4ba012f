"""One rank of `ringspan train`: joins the others, trains, and leaves word of how it ended."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from ringspan.cli.leave import leave
from ringspan.cli.train_progress import TrainingProgress, printable
from ringspan.errors import RankFailure, RingspanError
from ringspan.training.export import export
from ringspan.training.loop import Outcome, train
from ringspan.training.metrics import StepRecord, read_metrics
from ringspan.training.notes import exported_note
from ringspan.training.plan import Plan, RunFiles
from ringspan.training.post import Post, Report, report_of
from ringspan.training.prepare import prepare, prepare_restarted, restarted
from ringspan.training.ranks import Ranks, StopSignal, join_ranks, open_store


@dataclass(frozen=True)
class Watcher:
    """Shows the training and keeps its samples in a file."""

    progress: TrainingProgress
    files: RunFiles

    def started(self, plan: Plan, num_parameters: int, notes: Sequence[str]) -> None:
        """Shows it."""
        self.progress.started(plan, num_parameters, notes)

    def stepped(self, record: StepRecord) -> None:
        """Shows it."""
        self.progress.stepped(record)

    def sampled(self, step: int, prompt: str, text: str) -> None:
        """Shows it and keeps it."""
        self.progress.sampled(step, prompt, text)
        with self.files.samples.open("a") as stream:
            stream.write(f"=== after step {step}: prompt, then text\n{printable(prompt)}\n---\n{printable(text)}\n\n")

    def saved(self, step: int, folder: Path) -> None:
        """Shows it."""
        self.progress.saved(step, folder)


def run_plan(plan: Plan, ranks: Ranks) -> Outcome:
    """Trains, and on rank 0 shows it, draws the curve and says what is where."""
    console = Console(soft_wrap=False)
    with TrainingProgress(console) as progress:
        outcome = train(plan, ranks, Watcher(progress, plan.files))
    if ranks.is_first:
        if plan.config.export and outcome.stopped_by is None:
            export(Path(outcome.checkpoint), Path(plan.config.export))
        conclude(plan, outcome, console)
    return outcome


def conclude(plan: Plan, outcome: Outcome, console: Console) -> None:
    """Draws the curve from `metrics.jsonl`, and says how the run ended and where everything is."""
    from ringspan.viz.loss_curve import draw_loss_curve

    files = plan.files
    records = read_metrics(files.metrics)
    unit = "byte" if plan.tokens.token_bytes == 1 else "token"
    draw_loss_curve(records, files.loss_curve, unit=unit, title=f"{Path(plan.config.model).name}, context {plan.config.context:,}")
    validated = [record for record in records if record.validation_loss is not None]
    if validated and validated[-1].step == outcome.step:
        first, last = validated[0].validation_loss, validated[-1].validation_loss
        console.print(
            f"held-out loss {last:.3f} nats per {unit} after step {outcome.step} (it was {first:.3f} before training)", highlight=False
        )
        if parts := validated[-1].validation_by_position:
            said = ", ".join(f"{loss:.3f} from {int(low):,}" for low, _, loss in parts)
            console.print(f"  by position: {said}", highlight=False, soft_wrap=True)
        if windows := validated[-1].validation_by_context:
            console.print(f"  by context:  {said_by_context(windows, unit)}", highlight=False, soft_wrap=True)
    for name, path in (
        ("checkpoint", outcome.checkpoint),
        ("metrics", files.metrics),
        ("loss curve", files.loss_curve),
        ("samples", files.samples),
        ("model", plan.config.export),
    ):
        if path and Path(path).exists():
            console.print(f"  {name:<11} {path}", highlight=False, soft_wrap=True)
    if plan.config.export and Path(plan.config.export).exists() and (note := exported_note(plan.config)):
        console.print(f"  note: {note}", highlight=False, soft_wrap=True)
    if outcome.stopped_by:
        console.print(
            f"stopped after step {outcome.step} of {plan.config.steps}; to go on: {go_on(files.out)}", highlight=False, soft_wrap=True
        )


def said_by_context(windows: Sequence[Sequence[float]], unit: str) -> str:
    """`validation_by_context` in words."""
    (fewest, loss), *others = windows
    more = ", ".join(f"{int(window):,}: {other:.3f}" for window, other in others)
    return f"the same {unit}s with fewer than {int(fewest):,} before them {loss:.3f}, {more}"


def go_on(out: Path) -> str:
    """The command that goes on with a run."""
    import shlex

    return f"ringspan train --resume --out {shlex.quote(str(out))}"


def under_torchrun(given: dict[str, Any], *, resume: bool, show_plan: Callable[[Plan], None]) -> Outcome:
    """The whole command on one of the ranks that torchrun started: rank 0 checks and plans for all.

    Raises:
        RingspanError: on every rank where rank 0 refuses.
    """
    stop = StopSignal()
    stop.listen()
    store = open_store(float(given.get("timeout_seconds", 300.0)))
    with join_ranks(store, "plan", "cpu", float(given.get("timeout_seconds", 300.0)), stop) as ranks:
        try:
            prepared = prepare_restarted if _attempt() else partial(prepare, resume=resume)
            plan = ranks.on_first(lambda: prepared(given, world_size=ranks.num_ranks))
        except RingspanError as error:
            # What rank 0 refuses it says itself; that it is gone only the others can say.
            if ranks.is_first or isinstance(error, RankFailure):
                raise
            sys.exit(2)
        if ranks.is_first:
            show_plan(plan)
    with join_ranks(store, "train", plan.config.device, plan.config.timeout_seconds, stop, leaves=False) as ranks:
        return run_plan(plan, ranks)


def main(arguments: list[str]) -> int:
    """`python -m ringspan.cli.train_rank FOLDER`, as `ringspan.training.launch` starts it."""
    post = Post(Path(arguments[0]), _attempt())
    rank = int(os.environ["RANK"])
    plan = Plan.load(post.plan)
    if post.attempt and post.is_over(plan.config.ranks):
        return 0
    post.enter(rank)
    log = _log_to(plan.files.logs / f"rank-{rank}.txt", keep_stdout=rank == 0)
    stop = StopSignal(post.stop, os.getppid())
    stop.listen()
    try:
        store = open_store(plan.config.timeout_seconds)
        with join_ranks(store, "train", plan.config.device, plan.config.timeout_seconds, stop, leaves=False) as ranks:
            again = ranks.on_first(lambda: restarted(plan)) if post.attempt else plan
            outcome = run_plan(again, ranks)
    except BaseException as error:
        report = report_of(error, plan.files.out)
        post.write_report(rank, report)
        # The log may lie on the disk whose filling up is the error.
        with contextlib.suppress(OSError):
            traceback.print_exc(file=log)
        # To torchrun whatever is not 0 is worth another start; what was refused is not.
        return 0 if report.kind == "error" and plan.config.restarts else 2
    post.write_report(rank, Report(kind="outcome", outcome=outcome))
    return 0


def _attempt() -> int:
    """How often torchrun has started this rank before."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _log_to(path: Path, *, keep_stdout: bool):
    """Lets everything that this process and its libraries print go to a file: errors reach the user through the launcher, once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stream = path.open("a", buffering=1)
    os.dup2(stream.fileno(), 2)
    if not keep_stdout:
        os.dup2(stream.fileno(), 1)
    return stream


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
