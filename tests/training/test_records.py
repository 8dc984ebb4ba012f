"""Every step is logged with what it cost, and what will not be measured is said."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ringspan.training.trainer import Trainer
from tests.training.support import write_text
from tests.training.trainers import take_steps


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_record_holds_the_formulas_flops_and_their_share_of_all_ranks_peaks(tmp_path: Path, ranks: int):
    def before(trainer: Trainer, step: int) -> None:
        trainer.peak_flops = 1e9

    text = write_text(tmp_path / "text.txt", num_words=2000)
    for taken, trainer in take_steps(tmp_path / "run", ranks, data=str(text), steps=2, accumulate=2, before=before):
        assert trainer.flops is not None
        attention = sum(trainer.flops.per_pair.values()) * 61 * 62 // 2
        for number, step in enumerate(taken, start=1):
            record = step.record
            assert record.seconds is not None and record.model_tflops_per_second is not None
            flops = 4 * (61 * trainer.flops.per_token + attention)
            assert record.model_tflops_per_second == pytest.approx(flops / record.seconds / 1e12)
            assert record.mfu == pytest.approx(flops / record.seconds / (ranks * 1e9))
            assert (record.tokens, record.ranks) == (number * 4 * 61, ranks)
            assert record.tokens_per_second == pytest.approx(4 * 61 / record.seconds)
            assert record.learning_rate and record.gradient_norm
            assert record.joules_per_token is None and record.peak_memory_bytes is None, "a CPU tells neither"


def test_packed_documents_cost_their_own_pairs(tmp_path: Path):
    (tmp_path / "a.txt").write_text("x" * 400)
    for number in range(40):
        (tmp_path / f"b{number}.txt").write_text("y" * 30)
    taken, trainer = take_steps(tmp_path / ".run", 1, data=str(tmp_path), documents="packed", steps=4)[0]
    assert trainer.flops is not None
    costs = {round((step.record.model_tflops_per_second or 0) * (step.record.seconds or 0) * 1e12) for step in taken}
    whole = 2 * (61 * trainer.flops.per_token + sum(trainer.flops.per_pair.values()) * 61 * 62 // 2)
    assert len(costs) > 1
    assert max(costs) <= whole


@pytest.mark.parametrize(
    ("device", "flops", "peak", "energy", "blind", "notes"),
    [
        ("cpu", None, None, False, None, []),
        ("cpu", None, None, False, "no layers", ["shares of the time are not logged: no layers"]),
        ("cuda", 1, 1.0, True, None, []),
        ("cuda", None, 1.0, True, "no layers", ["shares of the time are not logged", "model FLOP/s and MFU are not logged"]),
        ("cuda", 1, None, False, None, ["MFU is not logged: no peak is known for Some GPU in float32", "joules per token are not logged"]),
    ],
)
def test_what_a_gpu_run_will_not_measure_is_said(device: str, flops, peak, energy: bool, blind: str | None, notes: list[str]):
    trainer = SimpleNamespace(
        ranks=SimpleNamespace(device=torch.device(device)),
        flops=flops,
        peak_flops=peak,
        device_name="Some GPU",
        config=SimpleNamespace(dtype="float32"),
        meter=SimpleNamespace(counts_energy=energy, blind=blind),
    )
    said = Trainer.notes(trainer)  # type: ignore[arg-type]
    assert len(said) == len(notes)
    assert all(line.startswith(expected) for line, expected in zip(said, notes, strict=True))
