"""Where a step's time goes: every second in one part, by clocks that tests turn themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ringspan
from ringspan.training.measure import Meter
from ringspan.training.shares import (
    COMMUNICATION,
    FEED_FORWARD,
    HostMoments,
    PartTimes,
    Shares,
    combine_shares,
    seconds_of_a_mark,
    steps_between,
    watch_feed_forward,
    watch_sharding,
)
from ringspan.transformer import blockwise
from tests.training.support import write_text
from tests.training.trainers import take_steps


class Turned:
    """A clock that stands still until work is done."""

    def __init__(self) -> None:
        self.now = 0.0

    def mark(self) -> float:
        return self.now

    def seconds(self, first: float, last: float) -> float:
        return last - first

    def give_back(self, marks: list[float]) -> None:
        return None


class Work(torch.autograd.Function):
    """Takes `forward` seconds, and `backward` seconds when its gradient is made."""

    @staticmethod
    def forward(ctx, x: Tensor, clock: Turned, forward: float, backward: float) -> Tensor:
        ctx.clock, ctx.seconds = clock, backward
        clock.now += forward
        return 2 * x

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        ctx.clock.now += ctx.seconds
        return 2 * gradients[0], None, None, None


class Worker(nn.Module):
    """A part of a layer that takes so long each way. Its weight is its own, so that there is something to train."""

    def __init__(self, clock: Turned, forward: float, backward: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.clock, self.seconds = clock, (forward, backward)

    def forward(self, x: Tensor) -> Tensor:
        # The second product keeps what the work gave: who computes the part again, works again.
        return self.weight * Work.apply(x * self.weight, self.clock, *self.seconds)


class Layer(nn.Module):
    """Both parts read the same input, as in Cohere: a part's end is not when that input's gradient is whole."""

    def __init__(self, clock: Turned) -> None:
        super().__init__()
        self.projection, self.mlp = Worker(clock, 1.0, 2.0), Worker(clock, 10.0, 20.0)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.projection(x) + self.mlp(x)


class Model(nn.Module):
    """Two such layers."""

    def __init__(self, clock: Turned, again: bool) -> None:
        super().__init__()
        self.layers, self.again = nn.ModuleList([Layer(clock), Layer(clock)]), again

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.again else layer(x)
        return x


def seconds_of_parts(again: bool, frozen_input: bool, train: tuple[str, ...] = ("projection", "mlp")) -> list[float]:
    clock = Turned()
    model, times = Model(clock, again), PartTimes(clock)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.split(".")[2] in train)
    watch_feed_forward(model, times)
    x = torch.ones(3, requires_grad=not frozen_input)
    model(x)  # no step is running, and nothing is remembered
    started = clock.now
    times.start()
    model(x).sum().backward()
    clock.now += 5.0
    times.stop()
    found = times.read()
    assert found[3] == clock.now - started
    return found


def test_feed_forward_is_what_these_parts_take_forward_and_backward_and_nothing_else():
    assert seconds_of_parts(again=False, frozen_input=False) == [0.0, 60.0, 0.0, 60.0 + 6.0 + 5.0]


def test_what_is_computed_again_counts_where_it_is():
    # Both layers run again in the backward, inside that of their feed-forward: the projections are not its, all the same.
    assert seconds_of_parts(again=True, frozen_input=False) == [0.0, 80.0, 0.0, 80.0 + 8.0 + 5.0]


def test_a_part_whose_input_has_no_gradient_ends_with_the_backward_pass():
    # Of the first layer no gradient tells when its feed-forward is done; the five seconds after the backward are not its.
    parts = seconds_of_parts(again=False, frozen_input=True, train=("mlp",))
    assert (parts[1], parts[3]) == (60.0, 2 * 1.0 + 2.0 + 60.0 + 5.0)


def test_a_part_that_breaks_off_ends_there():
    class Stops(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            clock.now += 1.0
            raise KeyError("as a checkpoint does that has all it needs")

    clock = Turned()
    model, times = Model(clock, False), PartTimes(clock)
    model.layers[0].mlp = Stops()
    watch_feed_forward(model, times)
    times.start()
    with pytest.raises(KeyError):
        model(torch.ones(3))
    clock.now += 7.0
    times.stop()
    assert times.read() == [0.0, 1.0, 0.0, 1.0 + 1.0 + 7.0]


def test_time_belongs_to_the_innermost_part():
    clock = Turned()
    times = PartTimes(clock)

    def after(seconds: float) -> None:
        clock.now += seconds

    assert times.begin(0, "whole", None) is None, "no step is running"
    times.start()
    whole = times.begin(0, "whole", None)
    after(1.0)
    attend = times.begin(0, "attend", None)
    after(2.0)
    times.end(attend)
    wait = times.begin(0, "wait", None)
    after(4.0)
    times.end(wait)
    after(8.0)
    times.end(whole)
    after(16.0)
    part = times.enter(FEED_FORWARD)
    times.enter(COMMUNICATION)  # and never ends by itself
    after(32.0)
    times.leave(part)
    after(64.0)
    reduce = times.begin(0, "reduce", None)
    after(128.0)
    times.end(reduce)
    times.stop()
    assert times.read() == [11.0, 0.0, 4.0 + 32.0 + 128.0, 255.0]
    assert times.num_marks == 0


def test_what_sharded_parameters_are_waited_for_is_communication():
    clock = Turned()

    class Group:
        """As FSDP2 has one for each module that it shards."""

        def wait_for_unshard(self, seconds: float) -> str:
            clock.now += seconds
            return "whole"

    class State:
        def __init__(self, **groups: object) -> None:
            vars(self).update(groups)

    one, many = nn.Linear(1, 1), nn.Linear(1, 1)
    groups = Group(), Group(), Group()
    one._get_fsdp_state = lambda: State(_fsdp_param_group=groups[0])  # type: ignore[assignment]
    many._get_fsdp_state = lambda: State(_fsdp_param_groups=list(groups[1:]))  # type: ignore[assignment]
    times = PartTimes(clock)
    watch_sharding(nn.Sequential(one, many, nn.Linear(1, 1)), times)
    assert groups[0].wait_for_unshard(1.0) == "whole"
    times.start()
    assert [group.wait_for_unshard(2.0) for group in groups] == ["whole"] * 3
    clock.now += 1.0
    times.stop()
    assert times.read() == [0.0, 0.0, 6.0, 7.0]


def test_looking_on_changes_no_bit():
    def gradients(watched: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Module()
        model.layers = nn.ModuleList([nn.Module()])
        model.layers[0].mlp = mlp = nn.Sequential(nn.Linear(5, 9), nn.SiLU(), nn.Linear(9, 5))
        blockwise(mlp, 3)
        times = PartTimes(HostMoments())
        if watched:
            watch_feed_forward(model, times)
            times.start()
        x = torch.randn(2, 7, 5, requires_grad=True)
        y = mlp(x)
        (y * torch.randn(y.shape)).sum().backward()
        if watched:
            times.stop()
            parts = times.read()
            assert 0 < parts[1] <= parts[3]
        return [y.detach(), x.grad, *(parameter.grad for parameter in mlp.parameters())]  # type: ignore[list-item]

    for seen, unseen in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(seen, unseen)


def test_shares_are_of_all_ranks_time():
    assert combine_shares([[1.0, 2.0, 0.0, 4.0], [1.0, 0.0, 3.0, 4.0]]) == Shares(attention=0.25, feed_forward=0.25, communication=0.375)


def test_marks_that_cost_more_than_a_hundredth_of_a_step_are_made_less_often():
    assert [steps_between(cost, 1.0) for cost in (0.0, 0.01, 0.011, 0.05, 100.0)] == [1, 1, 2, 5, 1000]
    assert steps_between(1.0, 0.0) == 1
    assert 0 < seconds_of_a_mark(HostMoments()) < 1e-3


class OneRank:
    """What a `Meter` asks of `Ranks`."""

    device = torch.device("cpu")

    def gather(self, values: list[float]) -> list[list[float]]:
        return [values]


def test_a_meter_whose_marks_are_dear_leaves_steps_out(monkeypatch: pytest.MonkeyPatch):
    meter = Meter(OneRank())  # type: ignore[arg-type]
    cp = ringspan.ContextParallel()
    meter.watch(Model(Turned(), False), cp)
    assert meter.blind is None
    # Two marks a step, of which each costs what a step may take three times: every sixth is looked at.
    meter._mark_seconds = 0.03
    monkeypatch.setattr("ringspan.training.shares.HostMoments.seconds", lambda self, first, last: 1.0)
    seen = []
    for _ in range(13):
        meter.start()
        seen.append(meter.stop().shares is not None)
    assert seen == [step % 6 == 0 for step in range(13)]


def test_a_model_without_known_layers_is_not_looked_into_and_says_so():
    meter = Meter(OneRank())  # type: ignore[arg-type]
    cp = ringspan.ContextParallel()
    meter.watch(nn.Linear(2, 2), cp)
    assert "the layers of a Linear" in (meter.blind or "")
    meter.start()
    assert (meter.stop().shares, cp.observer) == (None, None)


def test_every_step_of_a_run_says_where_its_time_went_the_same_on_every_rank(tmp_path: Path):
    # The window makes every layer's sequence another than the batch's.
    text = write_text(tmp_path / "text.txt", num_words=600)
    runs = take_steps(tmp_path / "run", 2, data=str(text), steps=2, accumulate=2, mask="window:20")
    records = [[taken.record for taken in steps] for steps, _ in runs]
    for first, second in zip(*records, strict=True):
        shares = (first.attention_share, first.feed_forward_share, first.communication_share)
        assert shares == (second.attention_share, second.feed_forward_share, second.communication_share)
        assert all(share is not None and share > 0 for share in shares), shares
        assert sum(share or 0.0 for share in shares) < 1
