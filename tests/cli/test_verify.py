"""`ringspan verify`: exact configurations pass, broken code does not, and bad input is refused with exit status 2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ringspan.attention import accumulate, executor
from ringspan.attention.accumulate import Accumulator
from ringspan.cli import main as cli
from ringspan.cli.verify import _as_many_as_there_are
from ringspan.errors import RingspanError
from ringspan.kernels import KERNELS
from ringspan.schedule import PieceBytes
from ringspan.verify import Grid

SMALL = ("--ranks", "2,3", "--strategy", "ring", "--layout", "zigzag", "--mask", "causal", "--length", "13", "--dtype", "float32")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ringspan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line in this process: (exit status, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ringspan", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        said = capsys.readouterr()
        return int(left.value.code or 0), said.out, said.err

    return run


def test_what_is_exact_passes_and_the_table_shows_errors_budgets_reasons_and_bytes(ringspan: Run):
    status, out, err = ringspan("verify", *SMALL)
    assert status == 0 and not err
    assert "2.0e-5" in out and "float32 resolves 1e-7" in out, "the budget and its reason"
    assert "exact" in out and "kB" in out
    assert out.rstrip().splitlines()[-3:][0].startswith("passed: 2 of 2 configurations are exact"), out
    assert "every byte sent is in the schedule" in out.replace("\n", " ")


def test_an_even_choice_of_the_defaults_passes(ringspan: Run):
    status, out, _ = ringspan("verify", "--most", "60")
    assert status == 0, out
    assert "evenly chosen" in out and "passed" in out and "float64" in out and "bfloat16" in out


def test_masks_with_commas_layouts_kernels_heads_and_seeds_are_lists(ringspan: Run, tmp_path: Path):
    file = tmp_path / "found.json"
    status, out, _ = ringspan(
        "verify", "--ranks", "3", "--strategy", "ring,direct", "--layout", "striped,auto", "--mask", "window:4,1,causal&documents:6,7",
        "--length", "13", "--heads", "4", "--kv-heads", "2,4", "--head-dim", "8", "--batch", "1", "--dtype", "float64",
        "--kernel", "reference,torch_cpu", "--seed", "0,5", "--json", str(file),
    )  # fmt: skip
    assert status == 0, out
    found = json.loads(file.read_text())
    assert found["passed"] and found["combinations"] == 64 == len(found["cases"])
    assert {case["mask"] for case in found["cases"]} == {"window:4,1", "causal&documents:6,7"}
    assert {case["seed"] for case in found["cases"]} == {0, 5}


def test_json_has_every_number(ringspan: Run, tmp_path: Path):
    file = tmp_path / "found.json"
    assert ringspan("verify", *SMALL, "--dtype", "bfloat16", "--json", str(file))[0] == 0
    found = json.loads(file.read_text())
    assert found["counts"] == {"exact": 2, "over": 0, "failed": 0, "refused": 0}
    assert found["device"] == "cpu" and found["transport"] == "in-process" and found["torch"] == torch.__version__
    case = found["cases"][0]
    assert case["kernel"] == "torch_cpu" and case["bytes_match"] and case["bytes_sent"] == case["bytes_promised"] > 0
    assert set(case["errors"]) == {"out", "lse", "dq", "dk", "dv"}
    for error in case["errors"].values():
        assert 0 <= error["relative"] <= error["budget"] and error["max_abs"] >= 0 and error["reason"]


# ---- broken code does not pass -----------------------------------------------------------------------------------------------------


def _first_partial_alone(out, lse, others, *, into=None):
    for start, _, other_lse in others:
        rows = slice(start, start + other_lse.shape[0])
        lse[rows] = torch.logaddexp(lse[rows], other_lse)
    if into is not None:
        into[0].copy_(out)
        into[1].copy_(lse)


def _not_zeroed(self: Accumulator, dtype: torch.dtype) -> list[torch.Tensor]:
    rows = self._like.new_empty((len(self.piece), self._like.shape[0], *self._like.shape[2:]), dtype=dtype)
    return [rows.clone() for _ in range(self._parts)]


def _raise(*arguments: Any) -> Any:
    raise RuntimeError("the kernel broke on purpose")


BREAKAGES: dict[str, tuple[Any, str, Any, str]] = {
    "a merge that forgets a partial": (accumulate, "merge_", _first_partial_alone, "out errs by"),
    "memory that is read before it is written": (Accumulator, "_zeros", _not_zeroed, "errs by nan"),
    "a gradient that is not added": (executor.BackwardPass, "combine", lambda self, piece, arrived: None, "dk errs by"),
    "bytes that nobody promised": (PieceBytes, "of", lambda self, kind: 1, "bytes sent"),
    "a kernel that raises": (type(KERNELS["torch_cpu"]), "forward", _raise, "failed"),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_verify_exits_with_1_for(name: str, ringspan: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    target, attribute, wrong, message = BREAKAGES[name]
    monkeypatch.setattr(target, attribute, wrong)
    # Documents leave rows of a rank's first tile for later ones, so that accumulators begin with zeros.
    arguments = (*SMALL, "--mask", "causal&documents:4,9", "--json", str(tmp_path / "found.json"))
    status, out, err = ringspan("verify", *arguments)
    assert status == 1 and not err
    assert message in out.replace("\n", " ") and "not passed" in out
    assert not json.loads((tmp_path / "found.json").read_text())["passed"]


# ---- refusals ----------------------------------------------------------------------------------------------------------------------


def test_refused_combinations_are_listed_with_the_reason_and_are_no_passes(ringspan: Run, tmp_path: Path):
    file = tmp_path / "found.json"
    status, out, _ = ringspan("verify", *SMALL, "--heads", "4,6", "--kv-heads", "3", "--kernel", "auto,flash2", "--json", str(file))
    assert status == 0
    text = out.replace("\n", " ")
    assert "3 KV heads do not divide 4 query heads" in text and "it runs on cuda, and the tensors are on cpu" in text
    assert json.loads(file.read_text())["counts"] == {"exact": 2, "over": 0, "failed": 0, "refused": 6}
    assert "2 of 2 configurations are exact" in text and "6 refused" in text


BAD: dict[str, tuple[tuple[str, ...], str]] = {
    "zero ranks": (("--ranks", "0"), "--ranks 0"),
    "a negative length": (("--length", "-4"), "--length -4"),
    "ranks that are no numbers": (("--ranks", "two"), "no whole number"),
    "an empty entry": (("--layout", "zigzag,,striped"), "an entry is empty"),
    "an unknown strategy": (("--strategy", "spiral"), "there are ring"),
    "an unknown layout": (("--layout", "spiral"), "there are contiguous"),
    "an unknown kernel": (("--kernel", "fast"), "there are auto"),
    "an unknown dtype": (("--dtype", "float8"), "there are float64"),
    "an unknown mask": (("--mask", "triangle"), "the masks are"),
    "an unknown device": (("--device", "tpu"), "there are auto, cpu and cuda"),
    "zero heads": (("--heads", "0"), "--heads 0"),
    "a choice below zero": (("--most", "-1"), "--most"),
    "no time at all": (("--timeout-seconds", "0"), "--timeout-seconds"),
    "a folder as file": (("--json", "."), "--json ."),
    "a file in a folder that there is not": (("--json", "no/such/folder.json"), "No such file"),
    "nothing but refusals": ((*SMALL, "--kernel", "cudnn"), "each was refused"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_an_error_that_teaches_with_exit_status_2(name: str, ringspan: Run):
    arguments, message = BAD[name]
    if name == "nothing but refusals" and torch.cuda.is_available():
        pytest.skip("this machine has the kernel")
    status, _, err = ringspan("verify", *arguments)
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1 and message in err, err
    assert "Try: " in err


# ---- real ranks --------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_under_torchrun_real_ranks_are_verified_and_rank_0_speaks(tmp_path: Path):
    file = tmp_path / "found.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "ringspan.cli.main",
               "verify", "--most", "40", "--device", "cpu", "--json", str(file)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("passed: ") == 1
    found = json.loads(file.read_text())
    assert found["passed"] and found["transport"] == "gloo" and {case["num_ranks"] for case in found["cases"]} == {2}
    assert found["counts"]["exact"] >= 20 and not found["counts"]["failed"]


def test_under_torchrun_the_number_of_ranks_is_torchruns():
    assert _as_many_as_there_are(Grid(), 5, given=False).num_ranks == (5,)
    assert _as_many_as_there_are(Grid(num_ranks=(5,)), 5, given=True).num_ranks == (5,)
    with pytest.raises(RingspanError, match=r"--ranks 2,3 under torchrun: it started 5"):
        _as_many_as_there_are(Grid(num_ranks=(2, 3)), 5, given=True)
