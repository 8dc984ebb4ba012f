"""What only a GPU can show of a training step's measurements: times by events, with nothing waited for inside the step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ringspan.training.shares import PartTimes, moments_of, watch_feed_forward

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here: events are a GPU's"),
]
CYCLES = 20_000_000  # some 10 ms


class Busy(torch.autograd.Function):
    """Keeps the GPU busy so many times `CYCLES`, forward and backward."""

    @staticmethod
    def forward(ctx, x: Tensor, forward: int, backward: int) -> Tensor:
        ctx.times = backward
        torch.cuda._sleep(forward * CYCLES)
        return x * 1

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        torch.cuda._sleep(ctx.times * CYCLES)
        return gradients[0] * 1, None, None


class Part(nn.Module):
    """Busy so long, each way."""

    def __init__(self, forward: int, backward: int) -> None:
        super().__init__()
        self.times = forward, backward

    def forward(self, x: Tensor) -> Tensor:
        return Busy.apply(x, *self.times)


def test_shares_of_a_step_are_read_from_events_when_it_is_over():
    model, layer = nn.Module(), nn.Module()
    layer.other, layer.mlp = Part(2, 4), Part(3, 6)
    model.layers = nn.ModuleList([layer])
    times = PartTimes(moments_of(torch.device("cuda", torch.cuda.current_device())))
    watch_feed_forward(model, times)
    x = torch.ones(4, device="cuda", requires_grad=True)
    for step in range(3):  # the events of a step are used again in the next
        times.start()
        done = torch.cuda.Event()
        layer.mlp(layer.other(x)).sum().backward()
        wait = times.begin(0, "wait", None)
        torch.cuda._sleep(5 * CYCLES)
        times.end(wait)
        times.stop()
        done.record()
        # In the first step kernels are loaded, which may wait for the device.
        assert step == 0 or not done.query(), "the step's marks have waited for the device"
        torch.cuda.synchronize()
        attention, feed_forward, communication, total = times.read()
    assert attention == 0
    assert feed_forward / total == pytest.approx(9 / 20, rel=0.05)
    assert communication / total == pytest.approx(5 / 20, rel=0.05)
