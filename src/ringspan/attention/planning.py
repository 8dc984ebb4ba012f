"""What is settled at the first call with new shapes: agreed on by all ranks; then kernel, schedules, programs, and who carries."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ringspan.attention import checks
from ringspan.attention.choice import choose_kernel
from ringspan.attention.inbox import Inbox, inbox
from ringspan.attention.landing import make_rooms
from ringspan.attention.leaving import when_inputs_are_kept, when_stages_leave
from ringspan.attention.materialised import check_materialised
from ringspan.attention.peer_courier import row_bytes
from ringspan.attention.peer_swapper import PeerSwapper
from ringspan.attention.plan import Plan
from ringspan.attention.program import resolve
from ringspan.attention.reshard import head_group, make_exchange
from ringspan.attention.scoring import Scoring, TileScores
from ringspan.attention.swap import TransportSwapper
from ringspan.errors import UnsupportedError
from ringspan.geometry import Grid, HeadShare, head_shares, head_stages
from ringspan.kernels import KERNELS, Kernel, accumulator_dtype, lse_gradient_refusal
from ringspan.schedule import PieceBytes, Schedule
from ringspan.strategies import MACHINES, SENDING, Choice, Machine, Schedules, choose, complete_ring, make_schedules
from ringspan.transport import InProcessTransport, PeerMemory, SomePeers, Subgroup, agree, peer_memory

if TYPE_CHECKING:
    from ringspan.attention.sequence import Sequence

Peers = tuple[PeerMemory, dict[str, Inbox]]


class Planned(NamedTuple):
    """A plan, the schedules that it runs, what strategy `auto` chose where it did, and how much peer memory every rank keeps for it."""

    plan: Plan
    schedules: Schedules
    choice: Choice | None
    peer_bytes: int


def whole_scale(q: Tensor, scale: float | None) -> float | None:
    """The scale of the scores, where none is given that of the heads' width."""
    # A head without a width has no such power; that it is none is then said on every rank.
    return q.shape[-1] ** -0.5 if scale is None and q.ndim and q.shape[-1] else scale


def wants_gradients(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> bool:
    """Whether a backward may come after the forward."""
    return torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in (q, k, v, sinks))


def plan_key(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scale: float | None, softcap: float | None, return_lse: bool
) -> Hashable:
    """What a plan is found again by: calls with another one are agreed on anew."""
    about_sinks, differentiable = None if sinks is None else (sinks.shape, sinks.device), wants_gradients(q, k, v, sinks)
    about = scale, softcap, about_sinks, return_lse, differentiable
    return (q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device, *about)


def make_plan(
    sequence: Sequence, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scale: float | None, softcap: float | None, return_lse: bool
) -> Planned:
    """The plan of attention of these tensors on `sequence`. Collective. See `Sequence.attention` for the arguments.

    Raises:
        RingspanError: on every rank, where something is wrong on any rank or the ranks disagree; and on each that comes here in a capture,
            where nothing can be agreed on.
    """
    context = sequence.context
    features, deterministic = checks.features(sequence.mask, softcap, scale), context.deterministic
    materialised = "ring_self_attention" in (context.strategy, context.options.get("inner"))

    def check() -> None:
        checks.check_attention(
            q, k, v, sinks, scale, softcap, sequence.shard_length, sequence.rank, context.kernel, features, deterministic
        )
        checks.check_device(q.device.type, context.transport.devices, sequence.num_ranks)
        checks.check_mask_mod(sequence.mask, sequence.length, q.shape[0], q.shape[2], q.device)
        if materialised:
            check_materialised(context.kernel, softcap, sinks)

    problem, differentiable = checks.problem_of(check), wants_gradients(q, k, v, sinks)
    asked_of_all = checks.describe_attention(q, k, sinks, scale, softcap, return_lse, differentiable)
    checks.check_not_captured("attention", asked_of_all, q.device, sequence.num_ranks)
    agree(context.transport, "attention", asked_of_all, problem)
    transport = context.transport
    asked = checks.kernel_problem(q, k, features, deterministic)
    if materialised:
        kernel = KERNELS["reference"]
    else:
        kernel = choose_kernel(context.kernel, asked, max(sequence.layout.shard_lengths), transport)
    found = _memory(sequence, q, materialised)
    schedules, choice = _choose(sequence, q, k, kernel, None if isinstance(found, str) else found)
    place, members, first_head = 0, tuple(range(transport.size)), 0
    shapes = frozenset({"band"}) if materialised else kernel.shapes
    varlen = kernel.can.varlen and q.shape[0] == 1 and sequence.mask.mod is None
    if (grid := schedules.grid) is not None:
        place = grid.place(transport.rank)
        members, first_head = grid.context_group(place), head_shares(q.shape[2], k.shape[2], grid.degree)[place].q_start
        transport = Subgroup(transport, members)
    forward, backward = (
        resolve(schedule, schedules.layout, sequence.mask, shapes, transport.rank, varlen)
        for schedule in (schedules.forward, schedules.backward)
    )
    scoring = Scoring(
        scale=float(scale or 0.0), softcap=softcap, mask_mod=sequence.mask.mod, first_head=first_head, deterministic=deterministic
    )
    lse_refusal = None if materialised else lse_gradient_refusal(kernel, asked)
    stages = _head_stages(schedules, q, k)
    rooms, first = ((), 0) if grid is None else make_rooms(grid, sequence.layout, schedules.layout, q, stages, differentiable)
    directions = (schedules.forward, schedules.backward) if differentiable else (schedules.forward,)
    lse_gradient = return_lse and lse_refusal is None
    peers, peer_bytes = _peers(sequence, q, k, schedules.grid, directions, transport.rank, kernel, found, lse_gradient, first)
    exchange = None
    if grid is not None:
        group = head_group(grid, context.transport.rank)
        swapper = TransportSwapper(context.transport, group)
        if peers is not None:
            swapper = PeerSwapper(peers[0], context.transport.bytes_sent, group)
            peers = SomePeers(peers[0], members, first), peers[1]
        machine = _machine(q, None if peers is None else peers[0])
        pairs, length = sum(launch.pairs for step in forward.steps for launch in step.launches), schedules.layout.length
        sizes = _sizes(q, k, kernel)
        leaving = {each: when_stages_leave(stages, pairs, length, sizes, machine, each) for each in ("forward", "backward")}
        keeping = when_inputs_are_kept(stages, length, sizes, machine)
        exchange = make_exchange(swapper, group, grid, sequence.layout, schedules.layout, stages, rooms, leaving, keeping)
    if context.replays is not None:
        refused = checks.replay_refusal(q.device.type, kernel, context.transport, transport.size, peers is not None)
        if refused is not None:
            raise refused
    plan = Plan(
        forward,
        backward,
        kernel,
        transport,
        context.transport,
        TileScores(scoring, schedules.layout, q.device),
        exchange,
        materialised,
        context.kv_heads_per_stage,
        lse_refusal,
        peers,
        return_lse,
        differentiable,
        context.replays,
    )
    if len(stages) > 1:
        starts = [shares[place].q_start - first_head for shares in stages]
        of_stages = (replace(plan, stage=stage, scores=plan.scores.from_head(start)) for stage, start in enumerate(starts))
        plan = replace(plan, stages=tuple(of_stages))
    return Planned(plan, schedules, choice, peer_bytes)


def _head_stages(schedules: Schedules, q: Tensor, k: Tensor) -> tuple[tuple[HeadShare, ...], ...]:
    """By stage and by place within a head group, who computes which heads."""
    if schedules.grid is None:
        return ()
    shares = head_shares(q.shape[2], k.shape[2], schedules.grid.degree)
    # A rank without key heads would have nothing in any of them.
    number = max(1, min(schedules.head_stages, max(share.kv_heads for share in shares)))
    return tuple(head_stages(shares, number)) if number > 1 else (shares,)


def _choose(sequence: Sequence, q: Tensor, k: Tensor, kernel: Kernel, memory: PeerMemory | None) -> tuple[Schedules, Choice | None]:
    """The schedules for these shapes. The same on every rank: the ranks have just agreed on all that it depends on."""
    context, layout, mask, sizes = sequence.context, sequence.layout, sequence.mask, _sizes(q, k, kernel)
    strategy, options, choice, machine = context.strategy, context.options, None, _machine(q, memory)
    if strategy == "auto":
        choice = choose(layout, mask, sizes, machine, make_schedules, replayed=context.replays is not None)
        strategy, options = choice.strategy, dict(choice.options)
    if strategy == "ring" and layout.num_ranks > 1:
        options = complete_ring(tuple(sorted(options.items())), layout, mask, sizes, machine, make_schedules)
    return make_schedules(strategy, layout, mask, **options), choice


def _sizes(q: Tensor, k: Tensor, kernel: Kernel) -> PieceBytes:
    return PieceBytes(
        batch=q.shape[0],
        heads=q.shape[2],
        kv_heads=k.shape[2],
        head_dim=q.shape[3],
        element_bytes=q.element_size(),
        accumulator_bytes=accumulator_dtype(q.dtype).itemsize,
        single_bytes=q.element_size() if kernel.rounds else None,
    )


def _machine(q: Tensor, memory: PeerMemory | None) -> Machine:
    if memory is None:
        return SENDING.get(q.device.type, MACHINES["cpu"])
    machine = MACHINES.get(q.device.type, MACHINES["cpu"])
    return machine if memory.links_rest else replace(machine, rest_seconds=None)


def _memory(sequence: Sequence, q: Tensor, materialised: bool) -> PeerMemory | str | None:
    """Peer memory, or why there is none where it might be wanted; None where it is not. The same on every rank. Collective."""
    context = sequence.context
    threads = isinstance(context.transport, InProcessTransport)
    unwanted = context.carrier == "process_group" or context.num_ranks == 1
    if unwanted or (context.carrier == "auto" and (threads or q.device.type != "cuda")):
        return None
    reason = checks.peer_memory_reason(materialised, context.kv_heads_per_stage)
    return peer_memory(context.transport, q.device) if reason is None else reason


def _peers(
    sequence: Sequence,
    q: Tensor,
    k: Tensor,
    grid: Grid | None,
    directions: tuple[Schedule, ...],
    rank: int,
    kernel: Kernel,
    memory: PeerMemory | str | None,
    lse_gradient: bool,
    first: int,
) -> tuple[Peers | None, int]:
    """`memory` and this rank's part in it, with the size of an inbox, or None for the transport. The same decision on every rank.

    In an inbox the pieces of the schedules lie from the byte `first` on, after what an exchange of heads brings.
    """
    context = sequence.context
    if memory is None:
        return None, 0
    if not isinstance(memory, str):
        pieces = 0
        shares = [HeadShare(0, q.shape[2], 0, k.shape[2])] if grid is None else head_shares(q.shape[2], k.shape[2], grid.degree)
        mine = shares[0 if grid is None else grid.place(context.transport.rank)]
        inboxes: dict[str, Inbox] = {}
        # All inboxes are alike, also where some ranks have more heads than others.
        for share in (*set(shares), mine):
            tensors = q[:, :, : share.heads], k[:, :, : share.kv_heads]
            sizes, singles = (row_bytes(*tensors, rounded, lse_gradient) for rounded in (False, kernel.rounds))
            inboxes = {each.direction: inbox(each, rank, sizes, singles) for each in directions}
            pieces = max(pieces, *(each.nbytes for each in inboxes.values()))
        if 2 * max(1, *(each.messages for each in inboxes.values())) <= memory.channels:
            memory.reserve(first + pieces)
            return (memory, inboxes), first + pieces
        memory = f"it has {memory.channels} signals from a rank to another, and this schedule needs more"
    if context.carrier == "peer_memory":
        raise UnsupportedError(
            "transport 'peer_memory'", memory, "A transport that was asked for is never replaced", "transport='process_group'"
        )
    return None, 0
