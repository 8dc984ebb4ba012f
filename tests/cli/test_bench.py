"""`ringspan bench`: checked, then timed; what is wrong is not timed, and exit statuses say what happened."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ringspan.attention import Sequence
from ringspan.bench import PEERS, Shape
from ringspan.bench.passes import Passes, passes_of
from ringspan.cli import main as cli
from ringspan.kernels import KERNELS
from tests.training.forked import Command
from tests.training.processes import rank_process, wait_until
from tests.training.support import environment

Run = Callable[..., tuple[int, str, str]]
SMALL = ("--device", "cpu", "--ranks", "1", "--length", "48", "--heads", "4/2", "--head-dim", "16", "--warmup", "1", "--peers", "none")


@pytest.fixture
def ringspan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line in this process: (exit status, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ringspan", "bench", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        said = capsys.readouterr()
        return int(left.value.code or 0), said.out, said.err

    return run


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


# ---- a real run ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_over_gloo_are_timed_and_every_number_comes_from_samples(tmp_path: Path):
    files = [tmp_path / name for name in ("bench.json", "bench.png", "bench.md")]
    command = [sys.executable, "-m", "ringspan.cli.main", "bench", "--device", "cpu", "--ranks", "2", "--length", "64,96", "--heads", "4/2",
               "--head-dim", "16", "--strategy", "ring", "--ablate", "--share", "--documents", "realistic:1", "--mask", "causal",
               "--json", str(files[0]), "--png", str(files[1]), "--markdown", str(files[2])]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("passed: ") == 1, "rank 0 alone speaks"
    assert all(file.stat().st_size for file in files) and files[1].read_bytes().startswith(b"\x89PNG")
    found = read(files[0])
    about = found["about"]
    assert found["passed"] and found["finished"] and "Not finished" not in files[2].read_text()
    assert about["num_ranks"] == 2 and about["backend"] == "gloo" and about["versions"]["torch"]
    assert about["samples"] == 10 and about["warmup"] == 5 and about["dtypes"] == ["float32"]
    ours = [record for record in found["records"] if record["kind"] == "ringspan"]
    assert [record["shape"]["tokens"] for record in ours] == [64] * 5 + [96] * 5
    assert {record["setting"]["note"] for record in ours} == {
        "everything on", "no overlap", "contiguous, not zigzag", "one KV head at a time", "1 of 1 stages"
    }  # fmt: skip
    for record in ours:
        assert record["status"] == "timed" and record["yardstick"] == "float64" and record["kernel"] == "torch_cpu"
        assert sum(record["shape"]["document_lengths"]) == record["shape"]["length"] == 2 * record["shape"]["tokens"]
        assert record["bytes_sent"] == record["bytes_promised"] > 0
        assert record["promised_bytes"]["both"]["total"] == sum(
            size for part, size in record["promised_bytes"]["both"].items() if part != "total"
        )
        assert all(error["relative"] <= error["budget"] for error in record["errors"].values()) and len(record["errors"]) == 4
        (alone,) = (
            other for other in found["records"] if other["kind"] == "one device" and other["shape"] == record["shape"]
        )  # fmt: skip
        for which in ("forward", "both"):
            timed, base = record["passes"][which], alone["passes"][which]
            beside = timed["one_device_samples_ms"]
            assert len(timed["samples_ms"]) == 10 and timed["median_ms"] == statistics.median(timed["samples_ms"]) > 0
            assert timed["ratio_to_one_device"] == pytest.approx(statistics.median(beside) / 2 / timed["median_ms"])
            assert len(beside) == 10 and set(beside) < set(base["samples_ms"]) and len(base["samples_ms"]) == 5 + 5 * 10
            assert timed["one_device_kernel"] == "torch_cpu"
            share = timed["share_samples_ms"]
            assert len(share) == 10 and timed["ratio_to_share"] == pytest.approx(statistics.median(share) / timed["median_ms"])
            assert base["share_samples_ms"] is None, "of ringspan's alone"
    assert not list(tmp_path.glob("*.partial"))


# ---- what is cut off keeps what was timed --------------------------------------------------------------------------------------------


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_that_is_ended_in_its_second_problem_leaves_the_first(number: signal.Signals, status: int, tmp_path: Path):
    found, report, printed = tmp_path / "bench.json", tmp_path / "bench.md", tmp_path / "out"
    # The second takes many seconds: nothing of it is timed yet.
    command = Command(
        ["bench", "--device", "cpu", "--ranks", "2", "--length", "48,16384", *SMALL[6:], "--strategy", "ring", "--json", str(found),
         "--markdown", str(report)], environment(), tmp_path,
    )  # fmt: skip
    try:
        wait_until(lambda: printed.exists() and "\nforward + backward, eager:" in printed.read_text(), "the first table")
        going_on = read(found)
        ranks = [rank_process(command.pid, rank) for rank in range(2)]
        command.send_signal(number)
        _, said = command.communicate(60)
        deadline = time.monotonic() + 10.0
        while (outliving := [rank for rank in ranks if is_running(rank)]) and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        command.kill()
    for rank in outliving:
        os.kill(rank, signal.SIGKILL)
    assert command.returncode == status and not outliving
    left = read(found)
    assert left == going_on and not left["finished"] and not left["passed"]
    records = [(record["kind"], record["shape"]["tokens"], len(record["passes"]["both"]["samples_ms"])) for record in left["records"]]
    assert records == [("one device", 48, 15), ("ringspan", 48, 10)]
    assert "**Not finished**" in report.read_text() and "| ring zigzag torch_cpu | eager |" in report.read_text()
    assert said == ("" if number == signal.SIGKILL else f"ended by {number.name}: not finished, 2 timed, kept in {found} and {report}\n")


def test_one_rank_that_is_ended_says_what_it_has(ringspan: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    found = tmp_path / "b.json"
    found.write_text(json.dumps({"finished": True, "passed": True, "records": ["of a run before this one"]}))

    def end(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(KERNELS["torch_cpu"], "forward", end)
    before = signal.getsignal(signal.SIGTERM)
    status, _, said = ringspan(*SMALL, "--strategy", "ring", "--json", str(found))
    assert (status, said) == (143, f"ended by SIGTERM: not finished, 0 timed, kept in {found}\n")
    assert not read(found)["finished"] and read(found)["records"] == [] and signal.getsignal(signal.SIGTERM) == before
    status, _, said = ringspan(*SMALL, "--strategy", "ring")
    assert status == 143 and "0 timed, above, and nowhere else: --json FILE would have kept them" in said


# ---- what is wrong is not timed ------------------------------------------------------------------------------------------------------


def test_one_rank_is_timed_in_this_process(ringspan: Run, tmp_path: Path):
    status, out, err = ringspan(*SMALL, "--strategy", "ring,auto", "--json", str(tmp_path / "b.json"))
    assert (status, err) == (0, "")
    assert "passed: 3 timed after they were found right" in out and "ratio" in out and "no joules" in out
    found = read(tmp_path / "b.json")
    assert found["finished"]
    samples = [(record["kind"], len(record["passes"]["both"]["samples_ms"])) for record in found["records"]]
    assert samples == [("one device", 25), ("ringspan", 10), ("ringspan", 10)], "five before, and as many as each beside it"


def test_a_broken_kernel_is_refused_and_nothing_of_it_is_timed(ringspan: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    kernel = KERNELS["torch_cpu"]
    right = kernel.backward
    monkeypatch.setattr(kernel, "backward", lambda *arguments: tuple(tensor * 1.01 for tensor in right(*arguments)))
    status, out, _ = ringspan(*SMALL, "--strategy", "ring", "--json", str(tmp_path / "b.json"))
    assert status == 1 and "not passed" in out
    records = read(tmp_path / "b.json")["records"]
    assert [record["status"] for record in records] == ["wrong", "wrong"] and not any(record["passes"] for record in records)
    assert "dq by 1.0e-02 of at most 2.0e-05" in records[0]["reason"]
    assert "out" not in records[0]["reason"].split("(")[0], "what is right is not blamed"


def test_a_split_that_errs_is_wrong_where_the_kernel_is_right(ringspan: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    right = Sequence.attention
    monkeypatch.setattr(Sequence, "attention", lambda self, q, k, v: right(self, q, k, v) * 1.001)
    status, _, _ = ringspan(*SMALL, "--strategy", "ring", "--dtype", "bfloat16", "--json", str(tmp_path / "b.json"))
    assert status == 0, "within two roundings of bfloat16"
    monkeypatch.setattr(Sequence, "attention", lambda self, q, k, v: right(self, q, k, v) * 1.05)
    status, _, _ = ringspan(*SMALL, "--strategy", "ring", "--dtype", "bfloat16", "--json", str(tmp_path / "b.json"))
    alone, ours = read(tmp_path / "b.json")["records"]
    assert status == 1 and alone["status"] == "timed" and ours["status"] == "wrong" and not ours["passes"]


def test_a_kernel_that_breaks_is_reported_as_broken(ringspan: Run, monkeypatch: pytest.MonkeyPatch):
    def breaks(*arguments):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(KERNELS["torch_cpu"], "forward", breaks)
    status, out, _ = ringspan(*SMALL, "--strategy", "ring")
    assert status == 1 and "RuntimeError: no such instruction" in out


class Rival:
    """A peer that computes `factor` times what it should."""

    name = "rfa_zigzag"

    def __init__(self, factor: float) -> None:
        self._factor = factor

    def refusal(self, shape: Shape, device: torch.device) -> str:
        return ""

    def kernel(self, device: torch.device) -> str:
        return "torch_cpu"

    @contextmanager
    def open(self, shape: Shape, inputs: Any, transport: Any) -> Iterator[Passes]:
        from ringspan.bench.one_device import one_device

        passes, _ = one_device("torch_cpu", shape, inputs)
        yield replace(passes, both=lambda: tuple(tensor * self._factor for tensor in passes.both()))


@pytest.mark.parametrize(("factor", "expected"), [(1.0, "timed"), (1.1, "wrong")])
def test_a_peer_is_checked_too_and_told_but_not_judged(
    factor: float, expected: str, ringspan: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setitem(PEERS, "rfa_zigzag", Rival(factor))
    status, out, _ = ringspan(*SMALL[:-1], "rfa_zigzag", "--strategy", "ring", "--json", str(tmp_path / "b.json"))
    peer = read(tmp_path / "b.json")["records"][-1]
    assert status == 0 and peer["kind"] == "peer" and peer["status"] == expected and bool(peer["passes"]) == (expected == "timed")
    ours = read(tmp_path / "b.json")["records"][1]["passes"]["both"]["ratio_to_peers"]
    assert (ours.keys() == {"rfa_zigzag"}) == (expected == "timed") and expected in (out if expected == "wrong" else "timed")


def test_peers_that_are_not_installed_are_told_with_the_reason(ringspan: Run):
    status, out, _ = ringspan(*SMALL[:-1], "pytorch_allgather,rfa_llama3,yunchang_ulysses", "--strategy", "ring")
    assert status == 0 and "context_parallel has no rule for the SDPA kernel of CPUs" in out.replace("\n", " ")
    assert out.count("refused") >= 3


# ---- refusals ------------------------------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[tuple[str, ...], str]] = {
    "a length of nothing": (("--length", "0"), "--length 0"),
    "a length that is no number": (("--length", "long"), "no whole number"),
    "heads that do not divide": (("--heads", "6/4"), "6 / 4 leaves 2"),
    "an unknown strategy": (("--strategy", "spiral"), "the strategies are"),
    "an option that a strategy has not": (("--strategy", "ring:stages=2"), "it takes"),
    "an unknown layout": (("--layout", "spiral"), "contiguous"),
    "an unknown kernel": (("--kernel", "fast"), "torch_cpu"),
    "an unknown transport": (("--transport", "pigeon"), "process_group"),
    "an unknown peer": (("--peers", "nobody"), "rfa_zigzag"),
    "an unknown mask": (("--mask", "triangle"), "the masks are"),
    "documents of another length": (("--mask", "causal&documents:5,6"), "of 11 in all"),
    "an unknown mixture": (("--documents", "random:1"), "realistic:SEED"),
    "a graph without CUDA": (("--launch", "graph"), "CUDA graph"),
    "too few samples": (("--samples", "3"), "at least 10"),
    "no warm-up": (("--warmup", "0"), "--warmup 0"),
    "no time at all": (("--timeout-seconds", "0"), "--timeout-seconds"),
    "no ranks": (("--ranks", "0"), "--ranks 0"),
    "an unknown device": (("--device", "tpu"), "auto, cpu and cuda"),
    "a folder as file": (("--json", "."), "--json ."),
    "a file in a folder that there is not": (("--png", "no/such/folder.png"), "No such file"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_an_error_that_teaches_with_exit_status_2(name: str, ringspan: Run):
    arguments, message = BAD[name]
    status, out, err = ringspan("--device", "cpu", *arguments)
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1 and message in err, err
    assert not out and "Try: " in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has GPUs")
def test_gpus_that_are_not_there_are_refused(ringspan: Run):
    status, _, err = ringspan("--device", "cuda")
    assert status == 2 and "sees 0 CUDA GPUs" in err


def test_a_file_that_was_not_there_is_not_left_empty_by_what_never_starts(ringspan: Run, tmp_path: Path):
    kept = tmp_path / "kept.json"
    kept.write_text("{}")
    status, _, err = ringspan("--device", "cpu", "--png", str(tmp_path / "new.png"), "--json", str(kept), "--markdown", "no/such/folder.md")
    assert status == 2 and "no/such/folder.md" in err
    assert [each.name for each in tmp_path.iterdir()] == ["kept.json"] and kept.read_text() == "{}"


def test_the_number_of_ranks_under_torchrun_is_torchruns(ringspan: Run, monkeypatch: pytest.MonkeyPatch):
    torchrun = {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "3", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in torchrun.items():
        monkeypatch.setenv(name, value)
    status, _, err = ringspan("--device", "cpu", "--ranks", "2")
    assert status == 2 and "it started 3" in err


def test_passes_of_a_function_have_its_gradients():
    from ringspan.verify import make_inputs

    inputs = make_inputs(1, 5, 2, 2, 4, torch.float64, 0)
    passes = passes_of(lambda q, k, v: q * 2 + k * 3 + v * 5, inputs, lambda tensor: tensor[:, 1:3])
    out, dq, dk, dv = passes.both()
    assert torch.equal(out, passes.forward()[0]) and not out.requires_grad
    for found, factor in ((dq, 2), (dk, 3), (dv, 5)):
        assert torch.equal(found, inputs.dout[:, 1:3] * factor)
