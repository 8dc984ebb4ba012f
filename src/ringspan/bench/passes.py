"""What is timed: the forward alone, and the forward with its backward, of whoever solves the problem."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from ringspan.attention import ContextParallel, Sequence
from ringspan.attention.rank_speeds import weights_of
from ringspan.bench.case import Setting, Shape, parse_strategy
from ringspan.bench.overlap import Awaited
from ringspan.bench.record import Record
from ringspan.errors import RingspanError
from ringspan.transport import Transport
from ringspan.verify import Inputs

GRADIENTS = ("dq", "dk", "dv")
Results = tuple[Tensor, ...]


@dataclass(frozen=True)
class Passes:
    """Two calls, and where their results belong.

    Attributes:
        forward: gives `(out,)`, without a graph of autograd.
        both: gives `(out, dq, dk, dv)`.
        mine: of a whole tensor `[batch, length, …]` the rows that the results have, in their order.
    """

    forward: Callable[[], Results]
    both: Callable[[], Results]
    mine: Callable[[Tensor], Tensor]


def passes_of(attend: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: Inputs, mine: Callable[[Tensor], Tensor]) -> Passes:
    """The passes of `attend(q, k, v)`, `[batch, rows, heads, head_dim]` each, on this rank's rows of `inputs`."""
    q, k, v, dout = (mine(tensor).contiguous() for tensor in (inputs.q, inputs.k, inputs.v, inputs.dout))
    leaves = tuple(tensor.detach().requires_grad_() for tensor in (q, k, v))

    def forward() -> Results:
        with torch.no_grad():
            return (attend(q, k, v),)

    def both() -> Results:
        out = attend(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, dout)

    return Passes(forward, both, mine)


def weights_for(setting: Setting, alone: Iterable[Record]) -> tuple[float, ...] | None:
    """For layout `weighted` each rank's speed as the records of one device tell it, the same on every rank; None for other layouts.

    Raises:
        RingspanError: where there is none that was launched in the same way.
    """
    if setting.layout != "weighted":
        return None
    fastest = min((each for each in alone if each.launch == setting.launch), key=lambda record: record.median_ms("both"), default=None)
    if fastest is None:
        raise RingspanError(
            "layout 'weighted'", "no kernel was timed on one device", "A rank's weight is the speed that it shows alone",
            "layout='zigzag', or --one-device with a kernel that can",
        )  # fmt: skip
    return weights_of([1 / each for each in fastest.timings["both"].rank_medians_ms])


def open_sequence(setting: Setting, shape: Shape, weights: tuple[float, ...] | None = None) -> Sequence:
    """Ringspan's view of `shape` as `setting` asks, its layout `weighted` by `weights`. Collective.

    Raises:
        RingspanError: on every rank, for what it does not do.
    """
    strategy, options = parse_strategy(setting.strategy)
    more: dict = dict(options)
    if setting.transport != "auto":
        more["transport"] = setting.transport
    if setting.launch == "replay":
        more["cuda_graphs"] = True
    context = ContextParallel(None, strategy=strategy, layout=setting.layout, kernel=setting.kernel, weights=weights, **more)
    if not setting.overlap:
        context.transport = cast(Transport, Awaited(context.transport))
    return context.sequence(shape.length, shape.made_mask)


def whole_inputs(shape: Shape, device: torch.device, seed: int = 0) -> Inputs:
    """Standard normal q, k, v and dO of the whole sequence, the same on every rank whose device is of the same kind."""
    generator = torch.Generator(device).manual_seed(seed * 1_000_003 + shape.length)

    def normal(heads: int) -> Tensor:
        size = (shape.batch, shape.length, heads, shape.head_dim)
        return torch.randn(size, generator=generator, dtype=shape.torch_dtype, device=device)

    return Inputs(normal(shape.heads), normal(shape.kv_heads), normal(shape.kv_heads), normal(shape.heads))
