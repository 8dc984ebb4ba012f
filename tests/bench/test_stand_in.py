"""The stand-in for flash-attn keeps that package's contract: names, defaults, four results, gradients written in place."""

from __future__ import annotations

import inspect
import sys

import pytest
import torch
from torch import Tensor

from ringspan.bench.peers import stand_in
from ringspan.bench.peers.stand_in import flash_attn
from ringspan.geometry import parse_mask
from ringspan.verify import Inputs, dense_attention, make_inputs

pytestmark = pytest.mark.skipif(stand_in.is_installed(), reason="flash-attn is installed: there is nothing to stand in for")


def inputs(length: int) -> Inputs:
    return make_inputs(1, length, 4, 2, 16, torch.float32, 0)


def close(found: Tensor, exact: Tensor) -> bool:
    return float((found.double() - exact).norm() / exact.norm()) < 2e-6  # float32


def test_it_is_importable_within_the_context_alone():
    before = sys.modules.get("flash_attn")
    with flash_attn() as name:
        import flash_attn as package  # type: ignore[reportMissingImports]
        from flash_attn.flash_attn_interface import _flash_attn_forward  # type: ignore[reportMissingImports]

        assert name == "flash2" and package.__version__ == "2.8.3"
        assert package.flash_attn_func is stand_in.flash_attn_func and _flash_attn_forward is stand_in._flash_attn_forward
    assert sys.modules.get("flash_attn") is before and "flash_attn.flash_attn_interface" not in sys.modules


@pytest.mark.parametrize("mask", ["causal", "full", "window:7"])
def test_forward_and_backward_are_attention_and_write_in_place(mask: str):
    whole = inputs(29)
    exact = dense_attention(whole, parse_mask(mask))
    window = (7, 0) if mask == "window:7" else (-1, -1)
    asked = (0.0, 0.25, mask == "causal", *window)
    out, lse, *rest = stand_in._flash_attn_forward(whole.q, whole.k, whole.v, *asked)
    assert len(rest) == 2 and close(out, exact.out) and close(lse, exact.lse)
    dq, dk, dv = (torch.full_like(tensor, float("nan")) for tensor in (whole.q, whole.k, whole.v))
    stand_in._flash_attn_backward(whole.dout, whole.q, whole.k, whole.v, out, lse, dq, dk, dv, *asked)
    assert close(dq, exact.dq) and close(dk, exact.dk) and close(dv, exact.dv)


def test_a_causal_mask_counts_from_the_bottom_right_corner():
    whole = inputs(20)
    exact = dense_attention(whole, parse_mask("causal"))
    out, *_ = stand_in._flash_attn_forward(whole.q[:, 13:], whole.k, whole.v, 0.0, 0.25, True)
    assert close(out, exact.out[:, 13:])


def test_varlen_is_attention_of_each_document():
    whole = inputs(40)
    exact = dense_attention(whole, parse_mask("causal&documents:1,22,17"))
    borders = torch.tensor([0, 1, 23, 40], dtype=torch.int32)
    asked = (borders, borders, 22, 22, 0.0, 0.25, True)
    out, lse, *_ = stand_in._flash_attn_varlen_forward(whole.q[0], whole.k[0], whole.v[0], *asked)
    assert lse.shape == (4, 40) and close(out[None], exact.out)
    grads = [torch.full_like(tensor[0], float("nan")) for tensor in (whole.q, whole.k, whole.v)]
    stand_in._flash_attn_varlen_backward(whole.dout[0], whole.q[0], whole.k[0], whole.v[0], out, lse, *grads, *asked)
    assert all(close(found[None], wanted) for found, wanted in zip(grads, (exact.dq, exact.dk, exact.dv), strict=True))


def test_the_differentiable_function_has_its_gradients():
    whole = inputs(23)
    exact = dense_attention(whole, parse_mask("causal"))
    leaves = [tensor.clone().requires_grad_() for tensor in (whole.q, whole.k, whole.v)]
    out = stand_in.flash_attn_func(*leaves, causal=True)
    grads = torch.autograd.grad(out, leaves, whole.dout)
    assert close(out.detach(), exact.out) and all(close(*pair) for pair in zip(grads, (exact.dq, exact.dk, exact.dv), strict=True))


def test_arguments_have_the_names_by_which_peers_find_them():
    # ring-flash-attention reads the arguments of these functions and chooses among two generations of window arguments.
    for name in ("_flash_attn_forward", "_flash_attn_backward", "_flash_attn_varlen_forward", "_flash_attn_varlen_backward"):
        arguments = inspect.getfullargspec(getattr(stand_in, name)).args
        assert {"q", "k", "v", "dropout_p", "softmax_scale", "causal", "window_size_left", "window_size_right", "softcap"} <= {*arguments}
        assert "window_size" not in arguments and arguments[0] == ("dout" if "backward" in name else "q")


def test_what_it_does_not_compute_is_not_ignored():
    whole = inputs(8)
    with pytest.raises(AssertionError, match="plain attention"):
        stand_in.flash_attn_func(whole.q, whole.k, whole.v, dropout_p=0.1)
