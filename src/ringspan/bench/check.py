"""Correctness before speed: every result beside float64 dense attention where that is affordable, else beside one device's kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ringspan.bench.case import Shape
from ringspan.bench.passes import GRADIENTS, Results
from ringspan.bench.together import Together
from ringspan.verify import FIXED, Budget, Error, Inputs, budgets, dense_attention

TENSORS = ("out", *GRADIENTS)
MOST_DENSE_TOKENS = 8192
"""Up to this length in all the yardstick is float64 dense attention."""

LAW_5 = 1.25
"""Of ringspan: so many times the error that the same kernel makes on one device (law 5, partials rounded to half precision)."""

PEER = 2.0
"""Of a peer, which may round more often; what is wrong errs a hundred times as much."""

BETWEEN_KERNELS = 4
"""Roundings by which two kernels in half precision may differ where there is no float64 yardstick."""

_ROWS = 2048
_PROBE_ROWS = 16


@dataclass(frozen=True)
class Yardstick:
    """What results are compared with.

    Attributes:
        kind: `float64`, or the name of the kernel that computed it on one device.
        whole: by tensor, of the whole sequence.
    """

    kind: str
    whole: Mapping[str, Tensor]

    @property
    def is_exact(self) -> bool:
        """Whether it is float64 dense attention."""
        return self.kind == "float64"


def dense_yardstick(shape: Shape, inputs: Inputs) -> Yardstick | None:
    """Float64 dense attention of `inputs`, or None where the sequence is too long for it."""
    if shape.length > MOST_DENSE_TOKENS:
        return None
    exact = dense_attention(inputs, shape.made_mask)
    return Yardstick("float64", {name: getattr(exact, name) for name in TENSORS})


def errors(results: Results, yardstick: Yardstick, mine: Callable[[Tensor], Tensor], transport: Together | None) -> dict[str, Error]:
    """The error of each result over all ranks: ‖found − exact‖ / ‖exact‖, the norms over the whole tensor. Collective.

    Args:
        results: out, or out, dq, dk, dv; this rank's rows.
        yardstick: of the whole sequence.
        mine: takes this rank's rows.
        transport: of the ranks that share the sequence; None where one device has all of it.
    """
    found = {}
    for name, result in zip(TENSORS, results, strict=False):
        wanted = mine(yardstick.whole[name])
        if wanted.shape != result.shape:
            parts = [(float("inf"), 1.0, float("inf"), wanted.numel())]
        else:
            parts = [_distance(result, wanted)]
        if transport is not None:
            parts = transport.gather_objects(parts[0])
        squares, sizes, largest, counts = zip(*parts, strict=True)
        relative = (sum(squares) / max(sum(sizes), 1e-300)) ** 0.5
        found[name] = Error(relative, max(largest), sum(counts))
    return found


def _distance(result: Tensor, wanted: Tensor) -> tuple[float, float, float, int]:
    """(‖difference‖², ‖wanted‖², largest difference, elements), some rows at a time so that float64 copies stay small."""
    square = size = largest = 0.0
    for start in range(0, result.shape[1], _ROWS):
        rows = slice(start, start + _ROWS)
        exact = wanted[:, rows].double()
        difference = result[:, rows].double() - exact
        square += float(difference.square().sum())
        size += float(exact.square().sum())
        largest = max(largest, float(difference.abs().max())) if difference.numel() else largest
    return square, size, largest if square == square else float("nan"), result.numel()


def limits(shape: Shape, yardstick: Yardstick, single: Mapping[str, Error], allowance: float) -> dict[str, Budget]:
    """How large each error may be, and why.

    Args:
        single: the errors of the same kernel on one device against the same yardstick; of any kernel where that is not known.
        allowance: `LAW_5` or `PEER`.
    """
    if yardstick.is_exact:
        return budgets(shape.dtype, shape.torch_dtype, lambda: single, TENSORS, allowance)
    if shape.dtype in FIXED:
        limit, reason = FIXED[shape.dtype]
        return {name: Budget(2 * limit, f"twice: both the result and {yardstick.kind} on one device err. {reason}") for name in TENSORS}
    limit = BETWEEN_KERNELS * torch.finfo(shape.torch_dtype).eps / 2
    reason = f"{BETWEEN_KERNELS} roundings to {shape.dtype} between the result and {yardstick.kind} on one device"
    return dict.fromkeys(TENSORS, Budget(limit, reason))


def wrong(found: Mapping[str, Error], allowed: Mapping[str, Budget]) -> str:
    """What is over its budget, as a sentence; empty where nothing is. NaN is over every budget."""
    over = [name for name, error in found.items() if not error.relative <= allowed[name].limit]
    if not over:
        return ""
    said = ", ".join(f"{name} by {found[name].relative:.1e} of at most {allowed[name].limit:.1e}" for name in over)
    return f"errs in {said} ({allowed[over[0]].reason})"


def probe(shape: Shape, inputs: Inputs, out: Tensor) -> float:
    """The relative error of a few rows of a whole `out` against float64, at the end, in the middle and at the start.

    It costs little at any length, and keeps a kernel that is wrong from being the yardstick of others.
    """
    starts = sorted({0, max(0, shape.length // 2 - _PROBE_ROWS), max(0, shape.length - _PROBE_ROWS)})
    square = size = 0.0
    group = shape.heads // shape.kv_heads
    for start in starts:
        stop = min(shape.length, start + _PROBE_ROWS)
        allowed = torch.zeros(stop - start, shape.length, dtype=torch.bool, device=out.device)
        keys = torch.arange(shape.length, device=out.device)
        for region in shape.made_mask.regions(start, stop, 0, shape.length):
            rows, columns = slice(region.q_start - start, region.q_stop - start), slice(region.k_start, region.k_stop)
            distance = torch.arange(region.q_start, region.q_stop, device=out.device).unsqueeze(1) - keys[columns]
            inside = torch.ones_like(distance, dtype=torch.bool)
            inside = inside if region.low is None else inside & (distance >= region.low)
            allowed[rows, columns] |= inside if region.high is None else inside & (distance <= region.high)
        for head in range(shape.heads):
            q, k, v = (tensor[0, :, index].double() for tensor, index in (
                (inputs.q[:, start:stop], head), (inputs.k, head // group), (inputs.v, head // group)
            ))  # fmt: skip
            scores = (q @ k.T * shape.head_dim**-0.5).masked_fill_(~allowed, float("-inf"))
            exact = torch.softmax(scores, -1).nan_to_num(nan=0.0) @ v
            square += float((out[0, start:stop, head].double() - exact).square().sum())
            size += float(exact.square().sum())
    return (square / max(size, 1e-300)) ** 0.5
