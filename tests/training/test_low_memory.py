"""AdamW with moments of few bits: refused where it cannot be had, and its runs go on from codes and scales as if they had never stopped.

A stand-in of torchao's optimizer shows what is ours; where torchao is installed the same holds of it.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ringspan.errors import RingspanError
from ringspan.training.low_memory import BLOCKS, check_blocks
from ringspan.training.optimizer import Optimizer
from ringspan.training.prepare import prepare
from ringspan.training.tensors import host_copy, load_tensors, write_parts
from tests.training.support import run_train, write_text

INSTALLED = importlib.util.find_spec("torchao") is not None
NEEDS_TORCHAO = pytest.mark.skipif(not INSTALLED, reason="the optional package torchao is not installed")


class Codes:
    """A moment as whole numbers from -127 to 127, with a scale for each block."""

    def __init__(self, like: Tensor, block: int) -> None:
        self.codes, self.scale = torch.zeros(like.shape, dtype=torch.int8), torch.zeros(like.numel() // block)
        self.qmap = torch.zeros(())

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale", "qmap"], None

    def float(self) -> Tensor:
        return (self.codes.view(len(self.scale), -1) * self.scale[:, None]).view(self.codes.shape)

    def copy_(self, value: Tensor) -> None:
        blocks = value.view(len(self.scale), -1)
        self.scale.copy_(blocks.abs().amax(1) / 127)
        self.codes.copy_((blocks / self.scale[:, None].clamp(min=1e-30)).round().view(value.shape))


class StandIn(torch.optim.Optimizer):
    """Of torchao's `AdamW8bit`: the learning rate is a tensor, and large moments are codes."""

    def __init__(self, groups: list[dict[str, Any]], *, block_size: int, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"lr": torch.tensor(lr), "betas": betas, "eps": eps})
        self.block_size = block_size

    def _new_buffer(self, parameter: Tensor, signed: bool) -> Any:
        return Codes(parameter, self.block_size) if parameter.numel() >= 4096 else torch.zeros_like(parameter, requires_grad=False)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["step"] += 1
                mean = state["exp_avg"].float().lerp(parameter.grad, 0.1)
                square = state["exp_avg_sq"].float().lerp(parameter.grad.square(), 0.05)
                state["exp_avg"].copy_(mean)
                state["exp_avg_sq"].copy_(square)
                parameter.sub_(group["lr"] * mean / (square.sqrt() + group["eps"]) * state["step"].reciprocal())


@pytest.fixture(params=["stand-in", pytest.param("torchao", marks=NEEDS_TORCHAO)])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whose optimizer `adamw8bit` is."""
    if request.param == "stand-in":
        module = ModuleType("torchao.optim")
        module.AdamW8bit = StandIn  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "torchao", ModuleType("torchao"))
        monkeypatch.setitem(sys.modules, "torchao.optim", module)
    return request.param


def small_model(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 3)).to(dtype)


def loss_of(model: nn.Module, step: int) -> Tensor:
    inputs = torch.randn(8, 64, generator=torch.Generator().manual_seed(step)).to(next(model.parameters()).dtype)
    return (model(inputs) - 1).square().mean()


def one_step(model: nn.Module, optimizer: Optimizer, step: int) -> float:
    loss = loss_of(model, step)
    loss.backward()
    optimizer.step(1e-2)
    return loss.item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_goes_on_from_codes_and_scales_as_if_it_had_never_stopped(kind: str, dtype: torch.dtype, tmp_path: Path):
    model = small_model(dtype)
    optimizer = Optimizer(model, weight_decay=0.1, gradient_clip=1.0, kind="adamw8bit")
    before = loss_of(model, 0).item()
    losses = [one_step(model, optimizer, step) for step in range(6)]
    assert loss_of(model, 0).item() < before, "it trains"
    moments = optimizer.moments()
    assert moments["exp_avg.0.weight.codes"].dtype.itemsize == 1 and moments["exp_avg_sq.0.weight.scale"].shape == (64 * 64 // 256,)
    assert moments["exp_avg.2.weight"].dtype == torch.float32, "what is small stays as it is"
    for folder, tensors in (("weights", optimizer.masters), ("moments", moments)):
        write_parts({name: host_copy(tensor) for name, tensor in tensors.items()}, tmp_path / folder, None)
    goes_on = [one_step(model, optimizer, step) for step in range(6, 10)]

    other = small_model(dtype)
    resumed = Optimizer(other, weight_decay=0.1, gradient_clip=1.0, kind="adamw8bit")
    load_tensors(tmp_path / "weights", resumed.masters)
    empty = resumed.moments()
    load_tensors(tmp_path / "moments", empty)
    resumed.restore(empty, step=6)
    assert [one_step(other, resumed, step) for step in range(6, 10)] == goes_on
    assert any(loss != after for loss, after in zip(losses[2:], goes_on, strict=True)), "the steps do differ"


def test_moments_given_as_other_tensors_are_copied_in(kind: str):
    model = small_model(torch.float32)
    optimizer = Optimizer(model, weight_decay=0.1, gradient_clip=1.0, kind="adamw8bit")
    one_step(model, optimizer, 0)
    kept = {name: moment.clone() for name, moment in optimizer.moments().items()}
    one_step(model, optimizer, 1)
    assert not torch.equal(kept["exp_avg.0.weight.codes"], optimizer.moments()["exp_avg.0.weight.codes"])
    optimizer.restore(kept, step=1)
    for name, moment in optimizer.moments().items():
        assert torch.equal(moment, kept[name]), name


@NEEDS_TORCHAO
@pytest.mark.parametrize("name", BLOCKS)
def test_the_first_step_is_adamws_own_and_later_ones_are_near(name: str):
    # The first update is made from moments that have not been quantised yet.
    models = small_model(torch.float32), small_model(torch.float32)
    few = Optimizer(models[0], weight_decay=0.1, gradient_clip=1.0, kind=name)
    full = Optimizer(models[1], weight_decay=0.1, gradient_clip=1.0)
    for step in range(8):
        losses = [one_step(model, optimizer, step) for model, optimizer in zip(models, (few, full), strict=True)]
        if step == 0:
            for mine, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
        assert losses[0] == pytest.approx(losses[1], rel=0.1)
    assert sum(moment.numel() * moment.element_size() for moment in few.moments().values()) < 0.45 * sum(
        moment.numel() * moment.element_size() for moment in full.moments().values()
    )


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ({"head": (65, 64)}, r"head \(65, 64\) has 4,160 values. Moments are quantised by blocks of 256"),
        ({"norm": (64,), "small": (63, 65)}, "no parameter is large enough to be quantised"),
    ],
)
def test_parameters_that_cannot_be_quantised_are_refused(shapes: dict[str, tuple[int, ...]], expected: str):
    with pytest.raises(RingspanError, match=f"--optimizer adamw8bit: {expected}.*Try: --optimizer adamw"):
        check_blocks("adamw8bit", {name: torch.empty(shape, device="meta") for name, shape in shapes.items()})


def test_sharded_parameters_are_refused_since_their_blocks_would_be_each_ranks_own():
    sharded = torch.empty(64, 64, device="meta")
    sharded.device_mesh = "as a DTensor has it"  # type: ignore[attr-defined]
    with pytest.raises(RingspanError, match=r"head is sharded over ranks.*Try: --no-shard-parameters, or --optimizer adamw"):
        check_blocks("adamw8bit", {"head": sharded})


def test_without_torchao_it_is_refused_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    given = {"data": str(write_text(tmp_path / "text.txt", num_words=300)), "model": "pico", "context": 61, "out": str(tmp_path / "run")}
    with pytest.raises(RingspanError, match=r"--optimizer adamw4bit: .*torchao.*Try: pip install 'ringspan\[torchao\]'"):
        prepare({**given, "optimizer": "adamw4bit"}, resume=False)
    with pytest.raises(RingspanError, match=r"--optimizer sgd: unknown. --optimizer is one of adamw, adamw8bit, adamw4bit"):
        prepare({**given, "optimizer": "sgd"}, resume=False)


@NEEDS_TORCHAO
@pytest.mark.slow
def test_two_processes_train_with_moments_of_8_bits_and_one_goes_on(tmp_path: Path):
    text, out = write_text(tmp_path / "text.txt", num_words=2000), tmp_path / "run"
    given = ("--data", text, "--model", "nano", "--context", 128, "--sample-tokens", 0, "--validation-tokens", 128, "--out", out)
    assert run_train(*given, "--optimizer", "adamw8bit", "--ranks", 2, "--steps", 6).returncode == 0
    found = run_train("--resume", "--ranks", 1, "--steps", 9, "--out", out)
    assert found.returncode == 0, found.stderr
    assert (out / "checkpoints" / "step-00000009").is_dir()
