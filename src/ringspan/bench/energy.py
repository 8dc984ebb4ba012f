"""Joules: NVML's counter of a GPU's energy, where it answers."""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ringspan.bench.clock import Clock

MEASURED_MS = 400.0
"""How long work is repeated: the counter moves some ten times a second."""


@dataclass(frozen=True)
class Meter:
    """The energy counter of one GPU. `missing` says why there is none."""

    missing: str
    _nvml: Any = None
    _handle: Any = None

    def millijoules(self) -> int:
        """Since the driver was loaded."""
        return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)


def open_meter(device: torch.device) -> Meter:
    """The counter of `device`."""
    if device.type != "cuda":
        return Meter("NVML counts the energy of NVIDIA GPUs alone")
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return Meter("pynvml is not installed: pip install nvidia-ml-py")
    try:
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode())
        meter = Meter("", nvml, handle)
        meter.millijoules()
    except Exception as error:
        return Meter(f"NVML does not answer: {error}")
    return meter


def joules(meter: Meter, clock: Clock, work: Callable[[], object], milliseconds: float) -> float | None:
    """Joules of one call over all ranks, idle parts of the GPUs included; None unless every rank's counter answers. Collective."""
    if not all(clock.transport.gather_objects(not meter.missing)):
        return None
    calls = max(1, math.ceil(MEASURED_MS / max(milliseconds, 1e-3)))
    clock.synchronize()
    before = meter.millijoules()
    for _ in range(calls):
        work()
    clock.synchronize()
    spent = clock.transport.gather_objects((meter.millijoules() - before) / 1e3 / calls)
    return sum(spent) if all(value > 0 for value in spent) else None


def close_meter(meter: Meter) -> None:
    """Leaves NVML."""
    if not meter.missing:
        with contextlib.suppress(Exception):
            meter._nvml.nvmlShutdown()
