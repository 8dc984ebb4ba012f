"""One autograd function for every strategy, layout, mask, kernel and transport."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ringspan.attention.executor import BackwardPass, ForwardPass
from ringspan.attention.materialised import RingSelfAttention
from ringspan.attention.program import RankProgram
from ringspan.attention.reshard import Exchange, HeadsToPositions, PositionsToHeads
from ringspan.attention.scoring import TileScores, add_sinks, sinks_gradient
from ringspan.attention.tape import remembered
from ringspan.errors import UnsupportedError
from ringspan.kernels import Kernel, accumulator_dtype
from ringspan.transport import Transport


@dataclass(frozen=True)
class Plan:
    """Everything that attention needs besides tensors: resolved once, used at every call.

    `exchange` is there where positions are exchanged for heads around the programs; `materialised` where these are Ring Self-Attention's;
    `kv_heads_per_stage` where heads take turns.
    """

    forward: RankProgram
    backward: RankProgram
    kernel: Kernel
    transport: Transport
    scores: TileScores
    exchange: Exchange | None = None
    materialised: bool = False
    kv_heads_per_stage: int | None = None


class DistributedAttention(torch.autograd.Function):
    """q, k, v of this rank to out and lse of this rank; the backward brings every gradient to the rank that owns it."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, plan: Plan) -> tuple[Tensor, Tensor]:
        """Runs the forward program and keeps q, k, v, out and lse."""

        def compute() -> tuple[Tensor, Tensor]:
            forward = ForwardPass(plan.forward, plan.kernel, plan.transport, plan.scores, q, k, v)
            forward.run()
            out, lse = forward.result()
            return (out, lse) if sinks is None else add_sinks(out, lse, sinks)

        out, lse = remembered(compute)
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


def _attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, plan: Plan) -> tuple[Tensor, Tensor]:
    """Some key heads after the others where the plan says so, so that what visits and what is accumulated is for those alone."""
    if plan.kv_heads_per_stage is None or plan.kv_heads_per_stage >= k.shape[2]:
        return _attend_stage(q, k, v, sinks, plan)
    group = q.shape[2] // k.shape[2]
    parts = []
    for first in range(0, k.shape[2], plan.kv_heads_per_stage):
        kv = slice(first, min(first + plan.kv_heads_per_stage, k.shape[2]))
        heads = slice(kv.start * group, kv.stop * group)
        stage = replace(plan, scores=plan.scores.from_head(heads.start))
        parts.append(_attend_stage(q[:, :, heads], k[:, :, kv], v[:, :, kv], None if sinks is None else sinks[heads], stage))
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs, 2), torch.cat(lses, 1)


def _attend_stage(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, plan: Plan) -> tuple[Tensor, Tensor]:
    if plan.materialised:
        return RingSelfAttention.apply(q, k, v, plan.forward, plan.backward, plan.transport, plan.scores)
    return DistributedAttention.apply(q, k, v, sinks, plan)


def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, plan: Plan, return_lse: bool) -> tuple[Tensor, Tensor | None]:
    """out, and lse where it is wanted, of this rank's q, with the exchange of positions for heads around it where the plan has one."""
    exchange = plan.exchange
    if exchange is None:
        return _attend(q, k, v, sinks, plan)
    heads = q.shape[2]
    q, k, v = PositionsToHeads.apply(q, k, v, exchange)
    share = exchange.share
    if share.heads:
        sinks = None if sinks is None else sinks[share.q_start : share.q_stop]
        out, lse = _attend(q, k, v, sinks, plan)
    else:
        # No head is this rank's: nor is one of its context group's, so nobody waits for it.
        out, lse = q * 1, q.sum(-1, dtype=accumulator_dtype(q.dtype)).transpose(1, 2)
        # Sinks have a gradient on every rank, here of zeros: who adds them up need not ask whether there is one.
        out = out if sinks is None else out + sinks[:0].sum()
    return HeadsToPositions.apply(out, lse if return_lse else None, exchange, heads)
