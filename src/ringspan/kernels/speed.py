"""Which kernel is fastest here: each that can is timed once for a class of shapes, and what was found is kept."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ringspan.geometry import Tile
from ringspan.kernels.capabilities import Problem
from ringspan.kernels.protocol import Kernel, Scores, lowered

Timer = Callable[[Kernel, Problem, int], float]
"""Seconds of a forward and a backward over so many tokens; raises where the kernel does."""

SHORTEST, LONGEST = 128, 8192
"""Tokens of the problem that is timed: a few milliseconds on a GPU at most, and beyond them the order of the kernels stays."""
AHEAD_CYCLES = 10_000_000
"""How long a GPU is kept waiting while what is timed is launched: some milliseconds."""
TIE = 0.02
"""Below so much difference between two kernels the one that is declared first is taken."""
_LAST = ("flex", "reference")
"""Not timed beside others: one is compiled for tens of seconds, one keeps all scores. They are there for what no other computes."""


class ShapeClass(NamedTuple):
    """Shapes that are timed together: tokens are rounded up to a power of two, heads count as query heads per key head."""

    device: str
    dtype: torch.dtype
    heads_ratio: int
    head_dim: int
    features: frozenset[str]
    deterministic: bool
    tokens: int


def shape_class(problem: Problem, length: int) -> ShapeClass:
    """The class of `problem` on shards of `length` tokens."""
    tokens = min(max(SHORTEST, 1 << max(0, length - 1).bit_length()), LONGEST)
    ratio = problem.heads // problem.kv_heads
    return ShapeClass(problem.device, problem.dtype, ratio, problem.head_dim, problem.features, problem.deterministic, tokens)


@dataclass(frozen=True)
class Comparison:
    """What was found for a class of shapes.

    Args:
        tokens: of the problem that was timed.
        seconds: of a forward and a backward, by kernel; empty where there was nothing to choose.
        failed: what those that broke when they were timed said.
        taken: the kernel that `auto` takes.
        reason: why, as a sentence.
    """

    tokens: int
    seconds: Mapping[str, float]
    failed: Mapping[str, str]
    taken: str
    reason: str


class Speeds:
    """Compares kernels, each class of shapes once in the life of the process.

    Args:
        kernels: by name, those that are declared faster first.
        timer: what times one.
        devices: where kernels are timed; elsewhere the first that can is taken.
    """

    def __init__(self, kernels: Mapping[str, Kernel], timer: Timer, devices: frozenset[str] = frozenset({"cuda"})) -> None:
        self.kernels, self.timer, self.devices = kernels, timer, devices
        self._found: dict[tuple[ShapeClass, tuple[str, ...]], Comparison] = {}

    def capable(self, problem: Problem) -> tuple[str, ...]:
        """The kernels that compute `problem` here, in their declared order."""
        return tuple(name for name, kernel in self.kernels.items() if kernel.refusal(problem) is None)

    def compare(self, problem: Problem, length: int, among: tuple[str, ...]) -> Comparison:
        """Which of the kernels `among` is fastest. FlexAttention and the reference are never timed beside others."""
        key = shape_class(problem, length), among
        if key not in self._found:
            self._found[key] = self._compare(problem, key[0].tokens, among)
        return self._found[key]

    def _compare(self, problem: Problem, tokens: int, among: tuple[str, ...]) -> Comparison:
        candidates = [name for name in among if name not in _LAST] or [name for name in _LAST if name in among][:1]
        if problem.device not in self.devices:
            return Comparison(tokens, {}, {}, candidates[0], f"on {problem.device} nothing is timed; it is the first of the table that can")
        if len(candidates) == 1:
            rest = [name for name in among if name not in candidates]
            others = f"only {' and '.join(rest)} can, too, and slower" if rest else "no other can"
            return Comparison(tokens, {}, {}, candidates[0], others)
        seconds, failed = {}, {}
        for name in candidates:
            try:
                seconds[name] = self.timer(self.kernels[name], problem, tokens)
            except Exception as error:
                # A kernel that this machine's drivers or compilers break is left out, and `ringspan doctor` says so.
                failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        if not seconds:
            taken = among[-1]
            said = "; ".join(f"{name}: {error}" for name, error in failed.items())
            warnings.warn(f"Every fast kernel failed when it was timed, and {taken} computes, many times slower ({said})", stacklevel=2)
            return Comparison(tokens, seconds, failed, taken, f"{', '.join(failed)} failed when they were timed")
        fastest = min(seconds.values())
        taken = next(name for name in candidates if name in seconds and seconds[name] <= fastest * (1 + TIE))
        rest = ", ".join(f"{name} {1e3 * each:.2f}" for name, each in sorted(seconds.items(), key=lambda pair: pair[1]) if name != taken)
        beside = f", {rest}" if rest else ""
        return Comparison(
            tokens, seconds, failed, taken, f"{1e3 * seconds[taken]:.2f} ms for {tokens:,} tokens forward and backward{beside}"
        )


def time_kernel(kernel: Kernel, problem: Problem, tokens: int, repeats: int = 7) -> float:
    """The median seconds of a forward and a backward of one causal sequence; neither launches nor what is compiled at first use count.

    A window leaves a quarter of the sequence, a softcap is 30, and a mask_mod hides each seventh pair. The caller's function modes, such as
    `torch.set_default_device`, are left for the time.
    """
    run = kernel_pass(kernel, problem, tokens)
    seconds = _seconds_on_gpu if problem.device == "cuda" else _seconds
    for _ in range(2):
        run()
    return statistics.median(seconds(run) for _ in range(repeats))


def kernel_pass(kernel: Kernel, problem: Problem, tokens: int) -> Callable[[], None]:
    """A forward and a backward of one causal sequence on the current device, for what is timed: see `time_kernel`."""
    with torch._C.DisableTorchFunction():
        run = _pass(kernel, problem, tokens)

    def undisturbed() -> None:
        with torch._C.DisableTorchFunction(), torch.no_grad():
            run()

    return undisturbed


def _pass(kernel: Kernel, problem: Problem, tokens: int) -> Callable[[], None]:
    generator = torch.Generator().manual_seed(0)

    def normal(heads: int) -> Tensor:
        return torch.randn(1, tokens, heads, problem.head_dim, generator=generator).to(problem.device, problem.dtype)

    q, dout = (normal(problem.heads) for _ in range(2))
    k, v = (normal(problem.kv_heads) for _ in range(2))
    tile = Tile(0, tokens, 0, tokens, 0, tokens // 4 if "window" in problem.features else None)
    launches = [(slice(part.q_start, part.q_stop), slice(part.k_start, part.k_stop), part) for part in lowered(tile, kernel.can.shapes)]
    positions = torch.arange(tokens, device=problem.device)

    def scores(part: Tile) -> Scores:
        mod = _six_of_seven if "mask_mod" in problem.features else None
        at = (positions[part.q_start : part.q_stop], positions[part.k_start : part.k_stop]) if mod else (None, None)
        softcap = 30.0 if "softcap" in problem.features else None
        return Scores(part, problem.head_dim**-0.5, softcap, mod, *at, deterministic=problem.deterministic)

    def run() -> None:
        for rows, keys, part in launches:
            out, lse = kernel.forward(q[:, rows], k[:, keys], v[:, keys], scores(part))
            # A kernel is handed merged statistics in the inputs' dtype and in float32.
            kernel.backward(dout[:, rows], q[:, rows], k[:, keys], v[:, keys], out.to(q.dtype), lse, None, scores(part))

    return run


def _seconds(run: Callable[[], None]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _seconds_on_gpu(run: Callable[[], None]) -> float:
    """What the GPU takes, all launches waiting in its queue: as in a CUDA graph, or a model whose other layers keep it busy."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(AHEAD_CYCLES)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


def _six_of_seven(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return (q_idx + kv_idx) % 7 != 6
