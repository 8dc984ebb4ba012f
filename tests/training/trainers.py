"""The trainer of `ringspan train` on ranks that are threads of this process, step by step."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ringspan
from ringspan.training import trainer as trainer_module
from ringspan.training.metrics import StepRecord
from ringspan.training.prepare import prepare
from ringspan.training.trainer import Trainer
from tests.support.errors import relative

GIVEN = {"model": "pico", "context": 61, "batch_size": 2, "steps": 5, "device": "cpu", "warmup_steps": 2, "sample_tokens": 0}


@dataclass(frozen=True)
class InProcessRanks:
    """What the trainer asks of `ringspan.training.ranks.Ranks` for its steps."""

    group: Any
    saving: None = None

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def rank(self) -> int:
        return self.group.rank

    @property
    def num_ranks(self) -> int:
        return self.group.size

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def gather(self, values: list[float]) -> list[list[float]]:
        return self.group.gather_objects(values)

    def on_first(self, function: Callable[[], Any]) -> Any:
        return self.group.gather_objects(function() if self.is_first else None)[0]

    def require_equal(self, value: float, what: str, among: int = 0) -> None:
        said = self.gather([value])
        assert all(theirs == said[0] for theirs in said), what


@contextmanager
def ranks_as_threads() -> Iterator[Callable[[int, Callable[[Any], Any]], list[Any]]]:
    """Gives `run(num_ranks, function)`, in whose threads a Trainer finds its group."""
    mine = threading.local()
    patch = pytest.MonkeyPatch()
    one_at_a_time = threading.Lock()

    def alone(function: Callable[..., Any]) -> Callable[..., Any]:
        # Torch's random numbers are the process's: ranks that are threads make their first weights one after the other.
        def run(*arguments: Any, **keywords: Any) -> Any:
            with one_at_a_time:
                return function(*arguments, **keywords)

        return run

    patch.setattr(trainer_module, "make_mesh", lambda *arguments: mine.group)
    for name in ("build_model", "rebuild_model", "add_adapters"):
        patch.setattr(trainer_module, name, alone(getattr(trainer_module, name)))

    def run(num_ranks: int, function: Callable[[Any], Any]) -> list[Any]:
        def on_rank(group: Any) -> Any:
            mine.group = group
            return function(InProcessRanks(group))

        return ringspan.run_in_process(num_ranks, on_rank)

    try:
        yield run
    finally:
        patch.undo()


@dataclass(frozen=True)
class Taken:
    """A step: its record, and the gradients that it followed, summed over ranks and passes."""

    record: StepRecord
    gradients: dict[str, Tensor]


def take_steps(
    out: Path, ranks: int, *, before: Callable[[Trainer, int], None] | None = None, **given: Any
) -> list[tuple[list[Taken], Trainer]]:
    """All steps of a run with the options `given`, on each rank.

    Args:
        before: called with the trainer and the number of steps taken, before each step.
    """
    plan = prepare({**GIVEN, **given, "ranks": ranks, "out": str(out)}, resume=False)

    def run(place: Any) -> tuple[list[Taken], Trainer]:
        trainer = Trainer(plan, place)
        taken: list[Taken] = []
        while not trainer.is_finished:
            if before is not None:
                before(trainer, trainer.step)
            seen: dict[str, Tensor] = {}
            norm = trainer.optimizer.gradient_norm

            def recorded(seen: dict[str, Tensor] = seen, norm: Callable[[], Tensor] = norm, trainer: Trainer = trainer) -> Tensor:
                value = norm()
                seen.update({name: master.grad.clone() for name, master in trainer.optimizer.masters.items() if master.grad is not None})
                return value

            trainer.optimizer.gradient_norm = recorded  # type: ignore[method-assign]
            record = trainer.take_step()
            trainer.optimizer.gradient_norm = norm  # type: ignore[method-assign]
            taken.append(Taken(record, seen))
        return taken, trainer

    with ranks_as_threads() as threads:
        return threads(ranks, run)


def assert_same_steps(found: list[Taken], expected: list[Taken], budgets: tuple[float, float], what: str) -> None:
    """Losses, norms and every gradient; one budget for the first step, another for those whose weights differ already."""
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        budget = budgets[0] if ours.record.step == 1 else budgets[1]
        assert ours.record.skipped == theirs.record.skipped
        assert abs(ours.record.loss - theirs.record.loss) <= budget * theirs.record.loss, f"{what}, step {ours.record.step}"
        assert ours.gradients.keys() == theirs.gradients.keys()
        for name, gradient in theirs.gradients.items():
            error = relative(ours.gradients[name], gradient)
            assert error <= budget, f"{what}, step {ours.record.step}: the gradient of {name} is off by {error:.1e}"
