"""The public face: `ContextParallel`, a group of ranks that share sequences, and how they share them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ringspan.attention import checks
from ringspan.attention.decode import decode
from ringspan.attention.fingerprint import describe_mask
from ringspan.attention.gradients import broadcast_parameters, check_same_weights, check_whole, sum_gradients
from ringspan.attention.graphs import keep_uncompiled, stays_uncompiled
from ringspan.attention.kept import Kept
from ringspan.attention.observe import Observer
from ringspan.attention.replay import Replays
from ringspan.attention.sequence import KEPT, Sequence
from ringspan.attention.use import Use
from ringspan.geometry import Mask, causal, full, make_layout
from ringspan.kernels import Kernel, is_captured, select_kernel
from ringspan.transport import InProcessTransport, agree, agree_again, make_transport


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
        agree_again(self.transport, "sequence", lambda: f"length={length} mask={describe_mask(mask)}")
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
            RingspanError: where shapes or dtypes do not fit, or a gradient is asked for; on every rank at the first call with such queries
                and heads, and after that on this rank alone. And where a call with new shapes is captured in a CUDA graph.
        """
        if (wrong := checks.type_problem(q, k, v, None, scale, None)) is not None:
            agree(self.transport, "decode", "arguments of another type", wrong)
        problem = checks.problem_of(lambda: checks.check_decode(q, k, v, scale))

        def about() -> str:
            return f"q {tuple(q.shape)} {checks.describe_attention(q, k, None, scale, None)}"

        def choose_kernel() -> Kernel:
            checks.check_not_captured("decode", about(), q.device, self.num_ranks)
            agree(self.transport, "decode", about(), problem)
            return select_kernel(self.kernel, checks.kernel_problem(q, k, checks.features(full(), None, scale)))

        # Agreed on once, whatever number of keys a rank has by then: what is wrong later ends this rank alone.
        key = (q.shape, k.shape[2:], v.shape[2:], q.dtype, k.dtype, v.dtype, q.device, k.device, v.device, scale)
        if not is_captured(q.device):
            # Of a call that is wrong here alone the others are told too.
            agree_again(self.transport, "decode", lambda: f"{about()} new={key not in self._decoders} {problem or ''}")
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
        check_whole(parameters)
        shapes = [tuple(parameter.shape) for parameter in parameters]
        agree_again(self.transport, "sum_gradients", lambda: f"{len(shapes)} parameters, {Counter(shapes)}")
        if not self.use.has_compared:
            self.use.has_compared = True
            check_same_weights(parameters, self.transport, f"sum_gradients on {self.transport.size} ranks")
        sum_gradients(parameters, self.transport, self.observer)

    def broadcast_parameters(self, model: nn.Module) -> None:
        """Copies the parameters and buffers of rank 0 to every rank. Collective.

        Raises:
            RingspanError: on every rank, where it is no model, or its parameters and buffers are of other names, shapes or dtypes on one.
        """
        broadcast_parameters(model, self.transport)


stays_uncompiled(ContextParallel, "sequence", "decode", "sum_gradients", "broadcast_parameters")
