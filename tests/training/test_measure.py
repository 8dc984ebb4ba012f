"""What a step costs over all ranks: the most memory of any, the energy of all, and nothing where it is not known."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace

import pytest
import torch

from ringspan.training.measure import Cost, EnergyCounter, combine


def test_memory_is_the_largest_of_any_rank_and_energy_the_sum():
    cost = combine(2.0, [[10.0, 30.0, 1.5], [20.0, 25.0, 2.5]])
    assert cost == Cost(seconds=2.0, peak_memory_bytes=20, reserved_memory_bytes=30, joules=4.0)


def test_energy_that_one_rank_does_not_know_nobody_does():
    assert combine(2.0, [[10.0, 30.0, 1.5], [20.0, 25.0, math.nan]]).joules is None


def nvml(answers: bool) -> SimpleNamespace:
    """NVML as the package has it, for one device."""
    error = type("NVMLError", (Exception,), {})
    wanted = "GPU-11111111-2222-3333-4444-555555555555"

    def handle(uuid: str) -> str:
        assert uuid == wanted
        return "handle"

    def energy(given: str) -> int:
        if not answers:
            raise error("Not Supported")
        return 123_456

    return SimpleNamespace(
        NVMLError=error, nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=handle, nvmlDeviceGetTotalEnergyConsumption=energy
    )


@pytest.mark.parametrize(("module", "joules"), [(nvml(True), 123.456), (nvml(False), None), (None, None)])
def test_the_counter_is_read_in_joules_or_not_at_all(module: object, joules: float | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pynvml", module)
    properties = SimpleNamespace(uuid="11111111-2222-3333-4444-555555555555")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    counter = EnergyCounter.of(torch.device("cuda", 0))
    assert (counter and counter.joules()) == joules
