"""Laws 6 and 8 for `ringspan train` over meshes: the steps of one rank, from the start and from where another mesh stopped."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ringspan.errors import RingspanError
from ringspan.training.checkpoint import list_checkpoints, read_weights, step_folder
from ringspan.training.config import TrainingConfig
from ringspan.training.export import export
from ringspan.training.model import build_model
from ringspan.training.prepare import prepare
from ringspan.training.spread import SHARD_FROM_PARAMETERS, check_spread, shards_parameters, spread
from ringspan.transport import run_in_process
from tests.support.once import once
from tests.support.processes import results, run_processes
from tests.training.mesh_ranks import ADAPTERS, AFTER_ONE, FOLDER, GIVEN, MESHES, SAVED, STEPS, run
from tests.training.support import write_text
from tests.training.trainers import ranks_as_threads

BUDGET = 1e-5
"""Of losses and norms, relative; AdamW on float32 sums in another order. Measured: 1e-6."""


def alone(given: dict[str, Any], *, resume: bool = False) -> Any:
    """The run on one rank of this process, its parameters whole."""
    with ranks_as_threads() as threads:
        return threads(1, lambda place: run(place, given, resume=resume))[0]


def stopped_copy(run_folder: Path, copy: Path) -> None:
    """A copy of a run as it was when it had saved its first checkpoint."""
    shutil.copytree(run_folder, copy, symlinks=True)
    shutil.rmtree(step_folder(copy / "checkpoints", STEPS))


def make(folder: Path) -> tuple[Path, Any, Any, Any]:
    """The folder, what one rank had, with adapters too, and what three had."""
    write_text(folder / "text.txt", num_words=2000)
    build_model("pico", vocabulary_size=256, context=64, seed=3).save_pretrained(folder / "model")
    given = {**GIVEN, "data": str(folder / "text.txt"), "ranks": 1}
    expected = alone({**given, "out": str(folder / "alone")})
    for name in AFTER_ONE:
        stopped_copy(folder / "alone", folder / f"stopped-{name}")
    with pytest.MonkeyPatch.context() as patch:
        from tests.training import test_lora

        patch.setattr(test_lora.lora, "_peft", test_lora.stand_in)
        adapters = alone({**given, **ADAPTERS, "model": str(folder / "model"), "out": str(folder / "adapters-alone")})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER, str(folder))
        found = results(run_processes(3, "tests.training.mesh_ranks:everything", folder / "ranks", group_timeout=240.0, timeout=280.0))
    return folder, expected, adapters, found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any, Any]:
    return once(tmp_path_factory, "meshes", make)


def assert_same(found: Any, expected: Any, what: str) -> None:
    (steps, validation, text), (wanted, held_out, sample) = found, expected
    wanted = wanted[len(wanted) - len(steps) :]
    numbers = [*(number for step in steps for number in step), *validation]
    for mine, theirs in zip(numbers, [*(number for step in wanted for number in step), *held_out], strict=True):
        assert math.isclose(mine, theirs, rel_tol=BUDGET), f"{what}: {steps} beside {wanted}"
    assert text == sample, what


@pytest.mark.slow
def test_where_parameters_are_sharded_rank_0_alone_reads_the_whole_model(made: Any):
    *_, found = made
    read = [[rank["read"][name] for rank in found] for name in MESHES]
    assert read == [[1, 1, 1] if name == "whole" else [1, 0, 0] for name in MESHES]


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_a_mesh_takes_the_steps_of_one_rank_from_the_start_and_from_its_checkpoint(name: str, made: Any):
    folder, expected, _, found = made
    assert len(expected[0]) == STEPS and all(norm > GIVEN["gradient_clip"] for _, norm in expected[0])
    weights = read_weights(step_folder(folder / "alone" / "checkpoints", STEPS))
    for rank, each in enumerate(found):
        assert_same(each[name], expected, f"{name}, rank {rank}")
        if name in AFTER_ONE:
            assert len(each[f"{name} after one rank"][0]) == STEPS - SAVED
            assert_same(each[f"{name} after one rank"], expected, f"{name} after one rank, rank {rank}")
    for parameter, mine in read_weights(list_checkpoints(folder / name / "checkpoints")[-1]).items():
        torch.testing.assert_close(mine, weights[parameter], rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", AFTER_ONE)
def test_one_rank_goes_on_from_what_a_mesh_saved(name: str, made: Any, tmp_path: Path):
    folder, expected, _, _ = made
    stopped_copy(folder / name, tmp_path / "run")
    one = {"ranks": 1, "shard": 1, "replicate": 1, "shard_parameters": False, "parameters_on_host": False}
    assert_same(alone({**one, "out": str(tmp_path / "run")}, resume=True), expected, f"one rank after {name}")


@pytest.mark.slow
def test_adapters_are_sharded_saved_as_peft_reads_them_and_merged_by_an_export(made: Any, tmp_path: Path):
    folder, _, adapters, found = made
    assert_same(found[0]["adapters"], adapters, "adapters")
    places = [list_checkpoints(folder / name / "checkpoints")[-1] for name in ("adapters", "adapters-alone")]
    ours, theirs = (load_file(place / "adapter" / "adapter_model.safetensors") for place in places)
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-5) for name in theirs)
    for place, target in zip(places, (tmp_path / "ours", tmp_path / "theirs"), strict=True):
        export(place, target)
    merged, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert all(torch.allclose(merged[name], wanted[name], rtol=0, atol=1e-5) for name in wanted)


@pytest.mark.slow
def test_an_export_in_several_files_is_the_same_model(made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr("ringspan.training.export.FILE_BYTES", 20_000)
    export(made[0] / "context", tmp_path / "model")
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 2
    weights = read_weights(list_checkpoints(made[0] / "context" / "checkpoints")[-1])
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert all(torch.equal(parameter, weights[name]) for name, parameter in exported.named_parameters())


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "axes that do not divide": ({"ranks": 4, "shard": 3, "accumulate": 3}, r"--ranks 4 --shard 3: 3 do not divide 4 ranks.*Try: --ranks 3"),
    "nothing to read": ({"ranks": 4, "shard": 2, "replicate": 2}, r"a step of 1 sequence leaves some of 4 groups.*Try: --accumulate 4"),
    "an unknown mode": ({"rematerialise": "some"}, r"--rematerialise some: unknown.*attention_output"),
    "nothing to offload": ({"rematerialise": "none", "offload": True}, r"--offload with --rematerialise none: no layer checkpoints"),
    "whole on the host": ({"parameters_on_host": True, "shard_parameters": False}, r"--parameters-on-host with --no-shard-parameters"),
    "no number of tokens": ({"loss_tile": "0"}, r"--loss-tile 0.*a number of tokens, auto or none"),
    "an empty axis": ({"shard": 0}, r"--shard 0: too small"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_before_a_process_starts(name: str, tmp_path: Path):
    given, message = REFUSED[name]
    data = write_text(tmp_path / "text.txt", num_words=500)
    with pytest.raises(RingspanError, match=message):
        prepare({"model": "pico", "context": 61, "device": "cpu", "data": str(data), "out": str(tmp_path / "run"), **given}, resume=False)


def test_what_a_model_cannot_do_is_said_in_the_words_of_the_options():
    model = build_model("pico", vocabulary_size=256, context=64, seed=3)
    model.config.model_type = "unheard of"
    with pytest.raises(RingspanError, match=r"'unheard of'.* Try: --loss-tile none, which takes the model's own logits"):
        run_in_process(1, lambda group: spread(model, TrainingConfig(ranks=1, context=64), group, sharded=False))


def test_parameters_are_sharded_where_it_saves_something():
    sharded: Callable[..., bool] = lambda number, **given: shards_parameters(TrainingConfig(**given), number)  # noqa: E731
    assert not sharded(SHARD_FROM_PARAMETERS - 1, ranks=8)
    assert sharded(SHARD_FROM_PARAMETERS, ranks=2) and not sharded(SHARD_FROM_PARAMETERS, ranks=1)
    assert sharded(SHARD_FROM_PARAMETERS, ranks=1, dtype="bfloat16")
    assert sharded(1, ranks=1, parameters_on_host=True) and sharded(1, ranks=1, shard_parameters=True)
    assert not sharded(SHARD_FROM_PARAMETERS, ranks=2, shard_parameters=False)
    check_spread(TrainingConfig(ranks=12, shard=2, replicate=3, accumulate=6))
