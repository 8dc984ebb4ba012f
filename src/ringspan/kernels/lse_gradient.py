"""A gradient through lse with kernels whose backward takes none: exact, by a few more columns a head.

With P the softmax weights, d loss / d scores = P ∘ (dO vᵀ − delta + dlse), where a kernel makes delta = Σ dO ∘ out itself. A column of ones
in v and of dlse in dO adds dlse to dO vᵀ; a column of zeros in out, which a backward reads for delta alone, adds nothing to delta; columns
of zeros in q and k leave the scores as they are. Half precision would round dlse: it is given as a sum of three numbers, in three columns.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor
from torch.nn.functional import pad

from ringspan.kernels.capabilities import Problem
from ringspan.kernels.protocol import Kernel, Scores

COLUMNS = 8
"""How much wider heads become: kernels want multiples of 8."""
_SUMMANDS = 3


def lse_gradient_refusal(kernel: Kernel, problem: Problem) -> str | None:
    """Why `kernel` computes no gradient through lse for `problem`, which it computes otherwise; None where it does."""
    if kernel.lse_gradient:
        return None
    reason = kernel.refusal(replace(problem, head_dim=problem.head_dim + COLUMNS))
    return reason and f"its backward takes none, and has none of heads that are {COLUMNS} columns wider for it: {reason}"


def backward(
    kernel: Kernel, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None, scores: Scores
) -> tuple[Tensor, Tensor, Tensor]:
    """`Kernel.backward`, with `dlse [batch, heads, queries]` whether or not the kernel takes it."""
    if dlse is None or kernel.lse_gradient:
        return kernel.backward(dout, q, k, v, out, lse, dlse, scores)
    width = q.shape[-1]
    q, k, v, out, dout = (pad(tensor, (0, COLUMNS)) for tensor in (q, k, v, out, dout))
    v[..., width : width + _SUMMANDS] = 1
    left = dlse.transpose(1, 2)
    for column in range(width, width + _SUMMANDS):
        dout[..., column] = left
        left = left - dout[..., column].to(left.dtype)
    dq, dk, dv = kernel.backward(dout, q, k, v, out, lse, None, scores)
    return dq[..., :width], dk[..., :width], dv[..., :width]
