"""An exported model is one that plain transformers loads, with the logits and the tokens that it had in training."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from ringspan.errors import RingspanError
from ringspan.training.checkpoint import MODEL, load_weights
from ringspan.training.export import byte_tokenizer, export
from ringspan.training.model import plain_attention, rebuild_model
from tests.training.conftest import STEPS


def test_every_byte_is_the_token_of_its_value():
    tokenizer = Tokenizer.from_str(byte_tokenizer())
    text = "naïve ∑ text,  two spaces\n\ttab \x00 end"
    assert tokenizer.encode(text, add_special_tokens=False).ids == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    # In UTF-8 every one of these bytes occurs.
    every = [byte for byte in range(256) if byte not in {0xC0, 0xC1, *range(0xF5, 0x100)}]
    seen = set("".join(map(chr, range(0xD800))).encode()) | set("".join(map(chr, range(0x10000, 0x110000, 997))).encode())
    assert seen <= set(every)
    sample = "".join(map(chr, range(0x800)))
    assert tokenizer.encode(sample, add_special_tokens=False).ids == list(sample.encode())


@pytest.mark.slow
def test_plain_transformers_computes_the_same_logits(finished_run: Callable[[int], Path], tmp_path: Path):
    run, target = finished_run(2), tmp_path / "model"
    assert export(run, target).name == f"step-{STEPS:08d}"
    trained = rebuild_model(run / "checkpoints" / "latest" / MODEL)
    load_weights(run / "checkpoints" / "latest", dict(trained.named_parameters()))
    text = "some words and others"
    # Another process, in which ringspan cannot be imported.
    program = f"""
import sys; sys.modules["ringspan"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer, model = AutoTokenizer.from_pretrained({str(target)!r}), AutoModelForCausalLM.from_pretrained({str(target)!r})
ids = tokenizer({text!r}, return_tensors="pt", add_special_tokens=False).input_ids
assert model.config._attn_implementation != "ringspan" and model.dtype == torch.float32
torch.save((ids, model(input_ids=ids).logits.detach()), {str(tmp_path / "logits.pt")!r})
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    ids, logits = torch.load(tmp_path / "logits.pt")
    assert ids.tolist() == [list(text.encode())]
    with plain_attention(trained), torch.no_grad():
        assert torch.equal(trained(input_ids=ids).logits, logits)


@pytest.mark.slow
def test_a_folder_that_is_taken_and_a_run_without_checkpoints_are_refused(finished_run: Callable[[int], Path], tmp_path: Path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(RingspanError, match="something is there already"):
        export(finished_run(2), tmp_path / "taken")
    with pytest.raises(RingspanError, match="there is no checkpoint in it"):
        export(tmp_path, tmp_path / "model")
    (tmp_path / "empty").mkdir()
    export(finished_run(2) / "checkpoints" / "step-00000010", tmp_path / "empty")
    names = {path.name for path in (tmp_path / "empty").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert json.loads((tmp_path / "empty" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert AutoTokenizer.from_pretrained(tmp_path / "empty")("ab").input_ids == [97, 98]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "empty").config.vocab_size == 256
