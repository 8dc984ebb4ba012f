"""`ringspan show`, from its arguments to what it prints, draws and refuses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from ringspan.cli.show import command, parse_options, parse_weights
from ringspan.errors import RingspanError

app = typer.Typer()
app.command()(command)


def show(*arguments: str) -> str:
    """What it prints; a refusal is raised."""
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "80", "TERM": "dumb"})
    if result.exception is not None:
        raise result.exception
    return result.stdout


def test_it_shows_the_schedule_the_work_the_bytes_and_the_proof():
    text = show("ring", "--ranks", "4", "--layout", "zigzag", "--mask", "causal", "--length", "32")
    for part in ("q0[4:8]×kv3", "0–3, 28–31", "imbalance 1.00", "r3→r0", "proved: every allowed pair exactly once (528)"):
        assert part in text
    assert "\x1b" not in text and max(map(len, text.splitlines())) <= 80


def test_the_direction_and_the_sizes_change_what_is_shown():
    backward = show("--layout", "contiguous", "--direction", "backward", "--heads", "8", "--kv-heads", "2", "--head-dim", "64")
    assert "+dkv0←r3" in backward
    assert "8 heads, 2 KV heads, 64 wide, 2 bytes an element, 4 in results." in " ".join(backward.split())
    assert "+dkv" not in show("--layout", "contiguous")


def test_weights_and_options_reach_the_layout_and_the_strategy():
    assert "0–5, 26–31" in show("--ranks", "2", "--layout", "weighted", "--weights", "6,10")
    assert "kv0→r2@2" in show("double_ring", "--mask", "full", "--option", "window=2")
    inner = show("two_dimensional", "--ranks", "4", "--option", "ulysses=1", "--option", "inner=all_gather")
    assert "two_dimensional ulysses=1 inner=all_gather" in inner


def test_auto_chooses_a_strategy_and_a_layout_and_says_why():
    text = " ".join(show("auto", "--layout", "auto", "--machine", "cpu", "--length", "4096").split())
    assert re.match(r"[\w =]+ · auto · causal 4 ranks · 4 096 positions · forward auto chose \w+: .* predicted on CPU processes", text)


def test_it_draws_a_png_and_says_where(tmp_path: Path):
    path = tmp_path / "ring.png"
    assert f"drawn: {path}" in show("--png", str(path))
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rink"], "the strategies are ring"),
        (["--layout", "zagzig"], "the layouts are contiguous"),
        (["--mask", "casual"], "the masks are causal"),
        (["--mask", ""], "the masks are causal"),
        (["--mask", "window:-3"], "at least 0"),
        (["--ranks", "0"], "Try: ranks 1"),
        (["--ranks", "-4"], "ranks -4"),
        (["--ranks", "100000"], "Try: ranks 128"),
        (["--length", "0"], "length 0"),
        (["--length", "9" * 30], "length 999"),
        (["--heads", "0"], "heads 0"),
        (["--heads", "8", "--kv-heads", "5"], "Try: --kv-heads 4"),
        (["--head-dim", "-2"], "head-dim -2"),
        (["--dtype-bytes", "3"], "1, 2, 4 or 8 bytes"),
        (["--direction", "sideways"], "forward or backward"),
        (["--weights", "1,2,3,4"], "Only 'weighted' takes weights"),
        (["--layout", "weighted", "--weights", "1,2"], "one finite weight"),
        (["--layout", "weighted", "--weights", "1,2,,4"], "numbers joined by commas"),
        (["--layout", "weighted", "--weights", "0,0,0,0"], "above 0"),
        (["--layout", "weighted", "--weights=-1,1,1,1"], "the least -1.0"),
        (["--option", "stages=2"], "A strategy is given its own options alone"),
        (["--option", "stages"], "a name and a value"),
        (["auto", "--machine", "abacus"], "the machines are cuda, cpu"),
        (["--png", "nowhere/ring.png"], "No such file or directory"),
        (["--png", "ring.svg"], "Pictures are PNG files"),
    ],
)
def test_bad_input_is_refused_with_an_error_that_teaches(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RingspanError, match=message):
        show(*arguments)
    assert list(tmp_path.iterdir()) == []


def test_weights_and_options_are_read_as_numbers_and_words():
    assert parse_weights(None) is None
    assert parse_weights("1, 2.5,0") == (1.0, 2.5, 0.0)
    assert parse_options(["stages=2", "inner = ring", "window=-1"]) == {"stages": 2, "inner": "ring", "window": -1}


def test_a_terminal_without_unicode_gets_question_marks_and_no_traceback():
    result = CliRunner(charset="ascii").invoke(app, [], env={"COLUMNS": "80"})
    assert result.exit_code == 0 and "q0?kv0" in result.stdout
