"""Runs one forward and one backward with an observer on every rank, and brings what they saw together."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch

from ringspan.attention import ContextParallel, Sequence
from ringspan.attention.checks import problem_of
from ringspan.strategies import Machine, Schedules
from ringspan.trace.case import TraceCase
from ringspan.trace.measured import RankRecord, measured_timeline
from ringspan.trace.predicted import predicted_timeline
from ringspan.trace.rates import measure_machine
from ringspan.trace.recorder import Recorder, clock_for
from ringspan.trace.timeline import Timeline
from ringspan.transport import InProcessTransport, Transport, run_in_process
from ringspan.verify import DTYPES, World

_BARRIERS = 9


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where a trace was taken.

    Attributes:
        device: its name.
        transport: `in-process`, `gloo` or `nccl`.
        kernel: that computed; `auto` resolved.
        cores: CPU cores that this process may use.
        local_ranks: how many ranks share them.
        devices: GPUs that the ranks of this host compute on; 0 on CPUs.
        torch_version: of PyTorch.
    """

    device: str
    transport: str
    kernel: str
    cores: int
    local_ranks: int
    devices: int
    torch_version: str

    @property
    def shared(self) -> str:
        """What the ranks share that ranks of a cluster do not, in words; empty where nothing."""
        if self.local_ranks == 1:
            return ""
        if self.devices == 0 and self.transport == "in-process":
            return f"{self.local_ranks} ranks are threads of one process on {_counted(self.cores, 'core')}"
        if self.devices == 0 and self.local_ranks * torch.get_num_threads() > self.cores:
            return f"{self.local_ranks} ranks share {_counted(self.cores, 'core')}"
        if 0 < self.devices < self.local_ranks:
            return f"{self.local_ranks} ranks share {_counted(self.devices, 'GPU')}"
        return ""


def _counted(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


@dataclass(frozen=True, kw_only=True)
class Trace:
    """One forward and one backward, measured and predicted.

    Attributes:
        case: what was run; its strategy and options are those that `auto` chose.
        setting: where.
        machine: the rates of the prediction.
        measured: what happened.
        predicted: what the schedule and the rates foretell.
        schedules: what ran.
        reason: why `auto` chose the strategy; empty where it was asked for.
    """

    case: TraceCase
    setting: Setting
    machine: Machine
    measured: Timeline
    predicted: Timeline
    schedules: Schedules
    reason: str = ""


@dataclass(frozen=True)
class Observed:
    """What one rank brings home: its record, and what every rank knows alike."""

    record: RankRecord
    machine: Machine
    sequence: Sequence


def observe_rank(case: TraceCase, context: ContextParallel, device: torch.device, machine: Machine | None = None) -> Observed:
    """One rank's part, collective: a run to warm up, the rates, then a forward and a backward with an observer.

    The ranks begin the forward together, and the backward together.

    Args:
        case: what is run.
        context: the ranks, split as `case` asks.
        device: of the tensors.
        machine: known rates; measured if not given.
    """
    sequence = context.sequence(case.length, case.parsed_mask)
    transport, dtype = context.transport, DTYPES[case.dtype]
    shape = (case.batch, sequence.shard_length)
    q, dout = (torch.randn(*shape, case.heads, case.head_dim, device=device, dtype=dtype) for _ in range(2))
    k, v = (torch.randn(*shape, case.kv_heads, case.head_dim, device=device, dtype=dtype) for _ in range(2))
    inputs = (q.requires_grad_(), k.requires_grad_(), v.requires_grad_())
    torch.autograd.grad(sequence.attention(*inputs), inputs, dout)
    machine = machine or measure_machine(case, sequence, device)
    recorder = Recorder(clock_for(device))
    sequence.observer = recorder
    try:
        _begin(recorder, transport, "forward")
        out = sequence.attention(*inputs)
        marks = recorder.finish()
        _begin(recorder, transport, "backward")
        torch.autograd.grad(out, inputs, dout)
        marks += recorder.finish()
    finally:
        sequence.observer = None
    grid = sequence.schedules.grid
    members = tuple(range(case.num_ranks)) if grid is None else grid.context_group(grid.place(transport.rank))
    return Observed(RankRecord(transport.rank, members, marks, _ahead(transport)), machine, sequence)


def _begin(recorder: Recorder, transport: Transport, direction: str) -> None:
    """All ranks begin `direction` together."""
    recorder.start(direction)
    transport.gather_objects(None)


def _ahead(transport: Transport) -> float:
    """How far this host's clock is ahead of rank 0's: processes of one host share one, others are compared when all have just met."""
    differences, hosts = [], {""}
    for _ in range(_BARRIERS):
        transport.gather_objects(None)
        said = transport.gather_objects((platform.node(), time.perf_counter()))
        hosts = {host for host, _ in said}
        differences.append(said[transport.rank][1] - said[0][1])
    return median(differences) if len(hosts) > 1 else 0.0


def trace(case: TraceCase, world: World, machine: Machine | None = None) -> Trace:
    """Traces `case` over the ranks of `world`: threads of this process, or those that torchrun started. Collective.

    Args:
        case: what is run.
        world: where.
        machine: the rates that the prediction rests on; measured if not given.

    Raises:
        RingspanError: on every rank and before anything runs, for what does not exist or does not go together.
        RankFailure: where a rank is lost.
    """
    world.agree(f"{case} {machine}", problem_of(lambda: case.check(world.device)), "trace")
    if world.transport is None:
        observed = run_in_process(
            case.num_ranks, lambda group: observe_rank(case, context_for(case, group), world.device, machine), world.timeout_seconds
        )
        return put_together(case, [each.record for each in observed], observed[0], world.device, "in-process")
    mine = observe_rank(case, context_for(case, None), world.device, machine)
    return put_together(case, world.transport.gather_objects(mine.record), mine, world.device, world.name)


def context_for(case: TraceCase, group: InProcessTransport | None) -> ContextParallel:
    """The ranks of `group`, or of the default process group, split as `case` asks."""
    options: dict[str, Any] = dict(case.options)
    return ContextParallel(group, strategy=case.strategy, layout=case.layout, kernel=case.kernel, weights=case.weights, **options)


def put_together(case: TraceCase, records: list[RankRecord], observed: Observed, device: torch.device, transport: str) -> Trace:
    """The trace of what the ranks recorded.

    Args:
        case: what was run.
        records: of all ranks, in order.
        observed: what one of them knows besides.
        device: of its tensors.
        transport: `in-process`, `gloo` or `nccl`.
    """
    sequence, machine = observed.sequence, observed.machine
    assert sequence.kernel is not None, "attention has run"
    schedules, choice = sequence.schedules, sequence.choice
    if choice is not None:
        case = replace(case, strategy=choice.strategy, options=dict(choice.options))
    sizes = case.sizes_with(sequence.kernel)
    in_process = transport == "in-process"
    local_ranks = case.num_ranks if in_process else int(os.environ.get("LOCAL_WORLD_SIZE", case.num_ranks))
    gpus = 0 if device.type == "cpu" else 1 if in_process else min(local_ranks, torch.cuda.device_count())
    setting = Setting(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        transport=transport,
        kernel=sequence.kernel.name,
        cores=len(os.sched_getaffinity(0)),
        local_ranks=local_ranks,
        devices=gpus,
        torch_version=torch.__version__,
    )
    return Trace(
        case=case,
        setting=setting,
        machine=machine,
        measured=measured_timeline(records, schedules, sizes, machine, copied=in_process),
        predicted=predicted_timeline(schedules, sequence.layout, case.parsed_mask, sizes, machine),
        schedules=schedules,
        reason="" if choice is None else choice.reason,
    )
