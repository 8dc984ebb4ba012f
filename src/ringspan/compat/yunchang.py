"""yunchang's `LongContextAttention` (USP): heads over one axis of ranks, a ring over the other."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from ringspan.attention.call_checks import check_options, check_tensors, read_softcap, read_window
from ringspan.attention.calls import Group, Request, find_sequence, promising, transport_of
from ringspan.attention.functional import Window, mask_of
from ringspan.attention.sharding import take_shard
from ringspan.compat.call import BATCHED, refuse_window
from ringspan.errors import RingspanError, UnsupportedError
from ringspan.geometry import Grid, Layout, Span, make_layout
from ringspan.transport import SingleRank

_LAYOUTS = {"basic": "contiguous", "zigzag": "zigzag", "strip": "striped"}
_KERNELS = {None: "auto", "fa": "auto", "torch_flash": "auto", "torch_math": "reference", "torch_cudnn": "cudnn"}


@dataclass(frozen=True)
class SequenceParallel:
    """Which ranks share a sequence, and how: `ulysses` ranks share heads, `ring` such groups share positions."""

    group: Group
    ulysses: int
    ring: int
    placement: str

    @property
    def grid(self) -> Grid:
        """Who is where."""
        return Grid(self.ulysses * self.ring, self.ulysses, self.placement)


_CHOSEN: ContextVar[SequenceParallel] = ContextVar("sequence_parallel")


def set_seq_parallel_pg(
    sp_ulysses_degree: int, sp_ring_degree: int, rank: int, world_size: int, use_ulysses_low: bool = True, *, group: Group = None
) -> None:
    """yunchang's function of this name: what every `LongContextAttention` that this thread makes from now on is split over. Collective.

    Args:
        sp_ulysses_degree: how many ranks share heads.
        sp_ring_degree: how many such groups share positions.
        rank: this rank of the default process group.
        world_size: its ranks; so many times as the product of both degrees divides them, neighbouring ranks share a sequence.
        use_ulysses_low: whether it is neighbours that share heads.
        group: the ranks of one sequence, where they are not to be taken from the default process group.

    Raises:
        RingspanError: where the degrees do not divide the ranks.
    """
    size = sp_ulysses_degree * sp_ring_degree
    if size < 1 or world_size % size or not 0 <= rank < world_size:
        raise RingspanError(
            f"set_seq_parallel_pg of {sp_ulysses_degree} × {sp_ring_degree} for rank {rank} of {world_size}",
            "",
            "The ranks of a sequence, ulysses × ring, divide all ranks",
            f"set_seq_parallel_pg({world_size}, 1, {max(0, min(rank, world_size - 1))}, {world_size})",
        )
    if group is None and size == 1:
        group = SingleRank()
    elif group is None and size < world_size:
        starts = range(0, world_size, size)
        # Every rank takes part in making every group, in one order.
        groups: list[Any] = [dist.new_group(list(range(start, start + size))) for start in starts]
        group = groups[rank // size]
    transport = transport_of(group)
    expected = rank if size == world_size else rank % size
    if (transport.rank, transport.size) != (expected, size):
        raise RingspanError(
            f"set_seq_parallel_pg for rank {expected} of {size} that share a sequence",
            f"the group has this process as rank {transport.rank} of {transport.size}",
            "Ranks are those of the process group",
            "dist.get_rank() and dist.get_world_size()",
        )
    _CHOSEN.set(SequenceParallel(group, sp_ulysses_degree, sp_ring_degree, "head_first" if use_ulysses_low else "context_first"))


def hybrid_layout(layout: str, length: int, grid: Grid) -> Layout:
    """A ring's layout, each shard of which is cut into consecutive parts for the ranks of its head group.

    Eight tokens on two head groups of two ranks, zigzag: the ring's `0 0 1 1 1 1 0 0` becomes `0 0 2 2 3 3 1 1`.
    """
    ring = make_layout(layout, length, grid.num_groups)
    shards = []
    for rank in range(grid.num_ranks):
        whole = ring.shards[grid.group(rank)]
        own = ring.shard_length(grid.group(rank)) // grid.degree
        shards.append(_rows(whole, grid.place(rank) * own, (grid.place(rank) + 1) * own))
    return Layout(f"{layout} by head group", length, tuple(shards))


def _rows(spans: tuple[Span, ...], start: int, stop: int) -> tuple[Span, ...]:
    parts, offset = [], 0
    for span in spans:
        parts.append(span[max(0, start - offset) : max(0, stop - offset)])
        offset += len(span)
    return tuple(part for part in parts if len(part))


class LongContextAttention(nn.Module):
    """yunchang's class of this name, split as `set_seq_parallel_pg` said.

    Args:
        scatter_idx: 2: the dimension of heads.
        gather_idx: 1: the dimension of positions.
        ring_impl_type: `basic`, `zigzag` or `strip`: the layout of the ring, within which head groups cut consecutive parts.
        use_pack_qkv: changes nothing: q, k and v travel together.
        use_sync: changes nothing: nothing waits longer than it must.
        attn_type: `fa` or `torch_flash` for the fastest kernel of torch, `torch_math`, `torch_cudnn`; or yunchang's `AttnType`.
        attn_processor: refused.

    Raises:
        RingspanError: before `set_seq_parallel_pg`, and for what is not computed here.
    """

    def __init__(
        self,
        scatter_idx: int = 2,
        gather_idx: int = 1,
        ring_impl_type: str = "basic",
        use_pack_qkv: bool = False,
        use_sync: bool = False,
        attn_type: Any = None,
        attn_processor: Any = None,
    ) -> None:
        super().__init__()
        name = "LongContextAttention"
        if (scatter_idx, gather_idx) != (2, 1):
            asked = f"{name} with scatter_idx={scatter_idx}, gather_idx={gather_idx}"
            raise RingspanError(
                asked, "", f"Tensors are {BATCHED}: heads are dimension 2, positions dimension 1", "scatter_idx=2, gather_idx=1"
            )
        if ring_impl_type not in _LAYOUTS:
            raise UnsupportedError(f"{name} with ring_impl_type={ring_impl_type!r}", f"there are {', '.join(_LAYOUTS)}", "", "'zigzag'")
        kernel = getattr(attn_type, "value", attn_type)
        if kernel not in _KERNELS:
            there = ", ".join(repr(known) for known in _KERNELS if known)
            raise UnsupportedError(
                f"{name} with attn_type={kernel!r}", f"there are {there}", "A kernel is never replaced", "attn_type='fa'"
            )
        if attn_processor is not None:
            raise UnsupportedError(f"{name} with an attn_processor", "", "Attention is exact here", "attn_processor=None")
        if (chosen := _CHOSEN.get(None)) is None:
            raise RingspanError(
                name, "nothing says which ranks share a sequence", "", "set_seq_parallel_pg(…) before it, in the same thread"
            )
        self.parallel = chosen
        self.layout, self.kernel = _LAYOUTS[ring_impl_type], _KERNELS[kernel]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: Window = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
        *args: Any,
    ) -> Tensor:
        """Attention of this rank's shards. See `ringspan.attention` for the arguments.

        Args:
            query: `[batch, shard, heads, head_dim]`, any number of heads.
            key: `[batch, shard, kv_heads, head_dim]`.
            value: like `key`.
            dropout_p: refused above 0.
            softmax_scale: of the scores.
            causal: a query sees no key after it.
            window_size: refused on a ring of several ranks, whose namesake applied it to each block.
            softcap: bounds the scores.
            alibi_slopes: refused.
            deterministic: the same bits at every run.
            return_attn_probs: changes nothing, as ever: the output alone is returned.
            args: refused.

        Returns:
            Like `query`.
        """
        name = "LongContextAttention"

        def prepare() -> Request:
            check_tensors(name, query, key, value, BATCHED)
            check_options(name, dropout_p, alibi_slopes)
            if args:
                raise RingspanError(
                    name, f"it was given {len(args)} further arguments", "Nothing that is asked for is ignored", "without them"
                )
            if self.parallel.ring > 1:
                refuse_window(name, window_size, f"ringspan.attention(q, k, v, window_size={window_size}, strategy='two_dimensional', …)")
            return promising(self._request(query.shape[1], read_window(name, causal, window_size)), deterministic)

        sequence = find_sequence(self.parallel.group, name, prepare)
        return sequence.attention(query, key, value, softmax_scale, softcap=read_softcap(softcap))

    def shard(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's part of a whole tensor along `dim`, as yunchang's `EXTRACT_FUNC_DICT[ring_impl_type]` cuts it.

        Raises:
            RingspanError: where the length does not divide.
        """
        grid = self.parallel.grid
        self._check_even(x.shape[dim] // grid.num_ranks, x.shape[dim])
        return take_shard(x, hybrid_layout(self.layout, x.shape[dim], grid), transport_of(self.parallel.group).rank, dim)

    def _request(self, rows: int, band: Window) -> Request:
        layout, grid = self.layout, self.parallel.grid
        self._check_even(rows, rows * grid.num_ranks)
        # A head group of one rank has nothing to exchange.
        strategy, options = (
            ("ring", ()) if grid.degree == 1 else ("two_dimensional", (("placement", grid.placement), ("ulysses", grid.degree)))
        )
        return Request(
            function=f"LongContextAttention {layout}",
            strategy=strategy,
            layout="contiguous",
            kernel=self.kernel,
            length=None,
            shard_length=rows,
            mask=(("window", band),),
            options=options,
            make=lambda num_ranks, length: (hybrid_layout(layout, length, grid), mask_of(band, None)),
        )

    def _check_even(self, rows: int, length: int) -> None:
        grid = self.parallel.grid
        parts = 2 * grid.num_groups if self.layout == "zigzag" else 1
        if length % parts or length != rows * grid.num_ranks:
            raise RingspanError(
                f"LongContextAttention of {length} tokens, {grid.degree} × {grid.num_groups} ranks",
                "they do not divide",
                f"Shards are of one length{', and zigzag has two parts for each rank of the ring' if parts > 1 else ''}",
                "ringspan.attention(…, strategy='two_dimensional', length=…), for any length",
            )
