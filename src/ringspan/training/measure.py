"""What a step costs: seconds, and on a GPU the largest memory and the energy, over all ranks."""

from __future__ import annotations

import time
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from ringspan.training.ranks import Ranks


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one step.

    Attributes:
        seconds: wall time on this rank.
        peak_memory_bytes: most that PyTorch had allocated at once, on the rank where that was most; None without a GPU.
        reserved_memory_bytes: the same of what PyTorch held from the device.
        joules: of all ranks' devices together, by NVML's counter; None where it does not answer.
    """

    seconds: float
    peak_memory_bytes: int | None = None
    reserved_memory_bytes: int | None = None
    joules: float | None = None


class Meter:
    """Measures steps on one rank. `start` and `stop` are called by all ranks: on a GPU they tell one another what they measured."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks, self._device = ranks, ranks.device
        self._energy = EnergyCounter.of(self._device) if self._device.type == "cuda" else None
        self._started, self._joules = 0.0, None

    @property
    def counts_energy(self) -> bool:
        """Whether this rank's device tells its energy."""
        return self._energy is not None

    def start(self) -> None:
        """The step begins."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._joules = self._energy.joules() if self._energy else None
        self._started = time.perf_counter()

    def stop(self) -> Cost:
        """The step is done on this rank, its kernels too."""
        if self._device.type != "cuda":
            return Cost(seconds=time.perf_counter() - self._started)
        torch.cuda.synchronize(self._device)
        seconds = time.perf_counter() - self._started
        now = self._energy.joules() if self._energy else None
        joules = float("nan") if now is None or self._joules is None else now - self._joules
        mine = [float(torch.cuda.max_memory_allocated(self._device)), float(torch.cuda.max_memory_reserved(self._device)), joules]
        return combine(seconds, self._ranks.gather(mine))


def combine(seconds: float, gathered: list[list[float]]) -> Cost:
    """The cost of a step of which each rank measured `[allocated, reserved, joules]`; energy that one rank does not know nobody does."""
    allocated, reserved, joules = zip(*gathered, strict=True)
    total = sum(joules)
    return Cost(
        seconds=seconds,
        peak_memory_bytes=int(max(allocated)),
        reserved_memory_bytes=int(max(reserved)),
        joules=None if total != total else total,
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
