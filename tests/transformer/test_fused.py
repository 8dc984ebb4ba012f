"""Fused norms and gates: the specification is what transformers computes, and the kernels are the specification.

Without a GPU the kernels run in Triton's interpreter, where Triton is installed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from ringspan.transformer import fused
from ringspan.transformer.fused import can_fuse, feed_forward, is_gated, known_norm, rms_norm

FAMILIES = {
    "llama": ("Llama", 0.0), "mistral": ("Mistral", 0.0), "qwen2": ("Qwen2", 0.0), "qwen3": ("Qwen3", 0.0),
    "gemma": ("Gemma", 1.0), "gemma2": ("Gemma2", 1.0), "gemma3": ("Gemma3", 1.0),
}  # fmt: skip


def norm_of(family: str, hidden: int, dtype: torch.dtype) -> nn.Module:
    import importlib

    name, _ = FAMILIES[family]
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    norm = getattr(module, f"{name}RMSNorm")(hidden, eps=1e-5)
    with torch.no_grad():
        norm.weight.normal_()
    return norm.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_specification_is_bit_for_bit_what_transformers_computes(family: str, dtype: torch.dtype):
    torch.manual_seed(0)
    norm = norm_of(family, 96, dtype)
    kind = known_norm(norm)
    assert kind is not None and kind.eps == 1e-5 and kind.one_plus == bool(FAMILIES[family][1])
    x = (torch.randn(5, 96) * 3).to(dtype)
    assert torch.equal(rms_norm(x, norm.weight, kind), norm(x))


def test_other_modules_and_other_activations_are_not_taken_for_known_ones():
    from transformers import GemmaConfig, LlamaConfig
    from transformers.models.gemma.modeling_gemma import GemmaMLP
    from transformers.models.llama.modeling_llama import LlamaMLP

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    assert is_gated(LlamaMLP(LlamaConfig(**sizes)))
    assert not is_gated(LlamaMLP(LlamaConfig(**sizes, hidden_act="gelu")))
    assert not is_gated(GemmaMLP(GemmaConfig(**sizes)))
    assert known_norm(nn.LayerNorm(16)) is None and known_norm(nn.RMSNorm(16)) is None
    assert not can_fuse(torch.ones(2, 16))


def test_only_a_class_s_own_forward_is_fused(monkeypatch: pytest.MonkeyPatch):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    monkeypatch.setattr(fused, "can_fuse", lambda x: True)
    monkeypatch.setattr(fused, "fused_gate", lambda gate, up: torch.zeros_like(gate))
    mlp = LlamaMLP(LlamaConfig(hidden_size=16, intermediate_size=32, num_attention_heads=2))
    x = torch.randn(3, 16)
    assert not feed_forward(mlp, mlp.forward, x).any()
    # What stands around it, as a tensor axis does, is not left out.
    assert torch.equal(feed_forward(mlp, lambda x: mlp.forward(x) + 1, x), mlp(x) + 1)


def test_the_kernels_in_tritons_interpreter_are_the_specification():
    pytest.importorskip("triton", reason="Triton is not installed: tests/gpu runs the kernels themselves")
    script = Path(__file__).with_name("interpreted.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
