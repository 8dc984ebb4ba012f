"""The recipes run as they are, and train on two ranks the model that they train on one."""

from __future__ import annotations

import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

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
    "hf_trainer.py": ("--accumulate", 2),
    "own_loop.py": ("--accumulate", 2),
    "torchtitan_style.py": ("--global-batch-size", 2, "--checkpoint-every", 2),
}


def run_example(name: str, start: Path, out: Path, ranks: int) -> dict[str, torch.Tensor]:
    """The weights that it leaves."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    options = ["--model", start / "model", "--data", start / "text.txt", "--out", out, "--context", 61, "--steps", 4, *HOW[name]]
    # Hugging Face's Trainer needs no launcher for one rank.
    launcher = [sys.executable] if ranks == 1 and name == "hf_trainer.py" else torchrun
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
    halfway = Path("checkpoints", "step-00000002")
    if (tmp_path / "on-1" / halfway).exists():
        # Two ranks go on from what one has saved.
        shutil.copytree(tmp_path / "on-1" / halfway, tmp_path / "on-2" / halfway)
    split = run_example(name, start, tmp_path / "on-2", 2)
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
