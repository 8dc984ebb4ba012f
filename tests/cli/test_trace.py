"""`ringspan trace`, from its arguments to what it prints, draws, writes and refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ringspan.cli import main as cli
from ringspan.cli.trace import _ranks
from ringspan.errors import RingspanError
from ringspan.strategies import MACHINES

ROOT = Path(__file__).parents[2]
SMALL = ("--ranks", "3", "--length", "61", "--heads", "4", "--head-dim", "8", "--device", "cpu")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ringspan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line in this process: (exit status, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ringspan", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        said = capsys.readouterr()
        return int(left.value.code or 0), said.out, said.err

    return run


def test_it_prints_steps_and_words_draws_and_writes(ringspan: Run, tmp_path: Path):
    png, chrome, found = tmp_path / "trace.png", tmp_path / "trace.json", tmp_path / "found.json"
    status, out, err = ringspan("trace", "ring", *SMALL, "--png", str(png), "--chrome", str(chrome), "--json", str(found))
    assert status == 0
    assert not err
    assert out.startswith("ring · zigzag · causal   3 ranks · 61 positions · 4/2 heads of 8, float32")
    for name in ("rates", "hidden", "waiting", "held up", "to change", "mind", "all", "measured", "predicted", "ratio"):
        assert name in out
    assert "3 ranks are threads of one process" in out
    assert png.read_bytes().startswith(b"\x89PNG")
    assert {event["ph"] for event in json.loads(chrome.read_text())["traceEvents"]} == {"X", "M"}
    assert json.loads(found.read_text())["case"]["length"] == 61
    assert max(map(len, out.splitlines()[:-3])) <= 100


def test_rates_of_another_machine_can_be_named(ringspan: Run, tmp_path: Path):
    found = tmp_path / "found.json"
    status, out, _ = ringspan("trace", *SMALL, "--machine", "cuda", "--json", str(found))
    assert status == 0
    assert "the prediction is for NVLink GPUs" in " ".join(out.split())
    assert json.loads(found.read_text())["machine"]["flops_per_second"] == MACHINES["cuda"].flops_per_second


def test_auto_options_and_weights_reach_the_run(ringspan: Run, tmp_path: Path):
    found = tmp_path / "found.json"
    assert ringspan("trace", "auto", "--layout", "auto", *SMALL, "--json", str(found))[0] == 0
    chosen = json.loads(found.read_text())
    assert chosen["case"]["strategy"] != "auto"
    assert chosen["case"]["strategy"] in chosen["reason"]
    status, out, _ = ringspan(
        "trace", "all_gather", *SMALL, "--option", "stages=2", "--layout", "weighted", "--weights", "0,1,2", "--mask", "window:7"
    )
    assert status == 0
    assert out.startswith("all_gather stages=2 · weighted · window:7")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rink"], "there are ring"),
        (["--layout", "zagzig"], "there are contiguous"),
        (["--mask", "casual"], "the masks are causal"),
        (["--mask", "documents:10,10"], "61"),
        (["--ranks", "0"], "Try: --ranks 1"),
        (["--length", "0"], "Try: --length 1"),
        (["--heads", "4", "--kv-heads", "3"], "Try: --kv-heads 2"),
        (["--head-dim", "0"], "Try: --head-dim 1"),
        (["--batch", "0"], "Try: --batch 1"),
        (["--dtype", "float8"], "there are float64"),
        (["--kernel", "flesh2"], "there are auto"),
        (["--kernel", "cudnn"], "A kernel that was asked for is never replaced"),
        (["--device", "tpu"], "there are auto, cpu and cuda"),
        (["--machine", "abacus"], "there are measured, cuda, cpu"),
        (["--weights", "1,2,3"], "Only 'weighted' takes weights"),
        (["--option", "stages=2"], "A strategy is given its own options alone"),
        (["--option", "stages"], "a name and a value"),
        (["--timeout-seconds", "0"], "A rank waits for a while"),
        (["--png", "trace.svg"], "Pictures are PNG files"),
        (["--png", "nowhere/trace.png"], "No such file or directory"),
        (["--chrome", "nowhere/trace.json"], "The file can be written"),
        (["--json", "nowhere/trace.json"], "The file can be written"),
    ],
)
def test_bad_input_is_refused_with_status_2_and_leaves_nothing(
    ringspan: Run, arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    status, out, err = ringspan("trace", *SMALL, *arguments)
    assert status == 2
    assert message in err
    assert not out
    assert list(tmp_path.iterdir()) == []


def test_auto_with_options_is_refused(ringspan: Run):
    status, _, err = ringspan("trace", "auto", *SMALL, "--option", "stages=2")
    assert status == 2
    assert "it chooses options itself" in err


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "ringspan.cli.main", "trace"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    return subprocess.run([*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_real_ranks_are_gathered_on_the_first_and_it_alone_prints(tmp_path: Path):
    ended = torchrun("ring", "--length", "61", "--heads", "4", "--head-dim", "8", "--device", "cpu", "--json", str(tmp_path / "found.json"))
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("held up") == 1
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["setting"]["transport"], found["case"]["num_ranks"]) == ("gloo", 2)
    assert {event["rank"] for event in found["measured"]["events"]} == {0, 1}
    # One clock: within a second of each other, whatever each process began with.
    assert all(0 <= event["start"] <= event["stop"] < 60 for event in found["measured"]["events"])
    assert {(flight["source"], flight["target"]) for flight in found["measured"]["flights"]} == {(0, 1), (1, 0)}


@pytest.mark.slow
def test_real_ranks_refuse_together():
    ended = torchrun("ring", "--device", "cpu", "--png", "nowhere/trace.png")
    assert ended.returncode != 0
    assert "No such file or directory" in ended.stderr
    assert "did not answer" not in ended.stderr


def test_real_ranks_are_as_many_as_torchrun_started():
    world: Any = SimpleNamespace(transport=SimpleNamespace(size=2))
    assert _ranks(None, world) == _ranks(2, world) == 2
    with pytest.raises(RingspanError, match="Real ranks are as many as torchrun started"):
        _ranks(3, world)
