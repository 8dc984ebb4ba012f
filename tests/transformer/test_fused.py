"""Fused norms and gates: the specification is what transformers computes, and the kernels are the specification.

Without a GPU the kernels run in Triton's interpreter, where Triton is installed.
"""

from __future__ import annotations

import copy
import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ringspan.transformer import fused
from ringspan.transformer.fused import can_fuse, can_rotate, feed_forward, fuse_rotation, is_gated, known_norm, rms_norm, rotate

FAMILIES = {
    "llama": ("Llama", 0.0), "mistral": ("Mistral", 0.0), "qwen2": ("Qwen2", 0.0), "qwen3": ("Qwen3", 0.0),
    "gemma": ("Gemma", 1.0), "gemma2": ("Gemma2", 1.0), "gemma3": ("Gemma3", 1.0),
}  # fmt: skip


def norm_of(family: str, hidden: int, dtype: torch.dtype) -> nn.Module:
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


def attention_module(family: str) -> Any:
    """The attention of a layer of a family, as small as it can be."""
    name, _ = FAMILIES[family]
    # Gemma 3 names the text model's configuration apart.
    config_name = "Gemma3TextConfig" if family == "gemma3" else f"{name}Config"
    config = getattr(importlib.import_module(f"transformers.models.{family}.configuration_{family}"), config_name)(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=8, vocab_size=8
    )
    config._attn_implementation = "eager"
    return getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), f"{name}Attention")(config, layer_idx=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_known_attention_turns_queries_and_keys_with_the_fused_rotation_and_no_other_does(
    family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    torch.manual_seed(0)
    module, other = attention_module(family).to(dtype), attention_module(family)
    x = torch.randn(2, 5, 32).to(dtype)
    cos, sin = torch.randn(2, 1, 5, 8).to(dtype)
    given = {"hidden_states": x, "position_embeddings": (cos, sin), "attention_mask": None}
    expected, _ = module(**given)
    fuse_rotation(module)
    assert torch.equal(module(**given)[0], expected), "on CPUs nothing changes"
    turned: list[tuple[int, ...]] = []

    def spy(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        turned.append(tuple(x.shape))
        return rotate(x, cos, sin)

    monkeypatch.setattr(fused, "can_rotate", lambda *given: True)
    monkeypatch.setattr(fused, "fused_rotate", spy)
    assert torch.equal(module(**given)[0], expected)
    assert turned == [(2, 4, 5, 8), (2, 2, 5, 8)]
    copied = copy.deepcopy(module)
    fuse_rotation(copied)
    with torch.no_grad():
        copied.o_proj.weight.zero_()
    assert torch.equal(module(**given)[0], expected) and not copied(**given)[0].any() and len(turned) == 6
    other.to(dtype)(**given)
    assert len(turned) == 6, "the class, and its other modules, are as they were"


def test_an_attention_with_something_around_it_keeps_what_it_has():
    module = attention_module("llama")
    module.forward = lambda **given: (torch.zeros(1), None)
    fuse_rotation(module)
    assert not module(hidden_states=None)[0].any()
    fuse_rotation(nn.Linear(2, 2))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda x, cos, sin: (x, cos.double(), sin.double()),
        lambda x, cos, sin: (x, cos[..., :4], sin[..., :4]),
        lambda x, cos, sin: (x[..., :7], cos[..., :7], sin[..., :7]),
        lambda x, cos, sin: (x, cos.requires_grad_(), sin),
        lambda x, cos, sin: (x, cos.expand(3, 5, 8), sin.expand(3, 5, 8)),
        lambda x, cos, sin: (x[0], cos, sin),
    ],
)
def test_what_the_rotation_kernel_was_not_made_for_is_left_to_transformers(spoil: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fused, "can_fuse", lambda x: True)
    x, cos, sin = torch.randn(2, 4, 5, 8), torch.randn(1, 5, 8), torch.randn(1, 5, 8)
    assert can_rotate(x, cos, sin)
    assert not can_rotate(*spoil(x, cos, sin))


def test_the_kernels_in_tritons_interpreter_are_the_specification(interpreting: dict[str, str]):
    script = Path(__file__).with_name("interpreted.py")
    done = subprocess.run([sys.executable, str(script)], env=interpreting, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
