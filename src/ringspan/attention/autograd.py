"""One autograd function for every strategy, layout, mask, kernel and transport."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ringspan.attention.executor import BackwardPass, ForwardPass
from ringspan.attention.program import RankProgram
from ringspan.attention.scoring import TileScores, add_sinks, sinks_gradient
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
    scores: TileScores


class DistributedAttention(torch.autograd.Function):
    """q, k, v of this rank to out and lse of this rank; the backward brings every gradient to the rank that owns it."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, plan: Plan) -> tuple[Tensor, Tensor]:
        """Runs the forward program and keeps q, k, v, out and lse."""
        forward = ForwardPass(plan.forward, plan.kernel, plan.transport, plan.scores, q, k, v)
        forward.run()
        out, lse = forward.result()
        if sinks is not None:
            out, lse = add_sinks(out, lse, sinks)
        ctx.save_for_backward(q, k, v, out, lse, sinks)
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, *gradients: Tensor | None):
        """Runs the backward program: every rank must come here, as every rank came through the forward."""
        dout, dlse = gradients
        q, k, v, out, lse, sinks = ctx.saved_tensors
        plan = ctx.plan
        if dlse is not None and not plan.kernel.lse_gradient:
            raise UnsupportedError(
                f"a gradient through lse with kernel {plan.kernel.name!r}",
                "this kernel's backward takes none",
                "A gradient that is asked for is computed or refused",
                "kernel='reference', or lse.detach()",
            )
        dout = torch.zeros_like(out) if dout is None else dout
        # With the sink inside out and lse, every tile's share is exact as it stands: the sink is one more key whose value is zero.
        backward = BackwardPass(plan.backward, plan.kernel, plan.transport, plan.scores, q, k, v, out, lse, dout, dlse)
        backward.run()
        dsinks = None if sinks is None else sinks_gradient(dout, out, lse, dlse, sinks)
        return *backward.result(), dsinks, None
