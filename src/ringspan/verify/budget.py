"""How much error is allowed, and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ringspan.verify.compare import TENSORS, Error

FIXED = {
    "float64": (1e-12, "float64 resolves 2e-16; sums over keys and merges round a few hundred times at most"),
    "float32": (2e-5, "float32 resolves 1e-7; sums over keys and merges round a few hundred times at most"),
}
"""Relative errors that are allowed whatever the kernel."""

ALLOWANCE = 1.5
"""Half precision: so many times the error of one kernel that computes the whole on one rank."""

FEW_ELEMENTS = 2048
"""Below so many numbers rounding errors do not average out: one kernel may happen to round hardly any of them."""


@dataclass(frozen=True)
class Budget:
    """The largest relative error that passes, and the reason for it."""

    limit: float
    reason: str


def budgets(
    dtype: str,
    torch_dtype: torch.dtype,
    single: Callable[[], Mapping[str, Error]],
    tensors: Sequence[str] = TENSORS,
    allowance: float = ALLOWANCE,
) -> dict[str, Budget]:
    """The budget of each of `tensors`.

    Args:
        dtype: of q, k and v.
        torch_dtype: the same, as torch has it.
        single: the errors of the same kernel on one rank over the same tensors; asked for half precision alone.
        tensors: some of `TENSORS`.
        allowance: in half precision, so many times the error of `single`.
    """
    if dtype in FIXED:
        return {name: Budget(*FIXED[dtype]) for name in tensors}
    errors = single()
    rounding = torch.finfo(torch_dtype).eps / 2
    return {name: _half_precision(name, dtype, rounding, errors[name], allowance) for name in tensors}


def _half_precision(name: str, dtype: str, rounding: float, single: Error, allowance: float) -> Budget:
    limit = allowance * single.relative
    if name == "lse":
        floor, reason = FIXED["float32"][0], "lse is float32 whatever the inputs"
    else:
        floor, reason = 4 * rounding, f"four roundings to {dtype}, where numbers are so few that rounding errors do not average out"
    if (name == "lse" or single.elements < FEW_ELEMENTS) and not limit > floor:
        return Budget(floor, reason)
    # A kernel that is itself wrong must not buy its ring a budget.
    if not limit < 8 * rounding:
        return Budget(8 * rounding, f"eight roundings to {dtype}, since one kernel on one rank errs more, which is too much in itself")
    return Budget(limit, f"{allowance:g}× the error that one kernel in {dtype} makes over the same tensors on one rank")
