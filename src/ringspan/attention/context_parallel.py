"""The public face: `ContextParallel` for a group of ranks, `Sequence` for what this rank owns of one sequence length."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any, Literal, NoReturn, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ringspan.attention import checks, handed
from ringspan.attention.autograd import Plan, attend
from ringspan.attention.batch import agree_on_batch, shard_batch
from ringspan.attention.decode import decode
from ringspan.attention.fingerprint import describe_mask
from ringspan.attention.gradients import broadcast_parameters, check_same_weights, sum_gradients
from ringspan.attention.graphs import keep_uncompiled, stays_uncompiled
from ringspan.attention.kept import Kept
from ringspan.attention.loss import IGNORE_INDEX, mean_cross_entropy
from ringspan.attention.observe import Observer
from ringspan.attention.planning import make_plan, plan_key, whole_scale
from ringspan.attention.positions import KnownTensors, may_count_from_0
from ringspan.attention.replay import Replays
from ringspan.attention.sharding import Unshard, take_shard
from ringspan.attention.use import Use
from ringspan.errors import RingspanError
from ringspan.geometry import Layout, Mask, causal, make_layout
from ringspan.kernels import Kernel, select_kernel
from ringspan.strategies import Choice, Schedules, make_schedules
from ringspan.transport import InProcessTransport, agree, make_transport

KEPT = 64
"""Sequences that a `ContextParallel` keeps, and shapes that a `Sequence` keeps plans for: the last ones asked for."""


class ContextParallel:
    """A group of ranks that share sequences, and how they share them.

    Args:
        mesh_or_group: a `DeviceMesh` with one axis, a `ProcessGroup`, the group of `run_in_process`, or None for the default process
            group (a single rank where torch.distributed is not initialised and no launcher has started several);
            `ringspan.transport.SingleRank()` for a rank that is alone whatever else there is.
        strategy: one of `ringspan.strategies.STRATEGIES`, or `auto`: what is predicted to end first; `Sequence.choice` says
            which and why. The backward of `ring` rotates keys or queries, whichever is sooner done for the heads at hand.
        layout: one of `ringspan.layouts`: who owns which positions; `auto` balances each sequence's mask.
        kernel: one of `ringspan.kernels.KERNELS`, or `auto`: on CUDA the fastest that computes the tensors at hand, which rank 0 times
            once for a class of shapes; on CPUs the first that does. `Sequence.kernel` says which.
        weights: for layout `weighted`, the share of each rank.
        kv_heads_per_stage: compute so many key heads (with their query heads) after one another, the whole schedule for each: head-strided
            gathering. What visits a rank shrinks by as much; launches and messages become more.
        transport: `process_group` sends and receives; `peer_memory` has each rank write to the others' memory, over NVLink by copy engines
            that take nothing from attention, or as threads do; `auto` takes the latter on GPUs that reach each other, where the strategy
            allows.
        deterministic: the gradients of attention are the same bits at every run on the same machine, or what cannot promise it is refused.
            Ranks' partials always add up in the schedule's order; within a tile the kernel decides. Not covered: reductions of the process
            group itself, in `sum_gradients` and the loss, and what a model computes besides.
        cuda_graphs: from the third call with the same shapes on, replay attention's forward and backward as a CUDA graph each, so that a
            short sequence does not take as long as its launches. It costs a copy of what goes in and of what comes out, and the memory of
            the graphs; nothing changes for a caller who captures the call in a graph of his own. While an observer looks on, passes are
            launched and not counted: then one is set on every rank or on none, lest ranks capture at different calls. Refused are CPUs,
            in-process ranks, kernels that cannot be captured, and passes through NCCL: of ranks that share no peer memory, of
            `kv_heads_per_stage`, and of head groups around a ring (`two_dimensional`).
        options: the strategy's own, such as `stages` of `all_gather` or `window` of `double_ring`.

    Attributes:
        observer: who looks on while attention of any of its sequences runs and while ranks sum; None, as at first, for nobody.
        replays: the passes that are replayed, with `cuda_graphs`; else None.

    Raises:
        RingspanError: on every rank, where the arguments are wrong or the ranks disagree about them.
    """

    def __init__(
        self,
        mesh_or_group: DeviceMesh | dist.ProcessGroup | InProcessTransport | None = None,
        *,
        strategy: str = "ring",
        layout: str = "zigzag",
        kernel: str = "auto",
        weights: tuple[float, ...] | None = None,
        kv_heads_per_stage: int | None = None,
        transport: str = "auto",
        deterministic: bool = False,
        cuda_graphs: bool = False,
        **options: int | str,
    ) -> None:
        self.transport = make_transport(mesh_or_group)
        # Layouts are kept by their weights.
        weights = tuple(weights) if isinstance(weights, list) else weights
        self.carrier = transport
        self.observer: Observer | None = None
        self.strategy, self.layout, self.kernel = strategy, layout, kernel
        self.kv_heads_per_stage, self.deterministic, self.options = kv_heads_per_stage, deterministic, options
        self.replays = Replays() if cuda_graphs else None
        self.use = Use()
        self._sequences: Kept[Sequence] = Kept(KEPT)
        self._decoders: Kept[Kernel] = Kept(KEPT)
        problem = checks.problem_of(
            lambda: checks.check_names(
                strategy, layout, kernel, weights, self.num_ranks, kv_heads_per_stage, transport, options, deterministic, cuda_graphs
            )
        )
        asked = f"strategy={strategy!r} layout={layout!r} kernel={kernel!r} weights={weights} options={options}"
        asked += f" kv_heads_per_stage={kv_heads_per_stage} transport={transport!r} deterministic={deterministic} cuda_graphs={cuda_graphs}"
        agree(self.transport, "ContextParallel", asked, problem)
        self.weights = weights

    @property
    def rank(self) -> int:
        """This rank, counted within the group."""
        return self.transport.rank

    @property
    def num_ranks(self) -> int:
        """How many ranks share a sequence."""
        return self.transport.size

    def sequence(self, length: int, mask: Mask | None = None) -> Sequence:
        """What this rank owns of sequences of `length` tokens under `mask` (causal if not given).

        The last 64 are kept; a call for a new one is collective.

        Raises:
            RingspanError: on every rank, where the length is below 1 or the ranks disagree.
        """
        keep_uncompiled()
        mask = causal() if mask is None else mask
        if not isinstance(mask, Mask) or type(length) is not int:
            # Nothing to look up by; it is refused on every rank.
            return self._new_sequence(length, mask)
        return self._sequences.get((length, mask), lambda: self._new_sequence(length, mask))

    def _new_sequence(self, length: int, mask: Mask) -> Sequence:
        said = [f"length={length}"]

        def check() -> None:
            checks.check_sequence(length, mask)
            said.append(f"mask={describe_mask(mask)}")

        problem = checks.problem_of(check)
        agree(self.transport, "sequence", " ".join(said), problem)
        return Sequence(self, make_layout(self.layout, length, self.num_ranks, self.weights, mask), mask)

    def decode(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
        """Attention of a few queries to keys that lie on all ranks, by one maximum and one sum (Tree Attention, 2408.04093). Collective.

        Args:
            q: `[batch, queries, heads, head_dim]`, the same on every rank; every query sees every key.
            k: `[batch, own keys, kv_heads, head_dim]`: this rank's, as many as it has, none included.
            v: like `k`.
            scale: of the scores; 1/√head_dim if not given.

        Returns:
            `out` like `q` and `lse [batch, heads, queries]`, the same on every rank. No gradient goes through it.

        Raises:
            RingspanError: where shapes or dtypes do not fit, or a gradient is asked for.
        """
        if (wrong := checks.type_problem(q, k, v, None, scale, None)) is not None:
            agree(self.transport, "decode", "arguments of another type", wrong)
        problem = checks.problem_of(lambda: checks.check_decode(q, k, v, scale))

        def choose_kernel() -> Kernel:
            about = checks.describe_attention(q, k, None, scale, None)
            agree(self.transport, "decode", f"q {tuple(q.shape)} {about}", problem)
            return select_kernel(self.kernel, checks.kernel_problem(q, k, frozenset()))

        # Agreed on once, whatever number of keys a rank has by then: what is wrong later ends this rank alone.
        key = (q.shape, k.shape[2:], v.shape[2:], q.dtype, k.dtype, v.dtype, q.device, k.device, v.device, scale)
        kernel = self._decoders.get(key, choose_kernel)
        if problem is not None:
            raise problem
        return decode(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale, kernel, self.transport)

    def sum_gradients(self, model: nn.Module | Iterable[nn.Parameter]) -> None:
        """Sums `.grad` over the ranks in float32, in place: every rank then holds the gradients of the unsplit model. Collective.

        Raises:
            RingspanError: where batches were cut by `shard_batch` and no attention of this context has run: the model's is another; for
                parameters that are sharded; and at the first call, on every rank, where the ranks have other weights.
        """
        self.use.check("sum_gradients", self.transport.size)
        parameters = list(model.parameters() if isinstance(model, nn.Module) else model)
        if any(hasattr(parameter, "device_mesh") for parameter in parameters):
            raise RingspanError(
                "sum_gradients of sharded parameters",
                "they are DTensors",
                "FSDP sums their gradients in the backward",
                "parallel.sum_gradients()",
            )
        if not self.use.has_compared:
            self.use.has_compared = True
            check_same_weights(parameters, self.transport, f"sum_gradients on {self.transport.size} ranks")
        sum_gradients(parameters, self.transport, self.observer)

    def broadcast_parameters(self, model: nn.Module) -> None:
        """Copies the parameters and buffers of rank 0 to every rank. Collective."""
        broadcast_parameters(model, self.transport)


class Sequence:
    """One rank's view of sequences of one length under one mask. Made by `ContextParallel.sequence`.

    Attributes:
        observer: who looks on while attention runs, such as `ringspan.trace.Recorder`; None, as at first, for its context's.
        choice: of strategy `auto`, at the last new shapes.
        kernel: the kernel that computes the last new shapes.
        peer_bytes: of this rank's peer memory that they take, held as long as the context; 0 where pieces go by messages.
        known_positions: a model's `position_ids` that were made for this rank, or read and found to be no mistake.
    """

    def __init__(self, context: ContextParallel, layout: Layout, mask: Mask) -> None:
        self.context, self.layout, self.mask = context, layout, mask
        self._plans: Kept[Plan] = Kept(KEPT)
        self._losses: Kept[bool] = Kept(KEPT)
        self._schedules: Schedules | None = None
        self.observer: Observer | None = None
        self.choice: Choice | None = None
        self.kernel: Kernel | None = None
        self.peer_bytes = 0
        self.known_positions = KnownTensors()
        self._name = handed.enter(self)

    def __reduce__(self) -> tuple[Any, ...]:
        # A DataLoader's worker hands batches to this process, and with each the sequence, which is the one that is here.
        return handed.find, (self._name,)

    @property
    def length(self) -> int:
        """Tokens of the whole sequence."""
        return self.layout.length

    @property
    def rank(self) -> int:
        """This rank."""
        return self.context.rank

    @property
    def num_ranks(self) -> int:
        """How many ranks share the sequence."""
        return self.context.num_ranks

    @property
    def shard_length(self) -> int:
        """Tokens that this rank owns; may be 0."""
        return self.layout.shard_length(self.rank)

    @cached_property
    def positions(self) -> Tensor:
        """Global positions of this rank's tokens, `[shard]`, int64, on the CPU, rising."""
        # Kept for whoever trains after an evaluation: autograd saves no tensor that was made in inference mode.
        with torch.inference_mode(False):
            return torch.tensor(self.layout.positions(self.rank), dtype=torch.int64)

    @cached_property
    def may_count_from_0(self) -> bool:
        """Whether 0, 1, 2 … may be the `position_ids` of this rank's tokens, by where they stand and by the mask's documents."""
        return may_count_from_0(self.mask, self.positions)

    @property
    def schedules(self) -> Schedules:
        """The schedules that the last new shape of `attention` runs; before it, those that the strategy makes without knowing heads.

        Raises:
            RingspanError: under strategy `auto` before the first attention, which tells the heads.
        """
        if self._schedules is not None:
            return self._schedules
        context = self.context
        if context.strategy == "auto":
            raise RingspanError(
                "the schedules of strategy 'auto'", "no attention has told the heads yet", "auto chooses by shapes", "seq.attention"
            )
        return make_schedules(context.strategy, self.layout, self.mask, **context.options)

    def shard(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's part of a whole tensor, along `dim`. Local and differentiable.

        Raises:
            RingspanError: where `x` is not `length` long along `dim`.
        """
        checks.check_dim(x, dim, self.length, "the whole sequence")
        return take_shard(x, self.layout, self.rank, dim)

    def unshard(self, x: Tensor, dim: int = 1) -> Tensor:
        """The whole tensor, on every rank, from every rank's part. Collective and differentiable.

        A rank's gradient is the sum of what all ranks ask of its part: a loss that every rank computes alike counts once a rank.

        Raises:
            RingspanError: where `x` is not this rank's shard long along `dim`.
        """
        problem = checks.problem_of(lambda: checks.check_dim(x, dim, self.shard_length, f"the shard of rank {self.rank}"))
        agree(self.context.transport, "unshard", checks.describe_shard(x, dim), problem)
        return Unshard.apply(x, self.layout, self.context.transport, dim)

    @overload
    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None = None,
        *,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        return_lse: Literal[False] = False,
    ) -> Tensor: ...
    @overload
    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None = None,
        *,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        return_lse: Literal[True],
    ) -> tuple[Tensor, Tensor]: ...
    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None = None,
        *,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Exact attention of this rank's queries to the whole sequence. Collective, forward and backward.

        Args:
            q: `[batch, shard, heads, head_dim]`.
            k: `[batch, shard, kv_heads, head_dim]`; `kv_heads` divides `heads` and is never expanded, here or on the wire.
            v: like `k`.
            scale: of the scores; 1/√head_dim if not given.
            softcap: scores become `softcap · tanh(scores / softcap)` (Gemma 2).
            sinks: `[heads]`, one more score a head that takes weight and gives nothing (gpt-oss); with a gradient. Each rank's gradient of
                it is its own share: `ContextParallel.sum_gradients` adds them up.
            return_lse: also return the log-sum-exp of each query's scores, the sink's included. The same on every rank; a rank whose loss
                does not use it counts as one whose gradient is zero.

        Returns:
            `out [batch, shard, heads, head_dim]` in the dtype of `q`; with `return_lse` also `lse [batch, heads, shard]`, float32 or wider.

        Raises:
            RingspanError: at the first call with new shapes, on every rank and before anything is sent, where a shape, dtype or device is
                wrong, the kernel refuses it, or the ranks disagree.
        """
        self.context.use.has_attended = True
        if (wrong := checks.type_problem(q, k, v, sinks, scale, softcap)) is not None:
            agree(self.context.transport, "attention", "arguments of another type", wrong)
        scale = whole_scale(q, scale)
        key = plan_key(q, k, v, sinks, scale, softcap, return_lse)
        plan = self._plans.get(key, lambda: self._plan(q, k, v, sinks, scale, softcap, return_lse))
        if (observer := self.observer or self.context.observer) is not None:
            plan = plan.observed(observer)
        out, lse = attend(q, k, v, sinks, plan)
        if not return_lse:
            return out
        assert lse is not None
        return out, lse

    def refuse_attention(
        self,
        problem: RingspanError,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None = None,
        *,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> NoReturn:
        """Raises `problem`, which the others may not have, where `attention` of these tensors would be called.

        Where these shapes are new every rank raises: those that go on first agree on them. Where they are not this rank raises alone, and
        one that goes on fails as when a rank dies: as soon as this process has ended, or in the group's time-out.
        """
        if plan_key(q, k, v, sinks, whole_scale(q, scale), softcap, False) not in self._plans:
            agree(self.context.transport, "attention", "nothing", problem)
        raise problem

    def _plan(
        self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scale: float | None, softcap: float | None, return_lse: bool
    ) -> Plan:
        planned = make_plan(self, q, k, v, sinks, scale, softcap, return_lse)
        self.kernel, self._schedules, self.choice = planned.plan.kernel, planned.schedules, planned.choice
        self.peer_bytes = planned.peer_bytes
        return planned.plan

    def shard_batch(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """This rank's part of a Hugging Face batch, labels already shifted across shard borders. Collective.

        What a batch holds and what comes back: see `ringspan.attention.batch.shard_batch`, which says nothing to the other ranks.

        The ranks compare a checksum of what they were given: tokens, labels, positions and padding, not `inputs_embeds`. That reads the
        batch once on the host, and gathers some hundred bytes of each rank, for which the host waits: 2 ms for 65,536 tokens between two
        processes over gloo, on a machine of 2 cores. It is called where the other collectives are, not by a thread that loads ahead.

        Args:
            batch: whole, the same on every rank.

        Raises:
            RingspanError: on every rank, where a batch is wrong on one of them or the ranks were given different ones; in a DataLoader's
                worker, which reaches no other rank.
        """
        parts: list[dict[str, Any]] = []
        problem = checks.problem_of(lambda: parts.append(shard_batch(self, batch)))
        agree_on_batch(self, batch, problem)
        return parts[0]

    def loss(self, logits: Tensor, labels: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
        """The unsplit model's mean cross-entropy, on every rank, from this rank's logits and shifted labels. Collective.

        Args:
            logits: `[batch, shard, vocabulary]`.
            labels: `[batch, shard]`, as `shard_batch` returns them: position t holds the token at t + 1.
            ignore_index: the label of positions that do not count.

        Returns:
            A scalar, the same on every rank. After `backward()` and `ContextParallel.sum_gradients(model)` every rank holds the gradients
            of the unsplit model.

        Raises:
            RingspanError: at the first call with new shapes, on every rank, where they are wrong on any rank or the ranks disagree, or
                where the batch was cut by `shard_batch` and the model's attention is none of this context's.
        """
        self._losses.get(
            (logits.shape, labels.shape, logits.dtype, logits.device, ignore_index),
            lambda: self._agree_on_loss(logits, labels, ignore_index),
        )
        return mean_cross_entropy(logits, labels, self.context.transport, ignore_index, self.observer or self.context.observer)

    def _agree_on_loss(self, logits: Tensor, labels: Tensor, ignore_index: int) -> bool:
        """All ranks go on, or all raise: a rank that raised alone would leave the others waiting for its share."""

        def check() -> None:
            self.context.use.check("the loss of a model's logits", self.num_ranks)
            checks.check_loss(logits, labels, self.shard_length, self.rank)

        problem = checks.problem_of(check)
        asked = f"batch={logits.shape[0] if logits.ndim else None} vocabulary={logits.shape[-1] if logits.ndim else None} {logits.dtype}"
        agree(self.context.transport, "loss", f"{asked} ignore_index={ignore_index}", problem)
        return True


stays_uncompiled(ContextParallel, "sequence", "decode", "sum_gradients", "broadcast_parameters")
stays_uncompiled(Sequence, "attention", "unshard", "shard_batch", "loss")
