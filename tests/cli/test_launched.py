"""Commands under a launcher: all that torchrun sets, or nothing of it."""

from __future__ import annotations

import sys

import pytest

from ringspan.cli import main as cli
from ringspan.transport import is_launched

COMMANDS = (["verify"], ["bench", "--length", "64", "--device", "cpu"], ["trace", "ring", "--length", "64"], ["train", "--steps", "1"])


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_part_of_what_torchrun_sets_is_told_from_all_of_it(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert not is_launched()
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["ringspan", *command])
    with pytest.raises(SystemExit) as left:
        cli.main()
    said = capsys.readouterr().err
    assert left.value.code == 2 and said.count("\n") == 1
    assert "MASTER_ADDR, LOCAL_WORLD_SIZE not set" in said and "Try: torchrun --nproc-per-node N" in said
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert is_launched()
