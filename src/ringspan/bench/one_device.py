"""The baseline: one kernel on one device over the whole sequence, launched as its own library would launch it.

A mask of one tile (causal, full, a window) is one call of the kernel. Documents are one varlen call where the kernel has one, else one
call a document. What is made of tiles that share rows, such as a prefix, goes through ringspan's executor on one rank, since no kernel
here computes it in one call.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from ringspan.attention import ContextParallel
from ringspan.bench.case import Shape
from ringspan.bench.passes import Passes, passes_of
from ringspan.geometry import Tile, make_layout, tiles
from ringspan.kernels import KERNELS, Kernel, Scores, lowered, refusal
from ringspan.transport import SingleRank
from ringspan.verify import Inputs

aten = torch.ops.aten
TOO_SLOW = ("flex", "reference")
"""Kernels that are no baseline where another can be, unless they are asked for: one is compiled for each mask, one keeps all scores."""


class Whole(Protocol):
    """Attention of a whole sequence on one device, and its backward."""

    @property
    def launches(self) -> str:
        """How the kernel is called, for the report."""
        ...

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """out `[batch, length, heads, head_dim]`, and lse as the backward takes it."""
        ...

    def backward(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv."""
        ...


@dataclass(frozen=True)
class OneCall:
    """A mask that is one tile."""

    kernel: Kernel
    scores: Scores
    launches: str = "one call"

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """See `Whole`."""
        return self.kernel.forward(q, k, v, self.scores)

    def backward(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `Whole`."""
        return self.kernel.backward(dout, q, k, v, out, lse, None, self.scores)


@dataclass(frozen=True)
class CallEach:
    """Tiles that share neither rows nor columns, one call each."""

    kernel: Kernel
    scores: tuple[Scores, ...]

    @property
    def launches(self) -> str:
        """How many calls."""
        return f"{len(self.scores)} calls"

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """See `Whole`. Rows of no tile have out 0."""
        out = torch.zeros_like(q)
        lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), float("-inf"), dtype=torch.promote_types(q.dtype, torch.float32))
        for each in self.scores:
            rows, keys = _slices(each.tile)
            part, part_lse = self.kernel.forward(q[:, rows], k[:, keys], v[:, keys], each)
            out[:, rows], lse[:, :, rows] = part, part_lse
        return out, lse

    def backward(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `Whole`."""
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for each in self.scores:
            rows, keys = _slices(each.tile)
            dq[:, rows], dk[:, keys], dv[:, keys] = self.kernel.backward(
                dout[:, rows], q[:, rows], k[:, keys], v[:, keys], out[:, rows], lse[:, :, rows], None, each
            )
        return dq, dk, dv


@dataclass(frozen=True)
class Varlen:
    """Documents under one band each, in one varlen call of FlashAttention-2 or -4; a batch of one.

    Args:
        kernel: `flash2` or `flash4`.
        borders: `[documents + 1]`, int32, on the device.
        longest: tokens of the longest document.
        causal: whether a query sees no later key.
        left: the window to the left, or None.
        scale: of the scores.
    """

    kernel: str
    borders: Tensor
    longest: int
    causal: bool
    left: int | None
    scale: float
    launches: str = "one varlen call"

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """See `Whole`; lse is `[heads, length]`."""
        if self.kernel == "flash4":
            out, lse, *_ = importlib.import_module("flash_attn.cute.interface")._flash_attn_fwd(
                q[0], k[0], v[0], cu_seqlens_q=self.borders, cu_seqlens_k=self.borders, max_seqlen_q=self.longest,
                max_seqlen_k=self.longest, softmax_scale=self.scale, return_lse=True, **self._window(),
            )  # fmt: skip
        else:
            out, lse, *_ = aten._flash_attention_forward(
                q[0], k[0], v[0], self.borders, self.borders, self.longest, self.longest, 0.0, self.causal, False,
                scale=self.scale, window_size_left=self.left, window_size_right=None if self.left is None else 0,
            )  # fmt: skip
        return out.unsqueeze(0), lse

    def backward(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `Whole`."""
        if self.kernel == "flash4":
            grads = importlib.import_module("flash_attn.cute.interface")._flash_attn_bwd(
                q[0], k[0], v[0], out[0], dout[0], lse, cu_seqlens_q=self.borders, cu_seqlens_k=self.borders,
                max_seqlen_q=self.longest, max_seqlen_k=self.longest, softmax_scale=self.scale, **self._window(),
            )[:3]  # fmt: skip
        else:
            seed = torch.zeros(2, dtype=torch.uint64, device=q.device)
            grads = aten._flash_attention_backward(
                dout[0], q[0], k[0], v[0], out[0], lse, self.borders, self.borders, self.longest, self.longest, 0.0, self.causal,
                seed, seed[:0], scale=self.scale, window_size_left=self.left, window_size_right=None if self.left is None else 0,
            )  # fmt: skip
        dq, dk, dv = (gradient.unsqueeze(0) for gradient in grads)
        return dq, dk, dv

    def _window(self) -> dict:
        if self.left is None:
            return {"causal": self.causal}
        return {"causal": False, "window_size_left": self.left, "window_size_right": 0}


def _slices(tile: Tile) -> tuple[slice, slice]:
    return slice(tile.q_start, tile.q_stop), slice(tile.k_start, tile.k_stop)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, whole: Whole) -> Tensor:
        out, lse = whole.forward(q, k, v)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.whole = whole
        return out

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        q, k, v, out, lse = ctx.saved_tensors
        return *ctx.whole.backward(gradients[0], q, k, v, out, lse), None


def capable_kernels(shape: Shape, device: torch.device, asked: tuple[str, ...] = ()) -> dict[str, str]:
    """For each kernel an empty text where it is a baseline for `shape` here, else why it is not. `asked` are those named by settings."""
    problem = shape.problem(device)
    reasons = {name: refusal(kernel, problem) or "" for name, kernel in KERNELS.items()}
    for name in TOO_SLOW:
        if not reasons.get(name) and name not in asked and any(not reasons[other] for other in reasons if other not in TOO_SLOW):
            reasons[name] = "it is too slow to compare with, unless it is asked for"
    return reasons


def one_device(kernel: str, shape: Shape, inputs: Inputs) -> tuple[Passes, str]:
    """The passes of `kernel` over the whole of `inputs` on this device, and how it is launched."""
    whole = make_whole(kernel, shape, inputs.q.device)
    if whole is not None:
        return passes_of(lambda q, k, v: _Attend.apply(q, k, v, whole), inputs, lambda tensor: tensor), whole.launches
    sequence = ContextParallel(SingleRank(), layout="contiguous", kernel=kernel).sequence(shape.length, shape.made_mask)
    return passes_of(lambda q, k, v: sequence.attention(q, k, v), inputs, lambda tensor: tensor), "ringspan's executor on one rank"


def make_whole(kernel: str, shape: Shape, device: torch.device) -> Whole | None:
    """How `kernel` computes all of `shape` on its own, or None where it cannot in calls that share no rows."""
    found = tiles(make_layout("contiguous", shape.length, 1), shape.made_mask, 0, 0)
    scale = shape.head_dim**-0.5
    if kernel in ("flash2", "flash4") and shape.batch == 1 and len(found) > 1:
        varlen = _varlen(kernel, found, shape.length, scale, device)
        if varlen is not None:
            return varlen
    calls = [Scores(part, scale) for tile in found for part in lowered(tile, KERNELS[kernel].shapes)]
    rows = sorted((each.tile.q_start, each.tile.q_stop) for each in calls)
    columns = sorted((each.tile.k_start, each.tile.k_stop) for each in calls)
    if any(first[1] > second[0] for spans in (rows, columns) for first, second in pairwise(spans)):
        return None
    first = calls[0].tile if calls else None
    if len(calls) == 1 and first is not None and (first.num_queries, first.num_keys) == (shape.length, shape.length):
        return OneCall(KERNELS[kernel], calls[0])
    return CallEach(KERNELS[kernel], tuple(calls))


def _varlen(kernel: str, found: tuple[Tile, ...], length: int, scale: float, device: torch.device) -> Varlen | None:
    """One call where the tiles are squares along the diagonal, all under one kind of band; None where they are not."""
    ordered = sorted(found, key=lambda tile: tile.q_start)
    borders = [0]
    for tile in ordered:
        if (tile.q_start, tile.k_start, tile.num_queries) != (borders[-1], borders[-1], tile.num_keys):
            return None
        borders.append(tile.q_stop)
    # A document shorter than the window keeps no bound on the left: all bounds that are left are one and the same.
    lefts = {tile.high for tile in ordered if tile.high is not None}
    # A document of one token is full under any mask.
    lows = {tile.low for tile in ordered if tile.num_queries > 1}
    if borders[-1] != length or len(lefts) > 1 or len(lows) > 1 or not lows <= {0, None}:
        return None
    causal = lows == {0}
    if lefts and not causal:
        return None
    longest = max(tile.num_queries for tile in ordered)
    return Varlen(kernel, torch.tensor(borders, dtype=torch.int32, device=device), longest, causal, next(iter(lefts), None), scale)
