"""What a step costs: seconds, where they go, and on a GPU the largest memory and the energy, over all ranks."""

from __future__ import annotations

import time
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import nn

from ringspan.attention import ContextParallel
from ringspan.errors import UnsupportedError
from ringspan.training.ranks import Ranks
from ringspan.training.shares import (
    PartTimes,
    Shares,
    combine_shares,
    moments_of,
    seconds_of_a_mark,
    steps_between,
    watch_feed_forward,
    watch_sharding,
)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one step.

    Attributes:
        seconds: wall time on this rank.
        peak_memory_bytes: most that PyTorch had allocated at once, on the rank where that was most; None without a GPU.
        reserved_memory_bytes: the same of what PyTorch held from the device.
        joules: of all ranks' devices together, by NVML's counter; None where it does not answer.
        shares: of the time; None for a step in which it was not looked at.
    """

    seconds: float
    peak_memory_bytes: int | None = None
    reserved_memory_bytes: int | None = None
    joules: float | None = None
    shares: Shares | None = None


class Meter:
    """Measures steps on one rank. `start` and `stop` are called by all ranks, which tell one another what they measured.

    Attributes:
        blind: why the shares of the time are not measured; None where they are.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks, self._device = ranks, ranks.device
        self._times: PartTimes | None = None
        self._mark_seconds, self._left_out = 0.0, 0
        self.blind: str | None = "nobody has said what to look at"
        self._energy = EnergyCounter.of(self._device) if self._device.type == "cuda" else None
        self._started, self._joules = 0.0, None

    @property
    def counts_energy(self) -> bool:
        """Whether this rank's device tells its energy."""
        return self._energy is not None

    def watch(self, model: nn.Module, context: ContextParallel) -> None:
        """From now on also says which share of a step is attention by `context`, the feed-forward of `model`, and communication."""
        moments = moments_of(self._device)
        times = PartTimes(moments)
        try:
            watch_feed_forward(model, times)
        except UnsupportedError as error:
            self.blind = str(error)
            return
        watch_sharding(model, times)
        context.observer = times
        self._times, self._mark_seconds, self.blind = times, seconds_of_a_mark(moments), None

    def start(self) -> None:
        """The step begins."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._joules = self._energy.joules() if self._energy else None
        if self._left_out > 0:
            self._left_out -= 1
        elif self._times is not None:
            self._times.start()
        self._started = time.perf_counter()

    def stop(self) -> Cost:
        """The step is done on this rank, its kernels too."""
        watched = self._times if self._times is not None and self._times.is_running else None
        if watched is not None:
            watched.stop()
        on_gpu = self._device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize(self._device)
        seconds = time.perf_counter() - self._started
        mine = self._memory_and_energy() if on_gpu else []
        if watched is not None:
            overhead = watched.num_marks * self._mark_seconds
            mine += [*watched.read(), overhead]
        gathered = self._ranks.gather(mine) if mine else []
        shares = None if watched is None else self._over_ranks([row[-5:] for row in gathered])
        return combine(seconds, [row[:3] for row in gathered], shares) if on_gpu else Cost(seconds=seconds, shares=shares)

    def _memory_and_energy(self) -> list[float]:
        now = self._energy.joules() if self._energy else None
        joules = float("nan") if now is None or self._joules is None else now - self._joules
        return [float(torch.cuda.max_memory_allocated(self._device)), float(torch.cuda.max_memory_reserved(self._device)), joules]

    def _over_ranks(self, rows: list[list[float]]) -> Shares:
        # The same on every rank, so that all look at the same steps.
        self._left_out = max(steps_between(overhead, total) for *_, total, overhead in rows) - 1
        return combine_shares([row[:4] for row in rows])


def combine(seconds: float, gathered: list[list[float]], shares: Shares | None = None) -> Cost:
    """The cost of a step of which each rank measured `[allocated, reserved, joules]`; energy that one rank does not know nobody does."""
    allocated, reserved, joules = zip(*gathered, strict=True)
    total = sum(joules)
    return Cost(
        seconds=seconds,
        peak_memory_bytes=int(max(allocated)),
        reserved_memory_bytes=int(max(reserved)),
        joules=None if total != total else total,
        shares=shares,
    )


class EnergyCounter:
    """NVML's count of the millijoules that a device has used since its driver was loaded (Volta and later)."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle

    @staticmethod
    def of(device: torch.device) -> EnergyCounter | None:
        """The counter of a CUDA device; None where nvidia-ml-py is not installed or the device does not count."""
        try:
            pynvml = import_module("pynvml")
            pynvml.nvmlInit()
            # NVML numbers devices its own way and knows nothing of CUDA_VISIBLE_DEVICES; the UUID is the same in both.
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
            counter = EnergyCounter(pynvml, handle)
        except Exception:  # no package, no driver library, no permission: each with an error of its own
            return None
        return counter if counter.joules() is not None else None

    def joules(self) -> float | None:
        """None where the device does not answer."""
        try:
            return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1000
        except self._nvml.NVMLError:
            return None
