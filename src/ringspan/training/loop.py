"""The training loop of one rank.

A step is: read the batch that the step number names, keep this rank's shard of its replica's sequences, forward, backward, add the
gradients over the ranks, and step the weights that this rank holds. All ranks together then hold the weights that one process would hold.
Checkpoints are written while the steps go on; that one failed is learned at the next step, by all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from ringspan.training.checkpoint import step_folder
from ringspan.training.folders import occupied
from ringspan.training.metrics import MetricsFile, StepRecord
from ringspan.training.plan import Plan
from ringspan.training.ranks import Ranks
from ringspan.training.tensorboard import Board
from ringspan.training.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended: `step` steps taken, stopped by the signal `stopped_by` or, where that is None, finished."""

    step: int
    stopped_by: str | None
    checkpoint: str


class Observer(Protocol):
    """What a rank tells whoever watches; rank 0's is shown."""

    def started(self, plan: Plan, num_parameters: int, notes: Sequence[str]) -> None:
        """The model is ready; `notes` say how it is spread, and what will not be measured."""
        ...

    def stepped(self, record: StepRecord) -> None:
        """A step, or with step 0 the first validation, is done."""
        ...

    def sampled(self, step: int, prompt: str, text: str) -> None:
        """The model has continued `prompt`."""
        ...

    def saved(self, step: int, folder: Path) -> None:
        """A checkpoint is written."""
        ...


class Silence:
    """The observer of the other ranks."""

    def started(self, plan: Plan, num_parameters: int, notes: Sequence[str]) -> None:
        """Says nothing."""

    def stepped(self, record: StepRecord) -> None:
        """Says nothing."""

    def sampled(self, step: int, prompt: str, text: str) -> None:
        """Says nothing."""

    def saved(self, step: int, folder: Path) -> None:
        """Says nothing."""


def train(plan: Plan, ranks: Ranks, observer: Observer) -> Outcome:
    """Trains from where `plan` says to its last step, or to the step at which a rank is asked to stop.

    Args:
        observer: told of everything on rank 0, and of nothing on the others.

    Raises:
        RingspanError: on every rank, where another run is at work in the folder, a checkpoint cannot be written, or another rank is gone.
    """
    with ExitStack() as held:
        ranks.on_first(lambda: held.enter_context(occupied(plan.files.out)))
        return _train(plan, ranks, observer if ranks.is_first else Silence())


def _train(plan: Plan, ranks: Ranks, observer: Observer) -> Outcome:
    trainer = Trainer(plan, ranks)
    observer.started(plan, trainer.num_parameters, [*trainer.spread_notes(), *trainer.notes()])
    # Rank 0 alone keeps the curve; a resumed one drops what was written after its checkpoint.
    keep = plan.first_step if plan.checkpoint else None
    with MetricsFile(plan.files.metrics, after_step=keep) if ranks.is_first else nullcontext() as metrics:
        board = Board(plan.files.tensorboard, first_step=plan.first_step) if plan.config.tensorboard and ranks.is_first else None

        def report(record: StepRecord) -> None:
            if metrics is not None:
                metrics.write(record)
            if board is not None:
                board.write(record)
            observer.stepped(record)

        if trainer.step == 0:
            _sample(trainer, observer)
            report(StepRecord(step=0, validation_loss=trainer.validate()))
        try:
            stopped_by = _steps(trainer, observer, report)
        finally:
            # What is being written when a rank fails becomes whole nevertheless, unless the process is killed.
            trainer.saver.close()
            if board is not None:
                board.close()
    if trainer.is_finished:
        _sample(trainer, observer)
    checkpoint = step_folder(plan.files.checkpoints, trainer.step)
    return Outcome(step=trainer.step, stopped_by=None if trainer.is_finished else stopped_by, checkpoint=str(checkpoint))


def _steps(trainer: Trainer, observer: Observer, report: Callable[[StepRecord], None]) -> str | None:
    """Steps until all are taken or a signal stops them, with a checkpoint of the last; the signal."""
    config, ranks, saved = trainer.config, trainer.ranks, trainer.plan.first_step if trainer.plan.checkpoint else None
    while (stopped_by := ranks.agree_on_stop(failed=trainer.saver.has_failed)) is None and not trainer.is_finished:
        _tell_of_checkpoint(trainer, observer)
        record = trainer.take_step()
        if trainer.is_finished:
            # Before anything is measured: what may fail then takes no step with it.
            trainer.begin_save()
            saved = trainer.step
        if _due(trainer, config.validation_every):
            record = replace(record, validation_loss=trainer.validate())
        if trainer.is_finished:
            by_position, by_context = trainer.validate_by_position(), trainer.validate_by_context()
            record = replace(record, validation_by_position=by_position, validation_by_context=by_context)
        report(record)
        if saved != trainer.step and _due(trainer, config.checkpoint_every):
            trainer.begin_save()
            saved = trainer.step
    trainer.finish_save()
    _tell_of_checkpoint(trainer, observer)
    if saved != trainer.step:
        trainer.begin_save()
        trainer.finish_save()
        _tell_of_checkpoint(trainer, observer)
    return stopped_by


def _tell_of_checkpoint(trainer: Trainer, observer: Observer) -> None:
    if (folder := trainer.saver.written()) is not None:
        observer.saved(int(folder.name.rpartition("-")[2]), folder)


def _due(trainer: Trainer, every: int) -> bool:
    return trainer.is_finished or trainer.step % every == 0


def _sample(trainer: Trainer, observer: Observer) -> None:
    # The sample is generated with plain causal attention, which under a narrower mask would be another model, and by whole layers.
    if trainer.config.sample_tokens and trainer.config.mask == "causal" and trainer.config.tensor == 1:
        observer.sampled(trainer.step, *trainer.write_sample())
