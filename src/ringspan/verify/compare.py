"""Errors: how far a result is from the yardstick, as a ratio of norms and as the largest difference."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ringspan.verify.dense import Results

TENSORS = ("out", "lse", "dq", "dk", "dv")
"""What is compared, in this order."""

VANISHES = 1e-10
"""Below this root mean square, of inputs of size 1, an exact result is zero but for float64's own rounding (dq of a lone token)."""


@dataclass(frozen=True)
class Error:
    """The distance of a tensor from its float64 yardstick.

    Attributes:
        relative: ‖x − exact‖ / ‖exact‖ in the Frobenius norm; ‖x − exact‖ / √elements where the exact tensor vanishes. NaN if anything is.
        max_abs: the largest |x − exact|.
        elements: how many numbers were compared.
    """

    relative: float
    max_abs: float
    elements: int


def measure(found: Results, exact: Results) -> dict[str, Error]:
    """The error of each of `TENSORS`."""
    return {name: error(getattr(found, name), getattr(exact, name)) for name in TENSORS}


def error(found: Tensor, exact: Tensor) -> Error:
    """The error of one tensor. An infinity is right where the yardstick has the same one (lse of a query that sees nothing).

    A tensor of another shape than its yardstick is a mistake of the caller.
    """
    assert found.shape == exact.shape, f"{tuple(found.shape)} is compared with {tuple(exact.shape)}"
    found, exact = found.double(), exact.double()
    alike = torch.isinf(exact) & (found == exact)
    difference = torch.where(alike, torch.zeros_like(exact), found - exact)
    size = float(torch.linalg.vector_norm(torch.where(torch.isinf(exact), torch.zeros_like(exact), exact)))
    root = max(1, exact.numel()) ** 0.5
    distance = float(torch.linalg.vector_norm(difference))
    largest = float(difference.abs().max()) if difference.numel() else 0.0
    return Error(distance / (size if size > VANISHES * root else root), largest, exact.numel())
