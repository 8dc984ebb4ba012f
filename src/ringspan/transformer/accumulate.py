"""Parameter gradients that come in pieces: summed in float32 and rounded once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ringspan.kernels import autocast_dtype


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums of `dtype` are kept in: float32, or float64 where it is."""
    return torch.promote_types(dtype, torch.float32)


def add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += leftᵀ · right` without rounding the product to the inputs' dtype.

    Args:
        total: `[rows, columns]`, float32 or wider.
        left: `[tokens, rows]`.
        right: `[tokens, columns]`, of the dtype of `left`.
    """
    if left.dtype == total.dtype:
        total.addmm_(left.T, right)
    elif left.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
        # The matrix units add in float32 anyway, and begin with what is there; out_dtype keeps the sum from being rounded.
        torch.addmm(total, left.T, right, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.to(total.dtype).T, right.to(total.dtype))


class GradientSums:
    """Sums of the gradients of some parameters, each in `wide_dtype`, made when the first part comes.

    Args:
        parameters: those whose gradients are wanted.
    """

    def __init__(self, parameters: list[Tensor]) -> None:
        self._parameters = parameters
        self._places = {id(parameter): place for place, parameter in enumerate(parameters)}
        self._totals: list[Tensor | None] = [None] * len(parameters)

    def __contains__(self, tensor: object) -> bool:
        return id(tensor) in self._places

    def total(self, parameter: Tensor) -> Tensor:
        """The sum for `parameter` so far."""
        place = self._places[id(parameter)]
        total = self._totals[place]
        if total is None:
            total = self._totals[place] = torch.zeros(parameter.shape, dtype=wide_dtype(parameter.dtype), device=parameter.device)
        return total

    def add(self, parts: tuple[Tensor | None, ...]) -> None:
        """Adds one part a parameter; None is nothing."""
        for parameter, part in zip(self._parameters, parts, strict=True):
            if part is not None:
                self.total(parameter).add_(part)

    def results(self) -> list[Tensor | None]:
        """The sums in the parameters' dtypes; None where no part came."""
        return [
            None if total is None else total.to(parameter.dtype) for parameter, total in zip(self._parameters, self._totals, strict=True)
        ]


class _LinearInto(torch.autograd.Function):
    """A linear map whose backward adds the weight's gradient to a sum and hands autograd none of it."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, sums: GradientSums) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.sums = sums
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        (gradient,) = gradients
        x, weight, bias = ctx.saved_tensors
        flat = gradient.flatten(0, -2)
        add_product_(ctx.sums.total(weight), flat, x.flatten(0, -2))
        if bias is not None and bias in ctx.sums:
            total = ctx.sums.total(bias)
            total.add_(flat.sum(0, dtype=total.dtype))
        return (gradient @ weight if ctx.needs_input_grad[0] else None), None, None, None


class SumLinearGradients(TorchFunctionMode):
    """Within it, `F.linear` adds the gradients of weights that `sums` knows to `sums`, in one product that is never rounded.

    Everything else, and linear maps under autocast, is left to autograd.
    """

    def __init__(self, sums: GradientSums) -> None:
        super().__init__()
        self._sums = sums

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """Takes `F.linear` and nothing else."""
        keywords = dict(kwargs or {})
        if func is F.linear and autocast_dtype(args[0].device.type) is None:
            x, weight, bias = _linear_arguments(*args, **keywords)
            if weight in self._sums and x.dtype == weight.dtype:
                return _LinearInto.apply(x, weight, bias, self._sums)
        return func(*args, **keywords)


def _linear_arguments(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    return input, weight, bias
