"""A checkpoint is whole or not there, and a damaged one is refused with the file that is damaged."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from ringspan.errors import RingspanError
from ringspan.training import checkpoint
from ringspan.training.checkpoint import Snapshot, TrainingState, list_checkpoints, load_weights, save_checkpoint, verify_checkpoint
from ringspan.training.manifest import write_manifest
from ringspan.training.model import build_model
from ringspan.training.optimizer import Optimizer


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return build_model("pico", vocabulary_size=256, context=64, seed=0)


def save(folder: Path, step: int, model: LlamaForCausalLM, keep: int = 2) -> Path:
    return save_checkpoint(folder, snapshot_of(model, step), keep=keep)


def snapshot_of(model: LlamaForCausalLM, step: int) -> Snapshot:
    optimizer = Optimizer(model, weight_decay=0.1, gradient_clip=1.0)
    return Snapshot(
        state=TrainingState(step=step, tokens_digest="digest"),
        config=model.config,
        weights=optimizer.masters,
        moments=optimizer.moments(),
        extra_files={},
    )


def test_a_saved_checkpoint_reads_back(tmp_path: Path, model: LlamaForCausalLM):
    folder = save(tmp_path, 7, model)
    assert verify_checkpoint(folder) == TrainingState(step=7, tokens_digest="digest")
    weights = {name: torch.full_like(parameter, float("nan")) for name, parameter in model.named_parameters()}
    load_weights(folder, weights)
    assert all(torch.equal(weights[name], parameter) for name, parameter in model.named_parameters())


def test_the_newest_are_kept_and_the_pointer_names_the_last(tmp_path: Path, model: LlamaForCausalLM):
    for step in (9, 10, 100, 11):
        save(tmp_path, step, model, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000011", "step-00000100"]
    assert (tmp_path / "latest").resolve().name == "step-00000011"


def damage_missing(folder: Path) -> str:
    (folder / "model" / "config.json").unlink()
    return "model/config.json is missing"


def damage_truncated(folder: Path) -> str:
    file = folder / "tensors" / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-100])
    return "tensors/__0_0.distcp has .* bytes of the"


def damage_flipped(folder: Path) -> str:
    file = folder / "tensors" / ".metadata"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    return "another SHA-256"


def damage_state(folder: Path) -> str:
    (folder / "training.json").unlink()
    return "training.json is missing"


def damage_manifest(folder: Path) -> str:
    (folder / "manifest.json").write_text("{")
    return "manifest.json cannot be read"


def damage_manifest_of_nothing(folder: Path) -> str:
    (folder / "manifest.json").write_text("{}")
    return "manifest.json is not as it was written"


def damage_manifest_of_another_kind(folder: Path) -> str:
    (folder / "manifest.json").write_text("[]")
    return "manifest.json is not as it was written"


DAMAGES = [damage_missing, damage_truncated, damage_flipped, damage_state, damage_manifest]
DAMAGES += [damage_manifest_of_nothing, damage_manifest_of_another_kind]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_with_the_file_and_the_newest_whole_one(tmp_path: Path, model: LlamaForCausalLM, damage):
    for step in (1, 2, 3):
        save(tmp_path, step, model, keep=3)
    damage(tmp_path / "step-00000002")
    found = damage(tmp_path / "step-00000003")
    with pytest.raises(RingspanError, match=found) as caught:
        verify_checkpoint(tmp_path / "step-00000003")
    assert "goes on from step-00000001, which is whole" in str(caught.value)


def test_a_disk_that_fills_up_leaves_the_last_checkpoint_intact(tmp_path: Path, model: LlamaForCausalLM):
    """A limit on the size of files gives a real error of the operating system from the middle of a write."""
    save(tmp_path, 1, model)
    program = f"""
import resource
from pathlib import Path
from ringspan.errors import RingspanError
from ringspan.training.model import build_model
from tests.training.test_checkpoint import save
model = build_model("pico", vocabulary_size=256, context=64, seed=0)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    save(Path({str(tmp_path)!r}), 2, model)
except RingspanError as error:
    print("refused:", error)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2])
    assert result.stdout.startswith("refused: checkpoint of step 2"), result.stdout + result.stderr
    assert "step-00000001, is intact" in result.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001"]
    verify_checkpoint(tmp_path / "step-00000001")


def test_a_write_that_fails_late_is_named_by_its_cause(tmp_path: Path, model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch):
    def full(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_manifest", full)
    with pytest.raises(RingspanError, match="No space left on device, and no checkpoint was written before it"):
        save(tmp_path, 1, model)
    assert list(tmp_path.iterdir()) == []


def test_a_fault_of_the_program_is_not_taken_for_a_full_disk(tmp_path: Path, model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch):
    def broken(folder: Path) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(checkpoint, "write_manifest", broken)
    with pytest.raises(KeyError):
        save(tmp_path, 1, model)


def test_parts_that_other_ranks_wrote_to_disks_of_their_own_make_no_checkpoint(
    tmp_path: Path, model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
):
    """Without a shared disk rank 0 would call whole, by a manifest of its own files, what nobody can go on from."""
    write = checkpoint.write_parts

    def elsewhere(tensors: object, folder: Path, group: object) -> None:
        write(tensors, folder, group)  # type: ignore[arg-type]
        (folder / "__0_0.distcp").unlink()

    save(tmp_path, 1, model)
    monkeypatch.setattr(checkpoint, "write_parts", elsewhere)
    with pytest.raises(RingspanError, match=r"__0_0\.distcp, which another rank has written, cannot be seen from rank 0"):
        save(tmp_path, 2, model)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000001"]


@pytest.mark.slow
def test_killing_the_process_at_any_moment_of_a_save_leaves_only_whole_checkpoints(tmp_path: Path):
    """SIGKILL before each file operation of a save in turn: fsyncs, renames, deletions, the pointer."""
    program = [sys.executable, "-m", "tests.training.killed_saves", str(tmp_path)]
    result = subprocess.run(program, capture_output=True, text=True, timeout=240, cwd=Path(__file__).parents[2])
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 20


def test_a_checkpoint_of_the_same_step_that_is_whole_stays_and_a_damaged_one_is_replaced(tmp_path: Path, model: LlamaForCausalLM):
    folder = save(tmp_path, 5, model)
    written = (folder / "manifest.json").stat().st_mtime_ns
    save(tmp_path, 5, model)
    assert (folder / "manifest.json").stat().st_mtime_ns == written
    damage_flipped(folder)
    save(tmp_path, 5, model)
    verify_checkpoint(folder)


def test_a_tensor_that_a_checkpoint_lacks_is_named(tmp_path: Path, model: LlamaForCausalLM):
    folder = save(tmp_path, 5, model)
    with pytest.raises(RingspanError, match=r"it has no weights\.another"):
        load_weights(folder, {"another": torch.zeros(2)})
    with pytest.raises(RingspanError, match=r"lm_head.weight is \(256, 32\) and not \(256, 31\)"):
        load_weights(folder, {"lm_head.weight": torch.zeros(256, 31)})


def test_a_checkpoint_of_an_earlier_version_is_refused_with_what_to_do(tmp_path: Path, model: LlamaForCausalLM):
    folder = save(tmp_path, 5, model)
    (folder / "tensors").rename(folder / "optimizer")
    write_manifest(folder)
    with pytest.raises(RingspanError, match="it has no tensors: an earlier version of ringspan wrote it"):
        verify_checkpoint(folder)
