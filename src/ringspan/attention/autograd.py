"""One autograd function for every strategy, layout, mask, kernel and transport."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ringspan.attention.executor import BackwardPass, ForwardPass
from ringspan.attention.program import RankProgram
from ringspan.errors import UnsupportedError
from ringspan.kernels import Kernel
from ringspan.transport import Transport


@dataclass(frozen=True)
class Plan:
    """Everything that attention needs besides tensors: resolved once, used at every call."""

    forward: RankProgram
    backward: RankProgram
    kernel: Kernel
    transport: Transport


class DistributedAttention(torch.autograd.Function):
    """q, k, v of this rank to out and lse of this rank; the backward brings every gradient to the rank that owns it."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> tuple[Tensor, Tensor]:
        """Runs the forward program and keeps q, k, v, out and lse."""
        forward = ForwardPass(plan.forward, plan.kernel, plan.transport, scale, q, k, v)
        forward.run()
        out, lse = forward.result()
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan, ctx.scale = plan, scale
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout: Tensor | None, dlse: Tensor | None):
        """Runs the backward program: every rank must come here, as every rank came through the forward."""
        q, k, v, out, lse = ctx.saved_tensors
        kernel = ctx.plan.kernel
        if dlse is not None and not kernel.lse_gradient:
            raise UnsupportedError(
                f"a gradient through lse with kernel {kernel.name!r}",
                "this kernel's backward takes none",
                "A gradient that is asked for is computed or refused",
                "kernel='reference', or lse.detach()",
            )
        dout = torch.zeros_like(out) if dout is None else dout
        backward = BackwardPass(ctx.plan.backward, kernel, ctx.plan.transport, ctx.scale, q, k, v, out, lse, dout, dlse)
        backward.run()
        return *backward.result(), None, None
