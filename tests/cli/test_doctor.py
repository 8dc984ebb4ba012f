"""`ringspan doctor`: plain words on a CPU machine, and on one with GPUs, which are fakes here, what each kernel and link is good for."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from ringspan.cli import diagnosis
from ringspan.cli.diagnosis import Diagnosis, diagnose
from ringspan.cli.doctor import command, problem_of
from ringspan.errors import RingspanError
from ringspan.kernels import KERNELS, Capabilities, Kernel, Problem, Scores
from ringspan.kernels.capabilities import Declared

app = typer.Typer()
app.command()(command)
SMALL = ("--heads", "4", "--kv-heads", "2", "--head-dim", "16", "--length", "100", "--dtype", "float32")


def doctor(*arguments: str) -> str:
    """What it prints; a refusal is raised."""
    result = CliRunner().invoke(app, ["--device", "cpu", *arguments], env={"COLUMNS": "200", "TERM": "dumb"})
    if result.exception is not None:
        raise result.exception
    assert result.exit_code == 0
    return result.stdout


def line(said: str, start: str) -> str:
    (found,) = [each for each in said.splitlines() if each.startswith(start)]
    return found


def test_every_kernel_is_there_with_its_speed_or_the_reason_and_what_auto_takes():
    said = doctor(*SMALL)
    assert f"torch {torch.__version__}" in said
    for name, kernel in KERNELS.items():
        row = line(said, f"{name} ")
        assert kernel.can.determinism in row
        on_cuda = kernel.can.device == "cuda"
        assert ("cannot be used: it runs on cuda, and the tensors are on cpu" in row) == on_cuda
        assert on_cuda or float(row.split()[1]) > 0
    assert "auto takes it" in line(said, "torch_cpu ")
    assert line(said, "kernel='auto' takes").startswith("kernel='auto' takes torch_cpu: on cpu nothing is timed")
    assert "4 query and 2 KV heads of 16, float32, causal, 128 tokens" in said
    assert line(said, "in-process").endswith("can be used") and "gloo (CPU tensors): can be used" in said


def test_on_a_machine_without_gpus_it_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = doctor(*SMALL)
    assert "This is a CPU machine" in said and "symmetric memory: cannot be used: there is no CUDA device here" in said
    assert "peer_memory (GPU tensors, within this host): cannot be used: there is no CUDA device here" in said


def test_json_has_everything():
    found = json.loads(doctor(*SMALL, "--mask", "window:4", "--softcap", "--deterministic", "--json"))
    assert set(found) == set(Diagnosis.__dataclass_fields__)
    assert found["auto"] == "reference" and found["tokens"] == 128
    assert found["problem"] == "4 query and 2 KV heads of 16, float32, causal, softcap, window, the same bits at every run"
    kernels = {each["name"]: each for each in found["kernels"]}
    assert list(kernels) == list(KERNELS)
    assert kernels["torch_cpu"] == {
        "name": "torch_cpu", "usable": False, "reason": "it computes no softcap", "seconds": None, "teraflops_per_second": None,
        "determinism": "always",
    }  # fmt: skip
    assert kernels["reference"]["seconds"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--dtype", "int8"), "there are float64, float32, bfloat16, float16"),
        (("--heads", "6", "--kv-heads", "4"), "KV heads divide query heads"),
        (("--length", "0"), "All are at least 1"),
        (("--heads", "0"), "All are at least 1"),
        (("--mask", "diagonal"), "mask 'diagonal'"),
    ],
    ids=str,
)
def test_a_problem_that_does_not_exist_is_refused(arguments: tuple[str, ...], words: str):
    with pytest.raises(RingspanError) as caught:
        doctor(*arguments)
    assert words in str(caught.value)


@pytest.mark.parametrize("device", ["tpu", "cuda"])
def test_a_device_that_is_not_there_is_refused(device: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RingspanError, match="Try: --device auto"):
        problem_of(device, 4, None, 16, "float32", None, "causal", softcap=False, deterministic=False)


# ---- a machine with GPUs ---------------------------------------------------------------------------------------------------------


class Fake(Declared):
    """A kernel in name alone."""

    def __init__(self, name: str, absent: str | None = None) -> None:
        self.name, self.can, self._absent = name, Capabilities(shapes=frozenset({"band"})), absent

    def missing(self) -> str | None:
        return self._absent

    def forward(self, q: Any, k: Any, v: Any, scores: Scores) -> Any:
        raise AssertionError("a fake computes nothing")

    def backward(self, dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, dlse: Any, scores: Scores) -> Any:
        raise AssertionError("a fake computes nothing")


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three GPUs, the last of which is apart."""
    about = SimpleNamespace(name="Fake H100", total_memory=80 * 2**30, multi_processor_count=132, major=9, minor=0)
    fakes = {
        "is_available": lambda: True,
        "device_count": lambda: 3,
        "get_device_properties": lambda index: about,
        "get_device_name": lambda: about.name,
        "can_device_access_peer": lambda a, b: 2 not in (a, b),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(diagnosis, "nccl_version", lambda: (2, 27, 5))
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)


KINDS: dict[str, Kernel] = {
    "absent": Fake("absent", "it is not installed"), "broken": Fake("broken"), "slow": Fake("slow"), "fast": Fake("fast"),
    "reference": Fake("reference"),
}  # fmt: skip
PROBLEM = Problem(device="cuda", dtype=torch.bfloat16, heads=4, kv_heads=2, head_dim=64)


def timer(kernel: Kernel, problem: Problem, tokens: int) -> float:
    if kernel.name == "broken":
        raise RuntimeError("no kernel image is available\nfor execution on the device")
    return {"slow": 2e-3, "fast": 1e-3, "reference": 1.0}[kernel.name]


@pytest.mark.usefixtures("gpus")
def test_a_kernel_that_breaks_is_left_out_and_named_and_the_fastest_is_taken():
    found = diagnose(PROBLEM, 1000, timer, KINDS)
    kernels = {kernel.name: kernel for kernel in found.kernels}
    assert kernels["absent"].reason == "it is not installed" and not kernels["absent"].usable
    assert kernels["broken"].reason == "RuntimeError: no kernel image is available" and not kernels["broken"].usable
    assert found.auto == "fast" and found.auto_reason == "1.00 ms for 1,024 tokens forward and backward, slow 2.00"
    # 14 · pairs · heads · head_dim in a millisecond.
    assert kernels["fast"].teraflops_per_second == pytest.approx(14 * (1024 * 1025 / 2) * 4 * 64 / 1e-3 / 1e12)


@pytest.mark.usefixtures("gpus")
def test_gpus_links_and_what_stands_against_symmetric_memory_are_named():
    found = diagnose(PROBLEM, 1000, timer, KINDS)
    assert found.gpus == ("Fake H100, 80 GiB, 132 multiprocessors, compute capability 9.0",) * 3
    assert {(link.source, link.target) for link in found.links if link.peer_access} == {(0, 1), (1, 0)} and len(found.links) == 6
    assert not found.symmetric_memory.usable and found.symmetric_memory.reason == "GPU 0 does not reach the memory of GPU 2"
    assert found.versions["nccl"] == "2.27.5"
    assert [way.usable for way in found.transports] == [True, True, True, False]
    assert found.transports[-1].reason == found.symmetric_memory.reason


@pytest.mark.usefixtures("gpus")
def test_two_gpus_that_reach_each_other_have_symmetric_memory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    found = diagnose(PROBLEM, 1000, timer, KINDS)
    assert found.symmetric_memory.usable and found.transports[-1].usable and found.transports[-1].name.startswith("peer_memory")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert diagnose(PROBLEM, 1000, timer, KINDS).symmetric_memory.reason == "there is one GPU, and nothing to share with"
