"""Adapters through peft: they alone are trained, saved and gone on with, and an exported model has them merged.

Where peft is not installed a stand-in makes adapters of the same names and arithmetic, so that what is ringspan's is tested everywhere.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ringspan.errors import RingspanError
from ringspan.training import lora
from ringspan.training.checkpoint import Snapshot, save_checkpoint
from ringspan.training.export import export
from ringspan.training.lora import merged
from ringspan.training.model import build_model
from ringspan.training.prepare import prepare
from tests.training.support import write_text
from tests.training.trainers import Taken, assert_same_steps, ranks_as_threads, take_steps

INSTALLED = importlib.util.find_spec("peft") is not None


class StandInLinear(nn.Module):
    """A linear layer with an adapter, its parts named as in peft, which takes embeddings too."""

    def __init__(self, base_layer: nn.Linear | nn.Embedding, rank: int, scaling: float) -> None:
        super().__init__()
        self.base_layer, self.scaling = base_layer, scaling
        out_features, in_features = base_layer.weight.shape
        self.lora_A = nn.ModuleDict({"default": nn.Linear(in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, out_features, bias=False)})
        nn.init.zeros_(self.lora_B["default"].weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.scaling * self.lora_B["default"](self.lora_A["default"](x))


@dataclass
class StandInConfig:
    r: int
    lora_alpha: float
    lora_dropout: float
    target_modules: Any
    bias: str
    task_type: str
    base_model_name_or_path: str
    more: dict = field(default_factory=dict)

    def save_pretrained(self, folder: str) -> None:
        (Path(folder) / "adapter_config.json").write_text(json.dumps(asdict(self)))


def stand_in() -> ModuleType:
    """A module with what ringspan uses of peft."""

    def inject(config: StandInConfig, model: nn.Module) -> nn.Module:
        everywhere = config.target_modules == "all-linear"
        found = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear if everywhere else nn.Linear | nn.Embedding)
            and (name != "lm_head" if everywhere else any(name.endswith(target) for target in config.target_modules))
        ]
        if not found:
            raise ValueError(f"Target modules {config.target_modules} not found in the base model.")
        for name in found:
            parent, _, last = name.rpartition(".")
            layer = model.get_submodule(name)
            setattr(model.get_submodule(parent), last, StandInLinear(layer, config.r, config.lora_alpha / config.r))  # type: ignore[arg-type]
        return model

    module = ModuleType("peft")
    module.LoraConfig, module.inject_adapter_in_model = StandInConfig, inject  # type: ignore[attr-defined]
    return module


@pytest.fixture(params=["stand-in", pytest.param("peft", marks=pytest.mark.skipif(not INSTALLED, reason="peft is not installed"))])
def peft(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "stand-in":
        # Not in sys.modules, where transformers would look for the real one.
        monkeypatch.setattr(lora, "_peft", stand_in)


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Any]:
    build_model("pico", vocabulary_size=256, context=64, seed=3).save_pretrained(tmp_path / "model")
    text = write_text(tmp_path / "text.txt", num_words=2000)
    return {"data": str(text), "model": str(tmp_path / "model"), "tokenizer": "bytes", "lora_rank": 4, "learning_rate": 1e-2}


@pytest.mark.usefixtures("peft")
def test_adapters_alone_are_trained_the_same_on_three_ranks_as_on_one(given: dict[str, Any], tmp_path: Path):
    alone, trainer = take_steps(tmp_path / "1", 1, **given)[0]
    assert all("lora_" in name for name in alone[0].gradients)
    assert len(alone[0].gradients) == 2 * 2 * 7, "two layers of seven linear ones, A and B of each"
    plain = dict(build_model(given["model"], vocabulary_size=256, context=64, seed=0).named_parameters())
    for name, parameter in trainer.model.named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, plain[name.replace(".base_layer", "")])
    assert alone[-1].record.loss < alone[0].record.loss
    for rank, (steps, _) in enumerate(take_steps(tmp_path / "3", 3, **given)):
        assert_same_steps(steps, alone, (3e-6, 3e-4), f"rank {rank}")


def save(trainer: Any) -> Path:
    snapshot: Snapshot = trainer._snapshot()
    return save_checkpoint(trainer.plan.files.checkpoints, snapshot.in_host_memory(), keep=2)


@pytest.mark.usefixtures("peft")
def test_a_run_goes_on_from_its_adapters_as_if_it_had_never_stopped(given: dict[str, Any], tmp_path: Path):
    whole, _ = take_steps(tmp_path / "whole", 1, schedule="constant", **given)[0]
    taken, trainer = take_steps(tmp_path / "half", 1, schedule="constant", **given, steps=3)[0]
    checkpoint = save(trainer)
    assert sorted(path.name for path in (checkpoint / "model").iterdir()) == ["config.json", "generation_config.json"]
    plan = prepare({"out": str(tmp_path / "half"), "steps": 5}, resume=True)
    from ringspan.training.trainer import Trainer

    def go_on(place: Any) -> list[float]:
        resumed = Trainer(plan, place)
        return [resumed.take_step().loss or 0.0 for _ in range(2)]

    with ranks_as_threads() as threads:
        (losses,) = threads(1, go_on)
    assert [*[step.record.loss for step in taken], *losses] == [step.record.loss for step in whole]
    weights = Path(given["model"]) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    with pytest.raises(RingspanError, match="its weights are no longer there, or others"):
        prepare({"out": str(tmp_path / "half"), "steps": 5}, resume=True)


@pytest.mark.usefixtures("peft")
def test_an_exported_model_has_the_adapters_merged(given: dict[str, Any], tmp_path: Path):
    steps: list[Taken]
    steps, trainer = take_steps(tmp_path / "run", 1, **given)[0]
    save(trainer)
    export(tmp_path / "run", tmp_path / "exported")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    before = AutoModelForCausalLM.from_pretrained(given["model"])
    trainer.model.set_attn_implementation("sdpa")
    ids = torch.arange(40).unsqueeze(0)
    with torch.no_grad():
        logits = plain(input_ids=ids).logits
        torch.testing.assert_close(logits, trainer.model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(logits, before(input_ids=ids).logits, atol=1e-2)
    names = load_file(next((tmp_path / "run" / "checkpoints").glob("step-*")) / "adapter" / "adapter_model.safetensors")
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in names
    assert len(steps) == 5


@pytest.mark.usefixtures("peft")
def test_layers_that_are_not_there_are_refused(given: dict[str, Any], tmp_path: Path):
    with pytest.raises(RingspanError, match="--lora-targets nowhere"):
        take_steps(tmp_path / "run", 1, **given, lora_targets="nowhere")


@pytest.mark.usefixtures("peft")
def test_a_misspelt_name_among_others_is_refused(given: dict[str, Any]):
    model = build_model(given["model"], vocabulary_size=256, context=64, seed=0)
    with pytest.raises(RingspanError, match="no layer is called 'v_porj'"):
        lora.add_adapters(model, base=given["model"], rank=4, alpha=8, targets="q_proj,v_porj", seed=0)


@pytest.mark.usefixtures("peft")
@pytest.mark.parametrize(
    ("targets", "tied", "found"),
    [
        ("embed_tokens,q_proj", False, "model.embed_tokens is a layer of type Embedding"),
        ("lm_head,q_proj", True, "lm_head shares its weight with the input embedding"),
    ],
)
def test_adapters_that_an_export_could_not_merge_are_refused(given: dict[str, Any], targets: str, tied: bool, found: str):
    model = build_model(given["model"], vocabulary_size=256, context=64, seed=0)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    with pytest.raises(RingspanError, match=rf"--lora-targets {targets}: {found}\. .*Try: --lora-targets all-linear"):
        lora.add_adapters(model, base=given["model"], rank=4, alpha=8, targets=targets, seed=0)


@pytest.mark.usefixtures("peft")
def test_a_new_model_has_nothing_to_adapt(given: dict[str, Any], tmp_path: Path):
    with pytest.raises(RingspanError, match="--lora-rank with --model pico"):
        prepare({**given, "model": "pico", "context": 61, "out": str(tmp_path / "run")}, resume=False)


def test_without_peft_adapters_are_refused(given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(RingspanError, match=r"--lora-rank: .*pip install 'ringspan\[lora\]'"):
        prepare({**given, "context": 61, "out": str(tmp_path / "run")}, resume=False)


def test_merging_is_w_plus_scale_times_b_a():
    weights = {"a.weight": torch.ones(2, 3), "b.weight": torch.ones(1)}
    adapter = {"base_model.model.a.lora_A.weight": torch.ones(1, 3), "base_model.model.a.lora_B.weight": torch.tensor([[1.0], [2.0]])}
    result = merged(weights, adapter, 0.5)
    assert result["a.weight"].tolist() == [[1.5] * 3, [2.0] * 3]
    assert torch.equal(result["b.weight"], weights["b.weight"])


@pytest.mark.parametrize("left", ["model.embed_tokens.lora_embedding_A", "model.layers.9.q_proj.lora_A.weight", "a.lora_magnitude_vector"])
def test_merging_leaves_nothing_of_an_adapter_out(left: str):
    adapter = {"base_model.model.a.lora_A.weight": torch.ones(1, 3), "base_model.model.a.lora_B.weight": torch.ones(2, 1)}
    with pytest.raises(RingspanError, match=f"it has base_model.model.{left}"):
        merged({"a.weight": torch.ones(2, 3)}, {**adapter, f"base_model.model.{left}": torch.ones(1)}, 0.5)
