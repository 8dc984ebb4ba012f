"""One autograd function for every strategy, layout, mask, kernel and transport."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ringspan.attention.executor import BackwardPass, ForwardPass
from ringspan.attention.materialised import MaterialisedBackward, MaterialisedForward
from ringspan.attention.observe import AFTER, BEFORE, watch
from ringspan.attention.plan import Plan
from ringspan.attention.reshard import Coming, Heads, Inputs, Into, OutputGradients, at_hand
from ringspan.attention.scoring import TileScores, add_sinks, sinks_gradient
from ringspan.attention.streams import give_away
from ringspan.attention.tape import remembered
from ringspan.errors import UnsupportedError
from ringspan.kernels import accumulator_dtype, first_order, without_autocast


class DistributedAttention(torch.autograd.Function):
    """q, k, v of this rank to out and lse of this rank; the backward brings every gradient to the rank that owns it.

    The exchange of positions for heads is inside: autograd would round a gradient to the dtype of the tensor that it is of, and the parts
    that several ranks make of one key head's gradient must reach its owner as they are.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, plan: Plan) -> tuple[Tensor, Tensor | None]:
        """Runs the forward program and keeps q, k, v, out and lse of this rank's heads for a backward; lse is None if it is not wanted."""
        plan.scores.keep_if_captured()
        ctx.plan, ctx.device, ctx.heads = plan, q.device, (q.shape[2], k.shape[2])
        ctx.set_materialize_grads(False)
        lse_shapes = [(q.shape[:3], accumulator_dtype(q.dtype))] if plan.return_lse else []
        stages, into = plan.stages or (plan,), _into(plan, q, (q.shape, q.dtype), *lse_shapes)
        with plan.in_one_piece() as held, plan.in_turns(q, math.inf) as turns:
            held += (coming := _inputs(q, k, v, plan))
            done = []
            for stage, inputs in zip(stages, coming, strict=True):
                done.append(turns(stage.stage, partial(_attended, inputs, sinks, stage, into)))
                held.append(done[-1])
            out, lse = [going.wait() for _, going in done][-1]
            for inputs in coming:
                inputs.settle()
        # All stages but the last were computed beside; and a tape may have them as well.
        give_away(*(tensor for results, _ in done[:-1] for tensor in results))
        if plan.differentiable:
            # By stage, as many each.
            of_stages = ([*inputs.kept(), *results] for inputs, (results, _) in zip(coming, done, strict=True))
            ctx.save_for_backward(sinks, *(tensor for kept in of_stages for tensor in kept))
        return out, lse

    @staticmethod
    @first_order
    def backward(ctx, *gradients: Tensor | None):
        """Runs the backward program: every rank must come here, as every rank came through the forward."""
        with watch(ctx.plan.observer, BEFORE, "whole"), without_autocast(ctx.device):
            # Under checkpointing a layer is computed again to give them: its errors are its own.
            saved = ctx.saved_tensors
            ctx.plan.scores.keep_if_captured()
            with ctx.plan.in_one_piece() as held:
                return DistributedAttention._input_gradients(ctx, saved, held, *gradients)

    @staticmethod
    def _input_gradients(ctx, saved: tuple[Tensor, ...], held: list[object], *gradients: Tensor | None):
        dout, dlse = gradients
        sinks, *kept = saved
        plan, exchange = ctx.plan, ctx.plan.exchange
        stages = plan.stages or (plan,)
        each = len(kept) // len(stages)
        of_stages = [kept[index * each : (index + 1) * each] for index in range(len(stages))]
        _, _, _, out, lse, *_ = of_stages[0]
        if dlse is not None and plan.lse_gradient_refusal is not None:
            raise UnsupportedError(
                f"a gradient through lse with kernel {plan.kernel.name!r}",
                plan.lse_gradient_refusal,
                "A gradient that is asked for is computed or refused",
                "kernel='flash4' or kernel='reference', or lse.detach()",
            )
        if dout is None:
            # The other ranks wait for it.
            rows = out.shape[1] if exchange is None else exchange.part_lengths[exchange.place]
            dout = out.new_zeros((out.shape[0], rows, ctx.heads[0], out.shape[3]))
        if dlse is None and plan.lse_gradient_travels:
            dlse = lse.new_zeros((dout.shape[0], ctx.heads[0], dout.shape[1]))
        # A rank without heads has a gradient too, of zeros: who adds them up need not ask whether there is one.
        both_sinks = None if sinks is None else (sinks, torch.zeros_like(sinks))
        of_keys = (*dout.shape[:2], ctx.heads[1], dout.shape[3])
        into = _into(plan, dout, *((shape, dout.dtype) for shape in (dout.shape, of_keys, of_keys)))
        with plan.in_turns(dout) as turns:
            held += (coming := _output_gradients(dout, dlse, plan))
            going = []
            for stage, of_results, found in zip(stages, coming, of_stages, strict=True):
                going.append(turns(stage.stage, partial(_differentiated, of_results, found, both_sinks, stage, into)))
                # Until the stages beside have been joined.
                held.append(going[-1].under_way)
            dq, dk, dv = [each.wait() for each in going][-1]
        return dq, dk, dv, None if both_sinks is None else both_sinks[1], None


def _inputs(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> list[Heads[Inputs]]:
    return [at_hand((q, k, v), [q, k, v])] if plan.exchange is None else plan.exchange.inputs_to_heads(q, k, v, plan.differentiable)


def _output_gradients(dout: Tensor, dlse: Tensor | None, plan: Plan) -> list[Heads[OutputGradients]]:
    return [at_hand((dout, dlse), [])] if plan.exchange is None else plan.exchange.output_gradients_to_heads(dout, dlse)


def _into(plan: Plan, like: Tensor, *results: tuple[tuple[int, ...], torch.dtype]) -> Into:
    """Where results of such shapes and dtypes are gathered, made when they are first asked for: a kernel's memory is free again then.

    Of several stages they are made now: memory of the current stream, and stages are computed on others.
    """
    made: list[Tensor] = []

    def into() -> list[Tensor]:
        made.extend([] if made else [like.new_empty(shape, dtype=dtype) for shape, dtype in results])
        return made

    if plan.stages:
        into()
    return into


def _attended(
    inputs: Heads[Inputs], sinks: Tensor | None, plan: Plan, into: Into
) -> tuple[list[Tensor], Coming[tuple[Tensor, Tensor | None]]]:
    """What the backward needs of the results of one stage's heads, and their out and lse on the way to who owns their positions."""
    q, k, v = inputs.wait()
    sinks, weights = _own(sinks, plan), []
    if plan.materialised:
        out, lse, weights = _forward(q, k, v, sinks, plan)
    else:
        out, lse = remembered(partial(_launched_forward, q, k, v, sinks, plan))
    kept, lse = [out, lse, *weights], lse if plan.return_lse else None
    if plan.exchange is None:
        return kept, Coming([], lambda: (out, lse))
    return kept, plan.exchange.outputs_to_positions(plan.stage, out, lse, into)


def _launched_forward(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, plan: Plan) -> tuple[Tensor, Tensor]:
    out, lse = plan.launched("forward", (q, k, v, sinks), lambda q, k, v, sinks: _forward(q, k, v, sinks, plan)[:2])
    return out, lse


def _differentiated(
    gradients: Heads[OutputGradients],
    kept: list[Tensor],
    sinks: tuple[Tensor, Tensor] | None,
    plan: Plan,
    into: Into,
) -> Coming[tuple[Tensor, Tensor, Tensor]]:
    """dq, dk and dv of the heads of one stage on the way to who owns their positions. `sinks`: and where their gradient goes."""
    dout, dlse = gradients.wait()
    q, k, v, out, lse, *weights = kept
    dq, dk, dv = plan.launched("backward", (q, k, v, out, lse, dout, dlse), partial(_backward, weights=weights, plan=plan))
    if sinks is not None:
        of_own = [each if plan.exchange is None else each[plan.exchange.q_heads[plan.stage][plan.exchange.place]] for each in sinks]
        of_own[1].copy_(sinks_gradient(dout, out, lse, dlse, of_own[0]))
    if plan.exchange is None:
        return Coming([], lambda: (dq, dk, dv))
    return plan.exchange.input_gradients_to_positions(plan.stage, dq, dk, dv, into)


class _Stage(NamedTuple):
    """Heads that are computed together, and what makes their scores."""

    heads: slice
    kv_heads: slice
    scores: TileScores


def _stages(plan: Plan, heads: int, kv_heads: int) -> Iterator[_Stage]:
    """Some key heads after the others where the plan says so, so that what visits and what is accumulated is for those alone.

    None where this rank has no head: nor has its context group, so that nobody waits for it.
    """
    step = min(plan.kv_heads_per_stage or kv_heads, kv_heads)
    for first in range(0, kv_heads, max(step, 1)):
        kv = slice(first, min(first + step, kv_heads))
        group = heads // kv_heads
        yield _Stage(slice(kv.start * group, kv.stop * group), kv, plan.scores.from_head(kv.start * group))


def _forward(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, plan: Plan) -> tuple[Tensor, Tensor, list[Tensor]]:
    """out and lse of these heads, and, of Ring Self-Attention, the weights of every stage."""
    stages = list(_stages(plan, q.shape[2], k.shape[2]))
    if len(stages) == 1:
        return _forward_stage(q, k, v, sinks, plan, stages[0])
    # Written where it stays, so that nothing but one stage's is there twice. Of no stage there is nothing to write: no head is this rank's.
    out, lse = q.new_empty(q.shape), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=accumulator_dtype(q.dtype))
    weights: list[Tensor] = []
    for stage in stages:
        out[:, :, stage.heads], lse[:, stage.heads], more = _forward_stage(q, k, v, sinks, plan, stage)
        weights += more
    return out, lse, weights


def _forward_stage(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, plan: Plan, stage: _Stage) -> tuple[Tensor, Tensor, list[Tensor]]:
    inputs = q[:, :, stage.heads], k[:, :, stage.kv_heads], v[:, :, stage.kv_heads]
    courier = plan.courier("forward", q)
    with watch(plan.observer, BEFORE, "pack"):
        if plan.materialised:
            run = MaterialisedForward(plan.forward, courier, stage.scores, *inputs)
        else:
            # A sink still scales the result: it is rounded after that.
            run = ForwardPass(plan.forward, courier, stage.scores, plan.streams(q, math.inf), plan.kernel, *inputs, rounds=sinks is None)
    run.run(plan.observer)
    with watch(plan.observer, AFTER, "cast"):
        out, lse = run.result()
    if sinks is not None:
        out, lse = add_sinks(out, lse, sinks[stage.heads])
    weights = [block for _, block in sorted(run.softmax().items())] if isinstance(run, MaterialisedForward) else []
    return out.to(q.dtype).contiguous(), lse, weights


def _backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None, weights: list[Tensor], plan: Plan
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv of these heads, rounded to the inputs' dtype but for dk and dv that are only parts (`Exchange.key_gradients_in`)."""
    dtype = k.dtype if plan.exchange is None else plan.exchange.key_gradients_in(k.dtype, plan.stage)
    stages = list(_stages(plan, q.shape[2], k.shape[2]))
    # Of Ring Self-Attention each stage has left a block of weights for each owner of keys.
    blocks = len(plan.scores.shard_lengths)

    def of(index: int) -> tuple[Tensor, Tensor, Tensor]:
        stage, kept = stages[index], dict(enumerate(weights[index * blocks : (index + 1) * blocks]))
        inputs = q[:, :, stage.heads], k[:, :, stage.kv_heads], v[:, :, stage.kv_heads]
        mine, stage_dout = out[:, :, stage.heads], dout[:, :, stage.heads]
        stage_dlse = None if dlse is None else dlse[:, stage.heads]
        courier = plan.courier("backward", q)
        with watch(plan.observer, BEFORE, "pack"):
            if plan.materialised:
                run = MaterialisedBackward(plan.backward, courier, stage.scores, *inputs, mine, kept, stage_dout, stage_dlse)
            else:
                # With the sink inside out and lse, every tile's share is exact as it stands: the sink is one more key whose value is zero.
                statistics = mine, lse[:, stage.heads], stage_dout, stage_dlse
                run = BackwardPass(
                    plan.backward, courier, stage.scores, plan.streams(q), plan.kernel, *inputs, *statistics, rounds_keys=dtype == k.dtype
                )
        run.run(plan.observer)
        with watch(plan.observer, AFTER, "cast"):
            dq, dk, dv = run.result()
            return dq.to(q.dtype).contiguous(), dk.to(dtype).contiguous(), dv.to(dtype).contiguous()

    if len(stages) == 1:
        return of(0)
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape, dtype=dtype), v.new_empty(v.shape, dtype=dtype)
    for index, stage in enumerate(stages):
        dq[:, :, stage.heads], dk[:, :, stage.kv_heads], dv[:, :, stage.kv_heads] = of(index)
    return dq, dk, dv


def _own(sinks: Tensor | None, plan: Plan) -> Tensor | None:
    return sinks if sinks is None or plan.exchange is None else sinks[plan.exchange.q_heads[plan.stage][plan.exchange.place]]


def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, plan: Plan) -> tuple[Tensor, Tensor | None]:
    """out, and lse where it is wanted, of this rank's q, with the exchange of positions for heads around it where the plan has one."""
    with watch(plan.observer, BEFORE, "whole"), without_autocast(q.device):
        return DistributedAttention.apply(q, k, v, sinks, plan)
