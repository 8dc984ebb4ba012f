"""One rank's view of sequences of one length under one mask: its shard, and all that is computed of it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NoReturn, overload

import torch
from torch import Tensor

from ringspan.attention import checks, handed
from ringspan.attention.autograd import attend
from ringspan.attention.batch import agree_on_batch, shard_batch
from ringspan.attention.fingerprint import describe_mask
from ringspan.attention.graphs import stays_uncompiled
from ringspan.attention.kept import Kept
from ringspan.attention.loss import IGNORE_INDEX, mean_cross_entropy
from ringspan.attention.observe import Observer
from ringspan.attention.plan import Plan
from ringspan.attention.planning import make_plan, plan_key, wants_gradients, whole_scale
from ringspan.attention.positions import KnownTensors, may_count_from_0
from ringspan.attention.sharding import Unshard, take_shard
from ringspan.errors import RingspanError
from ringspan.geometry import Layout, Mask
from ringspan.kernels import Kernel, is_captured
from ringspan.strategies import Choice, Schedules, make_schedules
from ringspan.transport import agree, agree_again

if TYPE_CHECKING:
    from ringspan.attention.context_parallel import ContextParallel

KEPT = 64
"""Sequences that a `ContextParallel` keeps, and shapes that a `Sequence` keeps plans for: the last ones asked for."""


class Sequence:
    """One rank's view of sequences of one length under one mask. Made by `ContextParallel.sequence`.

    Attributes:
        observer: who looks on while attention runs, such as `ringspan.trace.Recorder`; None, as at first, for its context's.
        choice: of strategy `auto`, at the last new shapes.
        kernel: the kernel that computes the last new shapes.
        peer_bytes: of this rank's peer memory that they have taken, held as long as the context; 0 where pieces go by messages, and no more
            than a forward's as long as no gradient was wanted.
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
            return torch.tensor(self.layout.positions(self.rank), dtype=torch.int64, device="cpu")

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
                wrong, the kernel refuses it, or the ranks disagree; and where such a call is captured in a CUDA graph.
        """
        self.context.use.has_attended = True
        if (wrong := checks.type_problem(q, k, v, sinks, scale, softcap, return_lse)) is not None:
            agree(self.context.transport, "attention", "arguments of another type", wrong)
        scale = whole_scale(q, scale)
        key = plan_key(q, k, v, sinks, scale, softcap, return_lse)
        if not is_captured(q.device):
            transport = self.context.transport
            agree_again(transport, "attention", lambda: self._described(key, q, k, v, sinks, scale, softcap, return_lse))
        plan = self._plans.get(key, lambda: self._plan(q, k, v, sinks, scale, softcap, return_lse))
        if (observer := self.observer or self.context.observer) is not None:
            plan = plan.observed(observer)
        out, lse = attend(q, k, v, sinks, plan)
        if not return_lse:
            return out
        assert lse is not None
        return out, lse

    def _described(
        self, key: Hashable, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scale: float | None, softcap: float | None,
        return_lse: bool,
    ) -> str:  # fmt: skip
        """What all ranks have in common at a call, whose plan is found by `key`."""
        about = checks.describe_attention(q, k, sinks, scale, softcap, return_lse, wants_gradients(q, k, v, sinks))
        of_sequence = f"length={self.length} mask={describe_mask(self.mask)} strategy={self.context.strategy!r}"
        return f"{of_sequence} {about} new={key not in self._plans}"

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

        Where these shapes are new, or every call is compared (`agree_again`), every rank raises: those that go on first agree on them. Else
        this rank raises alone, and one that goes on fails as when a rank dies: when this process has ended, or in the group's time-out.
        """
        if plan_key(q, k, v, sinks, whole_scale(q, scale), softcap, False) not in self._plans:
            agree(self.context.transport, "attention", "nothing", problem)
        agree_again(self.context.transport, "attention", lambda: "nothing", problem)
        raise problem

    def _plan(
        self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scale: float | None, softcap: float | None, return_lse: bool
    ) -> Plan:
        planned = make_plan(self, q, k, v, sinks, scale, softcap, return_lse)
        self.kernel, self._schedules, self.choice = planned.plan.kernel, planned.schedules, planned.choice
        self.peer_bytes = max(self.peer_bytes, planned.peer_bytes)
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
            ignore_index: the label of positions that do not count, besides −100, which `shard_batch` gives to those that have none.

        Returns:
            A scalar, the same on every rank. After `backward()` and `ContextParallel.sum_gradients(model)` every rank holds the gradients
            of the unsplit model.

        Raises:
            RingspanError: at the first call with new shapes, on every rank, where they are wrong on any rank or the ranks disagree, or
                where the batch was cut by `shard_batch` and the model's attention is none of this context's.
        """
        if (wrong := checks.loss_type_problem(logits, labels, ignore_index)) is not None:
            agree(self.context.transport, "loss", "arguments of another type", wrong)
        key = (logits.shape, labels.shape, logits.dtype, labels.dtype, logits.device, labels.device, ignore_index)
        about = checks.describe_loss(logits, ignore_index)
        agree_again(self.context.transport, "loss", lambda: f"{about} new={key not in self._losses}")
        self._losses.get(key, lambda: self._agree_on_loss(logits, labels, about))
        return mean_cross_entropy(logits, labels, self.context.transport, ignore_index, self.observer or self.context.observer)

    def _agree_on_loss(self, logits: Tensor, labels: Tensor, about: str) -> bool:
        """All ranks go on, or all raise: a rank that raised alone would leave the others waiting for its share."""

        def check() -> None:
            self.context.use.check("the loss of a model's logits", self.num_ranks)
            checks.check_loss(logits, labels, self.shard_length, self.rank)

        agree(self.context.transport, "loss", about, checks.problem_of(check))
        return True


stays_uncompiled(Sequence, "attention", "unshard", "shard_batch", "loss")
