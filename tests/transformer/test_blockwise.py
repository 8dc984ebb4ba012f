"""Blockwise parts give the outputs and gradients of the plain ones, and hold one chunk of what is wide."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.gemma2.modeling_gemma2 import Gemma2Config, Gemma2MLP, Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP, LlamaRMSNorm
from transformers.models.phi3.modeling_phi3 import Phi3Config, Phi3MLP

from ringspan.errors import RingspanError, UnsupportedError
from ringspan.transformer import accumulate, blockwise
from tests.support.errors import relative

SIZES: dict[str, Any] = {"hidden_size": 12, "intermediate_size": 20, "num_attention_heads": 2, "num_key_value_heads": 1}
BUDGETS = {torch.float64: 1e-14, torch.float32: 5e-7}
"""The same products in another order of summation: a few roundings of 1e-16 and 6e-8."""


class WithAdapter(nn.Module):
    """A linear map with weights that stand still beside two small ones that learn, as peft makes them."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Linear(base.in_features, 3, bias=False), nn.Linear(3, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.5 * self.up(self.down(x))


def with_adapters(mlp: Any) -> Any:
    mlp.requires_grad_(False)
    mlp.gate_proj, mlp.down_proj = WithAdapter(mlp.gate_proj), WithAdapter(mlp.down_proj)
    return mlp


def half_frozen(mlp: Any) -> Any:
    mlp.gate_proj.requires_grad_(False)
    return mlp


def jittered(norm: Any) -> Any:
    with torch.no_grad():
        norm.weight.add_(torch.randn(12) / 4)
    return norm


MODULES = {
    "llama": lambda: LlamaMLP(LlamaConfig(**SIZES)),
    "llama with biases": lambda: LlamaMLP(LlamaConfig(**SIZES, mlp_bias=True)),
    "gemma 2": lambda: Gemma2MLP(Gemma2Config(**SIZES)),
    "phi 3": lambda: Phi3MLP(Phi3Config(**SIZES, pad_token_id=0)),
    "adapters": lambda: with_adapters(LlamaMLP(LlamaConfig(**SIZES))),
    "a frozen matrix": lambda: half_frozen(LlamaMLP(LlamaConfig(**SIZES))),
    "a norm": lambda: jittered(LlamaRMSNorm(12)),
    "a gemma norm": lambda: jittered(Gemma2RMSNorm(12)),
    "all frozen": lambda: LlamaMLP(LlamaConfig(**SIZES)).requires_grad_(False),
}


def results(module: nn.Module, x: Tensor, gradient: Tensor) -> dict[str, Tensor | None]:
    leaf = x.clone().requires_grad_()
    y = module(leaf)
    y.backward(gradient)
    return {"y": y.detach(), "dx": leaf.grad, **{name: parameter.grad for name, parameter in module.named_parameters()}}


def make(name: str, dtype: torch.dtype, length: int = 7) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return MODULES[name]().to(dtype), *(torch.randn(2, length, 12, dtype=dtype) for _ in range(2))


def budget_of(name: str, dtype: torch.dtype) -> float:
    # Norms compute in float32 whatever the dtype.
    return BUDGETS[torch.float32 if "norm" in name else dtype]


def check(name: str, dtype: torch.dtype, chunk: int) -> None:
    module, x, gradient = make(name, dtype)
    expected = results(copy.deepcopy(module), x, gradient)
    blockwise(module, chunk)
    found = results(module, x, gradient)
    for part, tensor in expected.items():
        ours = found[part]
        assert (ours is None) == (tensor is None), part
        if tensor is not None and ours is not None:
            assert ours.dtype == tensor.dtype and relative(ours, tensor) <= budget_of(name, dtype), part


@pytest.mark.parametrize("dtype", BUDGETS, ids=str)
@pytest.mark.parametrize("chunk", [1, 3, 14, 100])
@pytest.mark.parametrize("name", MODULES)
def test_outputs_and_every_gradient_are_those_of_the_plain_module(name: str, chunk: int, dtype: torch.dtype):
    check(name, dtype, chunk)


def test_it_fails_where_a_chunk_is_left_out(monkeypatch: pytest.MonkeyPatch):
    module = sys.modules["ringspan.transformer.blockwise"]
    right = module._chunks
    monkeypatch.setattr(module, "_chunks", lambda *arguments: list(right(*arguments))[:-1])
    with pytest.raises(AssertionError):
        check("llama", torch.float64, 3)


def test_gradients_in_bfloat16_are_rounded_once_however_many_chunks():
    module, x, gradient = make("llama", torch.bfloat16, length=600)
    exact = results(copy.deepcopy(module).double(), x.double(), gradient.double())
    errors = {}
    for chunk in (1200, 5):
        cut = copy.deepcopy(module)
        blockwise(cut, chunk)
        errors[chunk] = relative(results(cut, x, gradient)["gate_proj.weight"], exact["gate_proj.weight"])  # type: ignore[arg-type]
    assert errors[5] <= 1.05 * errors[1200], errors


def test_rounding_each_chunk_would_be_seen(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(accumulate, "wide_dtype", lambda dtype: dtype)
    with pytest.raises(AssertionError):
        test_gradients_in_bfloat16_are_rounded_once_however_many_chunks()


def widest(run: Any) -> int:
    """The largest number of elements that any operation within `run()` makes."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for each in out if isinstance(out, tuple | list) else (out,):
                if isinstance(each, Tensor):
                    self.most = max(self.most, each.numel())
            return out

    with Watch() as watch:
        run()
    return watch.most


def test_nothing_as_wide_as_the_intermediate_of_the_whole_shard_ever_exists():
    for length in (60, 240):
        module, x, gradient = make("llama", torch.float32, length)
        assert widest(lambda: results(copy.deepcopy(module), x, gradient)) == 2 * length * 20  # noqa: B023
        blockwise(module, 8)
        assert widest(lambda: results(module, x, gradient)) == 2 * length * 12  # noqa: B023 the hidden states themselves


def test_a_checkpoint_around_it_does_not_run_it_for_nothing():
    module, x, gradient = make("llama", torch.float64)
    calls = []
    module.act_fn.register_forward_hook(lambda *_: calls.append(1))
    blockwise(module, 14)
    leaf = x.clone().requires_grad_()
    y = checkpoint(lambda z: z + module(2 * z), leaf, use_reentrant=False)
    y.backward(gradient)
    assert len(calls) == 2, "once forward and once backward"
    found = leaf.grad
    blockwise(module, None)
    plain = x.clone().requires_grad_()
    (plain + module(2 * plain)).backward(gradient)
    assert relative(found, plain.grad) <= BUDGETS[torch.float64]  # type: ignore[arg-type]


def test_without_gradients_and_under_autocast_it_is_the_plain_module():
    module, x, gradient = make("llama", torch.float32)
    cut = copy.deepcopy(module)
    blockwise(cut, 4)
    with torch.no_grad():
        assert relative(cut(x), module(x)) <= BUDGETS[torch.float32]
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = (results(each, x, gradient.bfloat16()) for each in (module, cut))
    assert found["y"].dtype == expected["y"].dtype == torch.bfloat16  # type: ignore[union-attr]
    for part, tensor in expected.items():
        # Autocast rounds every product to bfloat16, chunk by chunk: 2^-9.
        assert relative(found[part], tensor) <= 4e-3, part  # type: ignore[arg-type]


def test_copies_run_their_own_weights_and_taking_it_back_leaves_nothing():
    module, x, _ = make("llama", torch.float64)
    blockwise(module, 3)
    twin = copy.deepcopy(module)
    with torch.no_grad():
        twin.gate_proj.weight.zero_()
        assert float(twin(x).abs().max()) == 0.0
        assert float(module(x).abs().max()) > 0
    blockwise(module, None)
    assert set(vars(module)) == set(vars(MODULES["llama"]()))


def test_a_norm_whose_weight_is_wider_than_its_input_is_not_rounded_more_often():
    torch.manual_seed(0)
    norm, x, gradient = jittered(LlamaRMSNorm(12)), torch.randn(2, 7, 12).bfloat16(), torch.randn(2, 7, 12)
    expected = results(copy.deepcopy(norm), x, gradient)
    blockwise(norm, 14)
    found = results(norm, x, gradient)
    assert found["y"].dtype == torch.float32  # type: ignore[union-attr]
    assert all(torch.equal(found[part], tensor) for part, tensor in expected.items())  # type: ignore[arg-type]


def test_a_gradient_of_a_gradient_is_refused_and_not_made_up():
    module = MODULES["llama"]()
    blockwise(module, 3)
    x = torch.randn(2, 7, 12, requires_grad=True)
    with pytest.raises(UnsupportedError, match="create_graph=True"):
        torch.autograd.grad(module(x).square().sum(), x, create_graph=True)


@pytest.mark.parametrize("chunk", [0, -1, 2.5, "many", True])
def test_a_chunk_that_is_no_number_of_tokens_is_refused(chunk: Any):
    with pytest.raises(RingspanError, match="whole number of at least one token"):
        blockwise(MODULES["llama"](), chunk)


def test_what_may_look_at_other_positions_is_refused():
    with pytest.raises(UnsupportedError, match="act_fn is a Conv1d"):
        mlp = MODULES["llama"]()
        mlp.act_fn = nn.Conv1d(20, 20, 1)
        blockwise(mlp, 3)
    with pytest.raises(UnsupportedError, match=r"drops 0\.1"):
        mlp = MODULES["llama"]()
        mlp.act_fn = nn.Sequential(nn.SiLU(), nn.Dropout(0.1))
        blockwise(mlp, 3)


def test_shelves_that_adapters_leave_empty_are_no_hindrance():
    from ringspan.transformer.blockwise import check_position_wise

    check_position_wise(nn.Sequential(nn.ModuleDict({"base": nn.Linear(4, 4)}), nn.ParameterDict()))
    with pytest.raises(UnsupportedError, match="ParameterDict"):
        check_position_wise(nn.Sequential(nn.ParameterDict({"weight": nn.Parameter(torch.ones(4))})))
