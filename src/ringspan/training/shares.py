"""Where a step's time goes: attention, feed-forward, communication, by marks on the line of work that a rank has.

Time belongs to the innermost part that has begun and not ended; what is in none is the rest of the step:

- attention: from q, k and v to its output, and back: kernels, merges, packing, without the projections around it.
- feed-forward: the layers' feed-forward parts, forward, computed again where they are, and backward.
- communication: what computing waited for, inside attention too, sums over ranks of gradients and losses, and FSDP2's gathering and
  scattering. A transfer that computing hides takes no time here.

On a CPU a mark is the host's clock. On a GPU it is an event on the current stream, read when the step is over: nothing waits for the device
in between.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ringspan.transformer.layers import decoder_layers, feed_forward_of
from ringspan.transport import Pending

ATTENTION, FEED_FORWARD, COMMUNICATION, REST = "attention", "feed_forward", "communication", "rest"
_PARTS = {"whole": ATTENTION, "wait": COMMUNICATION, "reduce": COMMUNICATION}
WORTH = 0.01
"""The largest part of the steps' time that measuring may take on average: steps whose marks cost more are measured less often."""
_CALIBRATION = 64
_SHARDING_WAITS = ("unshard", "wait_for_unshard", "post_backward", "finalize_backward")
"""On a GPU the first and third only queue what the others wait for; on a CPU they are the transfers."""
_HOOK_SECONDS = 2.5e-6
"""What Python spends around a mark: the four of a feed-forward part, forward and backward, were measured at 10 µs."""


@dataclass(frozen=True, kw_only=True)
class Shares:
    """Parts of a step's time, 0 to 1, over all ranks: the sum of their seconds in each by the sum of their seconds. The rest is other."""

    attention: float
    feed_forward: float
    communication: float


class Moments(Protocol):
    """Marks moments and, once the step is over, tells how far apart they were."""

    def mark(self) -> Any:
        """This moment in the rank's work."""
        ...

    def seconds(self, first: Any, last: Any) -> float:
        """From one to the other."""
        ...

    def give_back(self, marks: list[Any]) -> None:
        """They are not needed any more."""
        ...


class HostMoments:
    """A rank computes where it is called."""

    def mark(self) -> float:
        """Now."""
        return time.perf_counter()

    def seconds(self, first: float, last: float) -> float:
        """Their difference."""
        return last - first

    def give_back(self, marks: list[float]) -> None:
        """Numbers need no keeping."""


class CudaMoments:
    """Events on the current stream, used again step after step. All are over when they are read: the step has been waited for."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._free = device, []

    def mark(self) -> torch.cuda.Event:
        """An event that is reached when what was queued on the current stream is done."""
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self, first: torch.cuda.Event, last: torch.cuda.Event) -> float:
        """Between two events that have been reached."""
        return first.elapsed_time(last) / 1e3

    def give_back(self, marks: list[torch.cuda.Event]) -> None:
        """See `Moments.give_back`."""
        self._free += marks


class PartTimes:
    """Keeps the time of one rank's parts, step by step; an observer of attention (`ringspan.attention.observe.Observer`).

    Args:
        moments: of the rank's device.
    """

    def __init__(self, moments: Moments) -> None:
        self._moments = moments
        self._line: list[tuple[Any, str]] = []
        self._open: list[str] = []
        self.is_running = False

    def start(self) -> None:
        """A step begins."""
        self.is_running, self._open = True, []
        self._mark()

    def stop(self) -> None:
        """The step's work is queued; `read` is for when it is done."""
        self._open = []
        self._mark()
        self.is_running = False

    @property
    def is_inside(self) -> bool:
        """Whether a part has begun and not ended."""
        return bool(self._open)

    @property
    def num_marks(self) -> int:
        """In the step so far."""
        return len(self._line)

    def read(self) -> list[float]:
        """Seconds of the last step in attention, feed-forward and communication, and of all of it; and forgets it."""
        totals: dict[str, float] = {ATTENTION: 0.0, FEED_FORWARD: 0.0, COMMUNICATION: 0.0, REST: 0.0}
        for (first, part), (last, _) in pairwise(self._line):
            totals[part] += self._moments.seconds(first, last)
        self._moments.give_back([mark for mark, _ in self._line])
        self._line = []
        return [totals[ATTENTION], totals[FEED_FORWARD], totals[COMMUNICATION], sum(totals.values())]

    def enter(self, part: str) -> int:
        """`part` begins; what is returned ends it."""
        self._open.append(part)
        self._mark()
        return len(self._open) - 1

    def leave(self, depth: int) -> None:
        """It is over, and with it all that began in it."""
        if depth < len(self._open):
            del self._open[depth:]
            self._mark()

    def _mark(self) -> None:
        self._line.append((self._moments.mark(), self._open[-1] if self._open else REST))

    def begin(self, step: int, kind: str, what: object, pending: Pending | None = None) -> int | None:
        """See `Observer.begin`."""
        part = _PARTS.get(kind)
        return self.enter(part) if part is not None and self.is_running else None

    def end(self, token: int | None) -> None:
        """See `Observer.end`."""
        if token is not None:
            self.leave(token)


def moments_of(device: torch.device) -> Moments:
    """The marks of work on `device`."""
    return CudaMoments(device) if device.type == "cuda" else HostMoments()


def seconds_of_a_mark(moments: Moments) -> float:
    """What one costs the host, with the hook that makes it and its reading."""
    best = float("inf")
    for _ in range(3):
        # The first time makes the events.
        started = time.perf_counter()
        marks = [moments.mark() for _ in range(_CALIBRATION)]
        took = time.perf_counter() - started
        if isinstance(moments, CudaMoments):
            torch.cuda.synchronize()
        started = time.perf_counter()
        for first, last in pairwise(marks):
            moments.seconds(first, last)
        best = min(best, took + time.perf_counter() - started)
        moments.give_back(marks)
    return best / _CALIBRATION + _HOOK_SECONDS


def steps_between(overhead: float, seconds: float) -> int:
    """Measure every n-th step, so that marks that cost `overhead` of a step's `seconds` are `WORTH` of the time; 1 is every step."""
    return max(1, min(1000, math.ceil(overhead / (WORTH * seconds)))) if seconds > 0 else 1


def combine_shares(gathered: list[list[float]]) -> Shares:
    """Over the ranks, of each of which `PartTimes.read` said these."""
    attention, feed_forward, communication, total = (sum(column) for column in zip(*gathered, strict=True))
    total = max(total, 1e-12)
    return Shares(attention=attention / total, feed_forward=feed_forward / total, communication=communication / total)


def watch_feed_forward(model: nn.Module, times: PartTimes) -> None:
    """Has the feed-forward part of every layer tell `times` when it begins and ends, both ways.

    Outputs and gradients are the same bits as without. The backward begins when the gradient of the part's output is there, and ends when
    that of its input is.

    Raises:
        UnsupportedError: where a layer has no feed-forward part under a known name.
    """
    layers = decoder_layers(model)
    parts = [feed_forward_of(layer) for layer in layers]
    for layer, part in zip(layers, parts, strict=True):
        for other in layer.children():
            if other is not part:
                _watch_other(other, times)
        calls = _Calls(times)
        part.register_forward_pre_hook(calls.before, with_kwargs=True)
        # A layer that is computed again may stop inside the part; its time is over then too.
        part.register_forward_hook(calls.after, always_call=True)


def _watch_other(part: nn.Module, times: PartTimes) -> None:
    """What is not feed-forward is not counted as such, where a feed-forward's backward has the layer computed again."""
    depths: list[int | None] = []

    def before(*arguments: Any) -> None:
        depths.append(times.enter(REST) if times.is_running and times.is_inside else None)

    def after(*arguments: Any) -> None:
        if depths and (depth := depths.pop()) is not None:
            times.leave(depth)

    part.register_forward_pre_hook(before)
    part.register_forward_hook(after, always_call=True)


def watch_sharding(model: nn.Module, times: PartTimes) -> None:
    """Has FSDP2 tell `times` when computing waits for parameters and gradients that it moves; nothing where nothing is sharded.

    FSDP2 has no hooks around its waits: they are methods of each module's parameter group, which are wrapped.
    """
    # Late: whoever shards nothing need not load FSDP.
    from ringspan.transformer.fsdp import parameter_groups

    for module in model.modules():
        for group in parameter_groups(module):
            for name in _SHARDING_WAITS:
                if callable(method := getattr(group, name, None)):
                    setattr(group, name, _as_communication(method, times))


def _as_communication(method: Callable[..., Any], times: PartTimes) -> Callable[..., Any]:
    @wraps(method)
    def timed(*arguments: Any, **keywords: Any) -> Any:
        if not times.is_running:
            return method(*arguments, **keywords)
        depth = times.enter(COMMUNICATION)
        try:
            return method(*arguments, **keywords)
        finally:
            times.leave(depth)

    return timed


class _Calls:
    """Of one feed-forward part."""

    def __init__(self, times: PartTimes) -> None:
        self._times = times
        self._depth: int | None = None
        self._backward: list[int] = []
        self._tells_its_end = False

    def before(self, module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if not self._times.is_running:
            self._depth = None
            return None
        self._depth, self._backward = self._times.enter(FEED_FORWARD), []
        first = positional[0] if positional else None
        self._tells_its_end = isinstance(first, Tensor) and first.requires_grad and torch.is_grad_enabled()
        if not self._tells_its_end:
            return None
        # A node of this part's own: the input may be another part's too, whose gradient is then not awaited.
        assert isinstance(first, Tensor)
        mine, entered = first.view_as(first), self._backward
        assert mine.grad_fn is not None
        mine.grad_fn.register_hook(lambda *gradients: self._leave(entered))
        return (mine, *positional[1:]), named

    def after(self, module: nn.Module, positional: tuple[Any, ...], output: Any) -> None:
        if self._depth is None:
            return
        self._times.leave(self._depth)
        self._depth = None
        first = output[0] if isinstance(output, tuple) and output else output
        if not (isinstance(first, Tensor) and first.grad_fn is not None):
            return
        entered, tells_its_end = self._backward, self._tells_its_end

        def enter(gradients: Any) -> None:
            entered.append(self._times.enter(FEED_FORWARD))
            if not tells_its_end:
                # No gradient of the input does: the end of the backward pass has to.
                torch.autograd.Variable._execution_engine.queue_callback(lambda: self._leave(entered))

        first.grad_fn.register_prehook(enter)

    def _leave(self, entered: list[int]) -> None:
        if entered:
            self._times.leave(entered.pop())
