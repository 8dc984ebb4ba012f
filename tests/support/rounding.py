"""A kernel that rounds, where there is no GPU."""

from __future__ import annotations

from dataclasses import replace

from ringspan.kernels.reference import Reference


class Rounding(Reference):
    """The reference, with results as CUDA kernels give them: in the inputs' dtype."""

    can = replace(Reference.can, rounds=True)

    def forward(self, q, k, v, scores):
        """Rounded out."""
        out, lse = super().forward(q, k, v, scores)
        return out.to(q.dtype), lse

    def backward(self, dout, q, k, v, out, lse, dlse, scores):
        """Rounded gradients."""
        dq, dk, dv = super().backward(dout, q, k, v, out, lse, dlse, scores)
        return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)
