"""A poisoned step, over real steps of the trainer: skipped without a trace, or ending the run before anything is lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ringspan.errors import RingspanError
from ringspan.training.checkpoint import save_checkpoint
from ringspan.training.prepare import prepare
from ringspan.training.trainer import Trainer
from tests.training.support import write_text
from tests.training.trainers import ranks_as_threads, take_steps


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt", num_words=2000)


def leave_out(trainer: Trainer, taken: int) -> None:
    """Skips the third update, without poison."""
    judge = type(trainer.guard).judge
    trainer.guard.judge = lambda *a: "nan" if taken == 2 else judge(trainer.guard, *a)  # type: ignore[method-assign]


def poison_at(step: int, healed: dict[int, torch.Tensor]):
    """Makes one weight NaN for the step after `step`, and puts it right after it."""

    def before(trainer: Trainer, taken: int) -> None:
        weight = trainer.model.lm_head.weight.data
        if taken == step:
            healed[trainer.ranks.rank] = weight.clone()
            weight[3, 3] = float("nan")
        elif taken == step + 1:
            weight.copy_(healed[trainer.ranks.rank])

    return before


def test_a_skipped_step_leaves_weights_moments_and_later_steps_as_if_its_batch_had_not_been(text: Path, tmp_path: Path):
    """Beside a run that is not poisoned and whose third update is left out by hand."""

    expected = take_steps(tmp_path / "left-out", 1, data=str(text), before=leave_out)[0]
    for ranks in (1, 2):
        for taken, trainer in take_steps(tmp_path / f"skip-{ranks}", ranks, data=str(text), on_nan="skip", before=poison_at(2, {})):
            assert [step.record.skipped for step in taken] == [None, None, "nan", None, None]
            assert trainer.optimizer.updates == 4
            for ours, theirs in zip(taken[3:], expected[0][3:], strict=True):
                assert ours.record.loss == pytest.approx(theirs.record.loss, rel=1e-5)
            if ranks == 1:
                weights = zip(trainer.model.parameters(), expected[1].model.parameters(), strict=True)
                assert all(torch.equal(a, b) for a, b in weights)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_poisoned_step_stops_every_rank_by_default_and_moves_no_weight(text: Path, tmp_path: Path, ranks: int):
    weights: dict[int, torch.Tensor] = {}
    trainers: dict[int, Trainer] = {}
    poison = poison_at(2, weights)

    def before(trainer: Trainer, taken: int) -> None:
        trainers[trainer.ranks.rank] = trainer
        poison(trainer, taken)

    with pytest.raises(RingspanError, match="step 3: its loss is nan and the norm of its gradients nan"):
        take_steps(tmp_path / "stop", ranks, data=str(text), before=before)
    for rank, trainer in trainers.items():
        weight = trainer.model.lm_head.weight.detach()
        assert torch.equal(weight[4:], weights[rank][4:])
        assert trainer.optimizer.updates == 2


def test_a_weight_that_stays_poisoned_ends_a_run_that_skips(text: Path, tmp_path: Path):
    def before(trainer: Trainer, taken: int) -> None:
        if taken == 1:
            trainer.model.lm_head.weight.data[3, 3] = float("nan")

    with pytest.raises(RingspanError, match=r"step 12: .*10 steps in a row were skipped"):
        take_steps(tmp_path / "run", 1, data=str(text), steps=30, on_nan="skip", before=before)


def test_a_spike_is_skipped_by_its_rule(text: Path, tmp_path: Path):
    def before(trainer: Trainer, taken: int) -> None:
        if taken in (3, 4):
            trainer.model.lm_head.weight.data.mul_(60.0 if taken == 3 else 1 / 60.0)

    taken, _ = take_steps(tmp_path / "run", 2, data=str(text), on_spike="skip", spike_window=2, spike_factor=1.5, before=before)[0]
    assert [step.record.skipped for step in taken] == [None, None, None, "spike", None]


def test_a_run_that_skipped_a_step_goes_on_from_its_checkpoint_as_if_it_had_never_stopped(text: Path, tmp_path: Path):
    """AdamW's bias correction counts updates and not steps, and the spike rule remembers losses."""
    given = {"data": str(text), "schedule": "constant", "on_spike": "skip", "spike_window": 3, "spike_factor": 3.0}
    whole, uninterrupted = take_steps(tmp_path / "whole", 1, before=leave_out, **given)[0]
    _, trainer = take_steps(tmp_path / "half", 1, before=leave_out, **given, steps=4)[0]
    save_checkpoint(trainer.plan.files.checkpoints, trainer._snapshot(), keep=2)
    plan = prepare({"out": str(tmp_path / "half"), "steps": 5}, resume=True)

    def go_on(place: object) -> tuple[float | None, Trainer]:
        resumed = Trainer(plan, place)  # type: ignore[arg-type]
        assert (resumed.optimizer.updates, len(resumed.guard.losses)) == (3, 3)
        return resumed.take_step().loss, resumed

    with ranks_as_threads() as threads:
        ((loss, resumed),) = threads(1, go_on)
    assert loss == whole[-1].record.loss
    assert resumed.guard.losses == uninterrupted.guard.losses
    assert all(torch.equal(a, b) for a, b in zip(resumed.model.parameters(), uninterrupted.model.parameters(), strict=True))
