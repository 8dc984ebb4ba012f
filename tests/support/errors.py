"""How far results are from what they should be."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.support.dense import Outcome

BUDGETS = {torch.float32: 2e-5, torch.float64: 1e-12}
"""Relative errors in the Frobenius norm. Resolution is 1e-7 and 2e-16; sums over keys, ranks and merges round a few hundred times."""

VANISHED = 1e-10
"""An exact tensor below this root mean square (inputs have 1) is zero but for float64's rounding, and errors are measured as they are."""


def relative(found: Tensor, exact: Tensor) -> float:
    """‖found − exact‖ / ‖exact‖ in the Frobenius norm; NaN wherever one is found; infinities must agree."""
    assert found.shape == exact.shape, f"{tuple(found.shape)} beside {tuple(exact.shape)}"
    found, exact = found.double(), exact.double()
    infinite = torch.isinf(exact)
    if not torch.equal(found[infinite], exact[infinite]):
        return float("inf")
    found, exact = found.masked_fill(infinite, 0.0), exact.masked_fill(infinite, 0.0)
    size, root = float(torch.linalg.vector_norm(exact)), max(1, exact.numel()) ** 0.5
    return float(torch.linalg.vector_norm(found - exact)) / (size if size > VANISHED * root else root)


def assert_close(found: Outcome, exact: Outcome, budget: float, what: str = "") -> None:
    """Every tensor within `budget`; NaN never is."""
    errors = {name: relative(tensor, exact.named()[name]) for name, tensor in found.named().items()}
    assert set(found.named()) == set(exact.named())
    over = {name: f"{error:.2e}" for name, error in errors.items() if not error <= budget}
    assert not over, f"{what}: relative errors {over} beyond {budget:.0e}"
