"""What `ringspan train` says of a run that it starts all the same, once, under the printed plan."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ringspan.cli.main import main
from ringspan.training import launch
from ringspan.training.loop import Outcome
from ringspan.training.model import build_model

OWN, CONTEXT = 64, 193


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """The notes of `ringspan train` with these arguments, in a folder that holds a text and models; its ranks are not started."""
    (tmp_path / "text.txt").write_text("a few words to train on, again and again. " * 100)
    build_model("pico", vocabulary_size=256, context=OWN, seed=3).save_pretrained(tmp_path / "tiny")
    monkeypatch.setattr(launch, "launch", lambda *arguments: Outcome(step=1, checkpoint="", stopped_by=None))
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: object) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["ringspan", "train", "--data", "text.txt", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]

    return run


def test_a_context_above_the_models_own_is_noted_with_what_stretches_it(notes):
    model = ("--model", "./tiny", "--tokenizer", "bytes")
    assert notes(*model, "--context", OWN) == []
    (said,) = notes(*model, "--context", CONTEXT)
    assert said.startswith(f"note: --context {CONTEXT} is above the model's own {OWN} tokens, and later positions are new to it")
    assert said.endswith(": --rope-scaling yarn stretches them")
    assert notes(*model, "--context", CONTEXT, "--rope-scaling", "yarn") == []
    assert notes("--model", "pico", "--context", CONTEXT) == [], "a new model is made for its context"


def test_a_name_of_ringspans_own_that_a_folder_here_bears_too_is_noted(notes, tmp_path: Path):
    of_model, of_tokenizer = (
        f"note: {option} {name} is ringspan's own; for what is called so in this folder: {option} ./{name}"
        for option, name in (("--model", "tiny"), ("--tokenizer", "bytes"))
    )
    assert notes("--model", "tiny", "--context", OWN) == [of_model]
    assert notes("--model", "./tiny", "--tokenizer", "bytes", "--context", OWN) == []
    (tmp_path / "bytes").mkdir()
    assert notes("--model", "tiny", "--context", OWN) == [of_model, of_tokenizer]
