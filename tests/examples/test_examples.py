"""The recipes run as they are, and train on two ranks the model that they train on one."""

from __future__ import annotations

import math
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainingArguments

from ringspan.training.export import byte_tokenizer
from ringspan.training.model import build_model
from tests.support.errors import relative
from tests.training.support import environment, write_text

EXAMPLES = Path(__file__).parents[2] / "examples"
BUDGET = 2e-4
"""Relative, of how far each weight moved in four steps: float32, and AdamW divides by the gradients' size."""


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer of bytes, and a text."""
    folder = tmp_path_factory.mktemp("start")
    model = build_model("pico", vocabulary_size=256, context=64, seed=3)
    model.save_pretrained(folder / "model")
    (folder / "model" / "tokenizer.json").write_text(byte_tokenizer())
    (folder / "model" / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    write_text(folder / "text.txt", num_words=300)
    return folder


HOW: dict[str, tuple[object, ...]] = {
    "accelerate_loop.py": ("--accumulate", 2),
    "hf_trainer.py": ("--accumulate", 2, "--save-every", 2),
    "own_loop.py": ("--accumulate", 2),
    "torchtitan_style.py": ("--global-batch-size", 2, "--checkpoint-every", 2),
}


HALFWAY = (Path("checkpoints", "step-00000002"), Path("checkpoint-2"))
"""What they save after two steps of four."""


def run_example(name: str, start: Path, out: Path, ranks: int, *more: str) -> dict[str, torch.Tensor]:
    """The weights that it leaves."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    options = ["--model", start / "model", "--data", start / "text.txt", "--out", out, "--context", 61, "--steps", 4, *HOW[name], *more]
    # Hugging Face's Trainer and accelerate need no launcher for one rank.
    launcher = [sys.executable] if ranks == 1 and name in ("hf_trainer.py", "accelerate_loop.py") else torchrun
    command = [*launcher, EXAMPLES / name, *options]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=240, env=environment())
    assert result.returncode == 0, result.stderr + result.stdout
    return load_file(out / "model.safetensors")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_an_example_trains_on_two_ranks_what_it_trains_on_one(name: str, start: Path, tmp_path: Path):
    before = load_file(start / "model" / "model.safetensors")
    alone = run_example(name, start, tmp_path / "on-1", 1)
    saved = [halfway for halfway in HALFWAY if (tmp_path / "on-1" / halfway).exists()]
    for halfway in saved:
        # Two ranks go on from what one has saved.
        shutil.copytree(tmp_path / "on-1" / halfway, tmp_path / "on-2" / halfway)
    resumed = ["--resume"] if saved and name == "hf_trainer.py" else []
    split = run_example(name, start, tmp_path / "on-2", 2, *resumed)
    assert alone.keys() == split.keys() == before.keys()
    for weight, first in before.items():
        moved = alone[weight] - first
        assert moved.abs().max() > 1e-4, f"{weight} has not been trained"
        error = relative(split[weight] - first, moved)
        assert error < BUDGET, f"{weight} moved otherwise, by {error:.1e}"


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_an_example_whose_text_is_shorter_than_its_context_says_so_before_ranks_meet(
    name: str, start: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    size = (start / "text.txt").stat().st_size
    given = ["--model", start / "model", "--data", start / "text.txt", "--out", start / "never", "--context", size + 1]
    monkeypatch.setattr(sys, "argv", [name, *map(str, given)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert ended.value.code == 2
    assert f"--context {size + 1}: {start / 'text.txt'} has {size} tokens; take more text, or --context {size}" in capsys.readouterr().err


def trainer_recipe() -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / "hf_trainer.py"))


@pytest.mark.parametrize("name", ["label_smoothing_factor", "neftune_noise_alpha", "compute_metrics"])
def test_the_trainers_recipe_refuses_what_the_trainer_would_do_to_a_shard_as_if_it_were_a_sequence(name: str, start: Path, tmp_path: Path):
    options = {} if name == "compute_metrics" else {name: 0.1}
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **options)
    metrics = {"compute_metrics": lambda prediction: {}} if name == "compute_metrics" else {}
    model = AutoModelForCausalLM.from_pretrained(start / "model")
    with pytest.raises(ValueError, match=f"{name}=.*of each shard by itself"):
        trainer_recipe()["ContextParallelTrainer"](model=model, args=arguments, **metrics)


@pytest.mark.parametrize(("batch", "accumulate"), [(1, 1), (2, 1), (1, 4), (3, 2)])
def test_the_trainers_recipe_reads_in_any_epoch_what_it_would_have_read_without_a_stop(batch: int, accumulate: int):
    rows, steps = list(range(11)), max(1, math.ceil(11 // batch / accumulate))
    settings = SimpleNamespace(train_batch_size=batch, gradient_accumulation_steps=accumulate, seed=7)

    def order(global_step: int) -> list[int]:
        trainer = SimpleNamespace(train_dataset=rows, args=settings, state=SimpleNamespace(global_step=global_step))
        return list(trainer_recipe()["Order"](trainer))

    epochs = [order(epoch * steps) for epoch in range(3)]
    assert all(sorted(epoch) == rows for epoch in epochs) and len({tuple(epoch) for epoch in epochs}) == 3
    # A run that goes on asks in the middle of an epoch, and skips what that had read.
    assert [order(step) for step in range(2 * steps)] == [epoch for epoch in epochs[:2] for _ in range(steps)]
