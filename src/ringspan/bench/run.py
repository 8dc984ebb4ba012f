"""Runs the grid: inputs, yardstick, one-device kernels, ringspan's settings and the peers, each checked before it is timed."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ringspan.bench.case import Grid, Setting, Shape
from ringspan.bench.check import (
    LAW_5,
    Yardstick,
    dense_yardstick,
    errors,
    limits,
    probe,
    wrong,
)
from ringspan.bench.check import (
    PEERS as PEERS_MAY,
)
from ringspan.bench.clock import Clock
from ringspan.bench.energy import Meter, joules
from ringspan.bench.graph import captured
from ringspan.bench.memory import peak_bytes, promise
from ringspan.bench.one_device import capable_kernels, one_device
from ringspan.bench.passes import Passes, open_sequence, passes_of, whole_inputs
from ringspan.bench.peers import PEERS, Peer
from ringspan.bench.record import PASSES, Record, worst
from ringspan.errors import RankFailure, RingspanError
from ringspan.kernels import select_kernel
from ringspan.strategies import link_bytes
from ringspan.verify import Error, Inputs

Watch = Callable[[Record], None]


@dataclass(frozen=True)
class Bench:
    """The machine at hand and how it is timed.

    Attributes:
        clock: the device, the ranks, warm-up and samples.
        meter: of energy.
    """

    clock: Clock
    meter: Meter

    def run(self, grid: Grid, watch: Watch = lambda record: None) -> list[Record]:
        """The records of every shape of `grid`, the same on every rank. Collective.

        Args:
            watch: is told each record as it comes, on every rank.

        Raises:
            RankFailure: where a rank is lost.
        """
        found = []

        def keep(record: Record) -> None:
            found.append(record)
            watch(record)

        for shape in grid.shapes():
            _Problem(self, grid, shape, keep).run()
            release(self.clock.device)
        return found


@dataclass
class _Problem:
    """One shape: what all its solvers share, and the records that they leave."""

    bench: Bench
    grid: Grid
    shape: Shape
    keep: Watch
    yardstick: Yardstick | None = None
    single: dict[str, Mapping[str, Error]] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.bench.clock.device

    def run(self) -> None:
        """Baselines, settings, peers."""
        try:
            inputs = whole_inputs(self.shape, self.device)
            self.yardstick = dense_yardstick(self.shape, inputs)
        except torch.OutOfMemoryError as error:
            self.keep(Record(kind="ringspan", name="inputs", shape=self.shape, status="failed", reason=_words(error)))
            return
        settings = self.grid.settings()
        asked = tuple(dict.fromkeys(setting.kernel for setting in settings))
        launches = tuple(dict.fromkeys(setting.launch for setting in settings))
        for kernel, reason in capable_kernels(self.shape, self.device, asked).items():
            if not reason:
                self._one_device(kernel, inputs, launches)
        for setting in settings:
            self._setting(setting, inputs)
        for name in self.grid.peers:
            self._peer(name, PEERS[name], inputs)

    # ---- the three kinds of solvers ----------------------------------------------------------------------------------------------

    def _one_device(self, kernel: str, inputs: Inputs, launches: tuple[str, ...]) -> None:
        record = Record(kind="one device", name=kernel, kernel=kernel, shape=self.shape, launch=launches[0])

        def check() -> tuple[Passes, Record]:
            passes, how = one_device(kernel, self.shape, inputs)
            results = passes.both()
            off = probe(self.shape, inputs, results[0])
            if self.yardstick is None:
                # The fastest comes first; its rows have just been probed, and others are compared with all of it.
                names = ("out", "dq", "dk", "dv")
                self.yardstick = Yardstick(kernel, {name: result.detach() for name, result in zip(names, results, strict=True)})
            found = errors(results, self.yardstick, passes.mine, None)
            self.single[kernel] = found
            allowed = limits(self.shape, self.yardstick, found, LAW_5)
            problem = wrong(found, allowed)
            if not off <= allowed["out"].limit:
                problem = problem or f"some rows of out err by {off:.1e} against float64, budget {allowed['out'].limit:.1e}"
                if self.yardstick.kind == kernel:
                    self.yardstick = None
            made = replace(record, yardstick=self.yardstick.kind if self.yardstick else "", errors=found, budgets=allowed, reason=how)
            if problem:
                del self.single[kernel]
            return passes, replace(made, status="wrong", reason=problem) if problem else made

        with _releasing(self.device):
            outcome = self._attempt(record, check)
            if outcome is None:
                return
            passes, checked = outcome
            for launch in launches if checked.is_timed else ():
                self._timed(replace(checked, launch=launch), passes)
            if not checked.is_timed:
                self.keep(checked)

    def _setting(self, setting: Setting, inputs: Inputs) -> None:
        record = Record(kind="ringspan", name=setting.strategy, shape=self.shape, setting=setting, launch=setting.launch)
        transport = self.bench.clock.transport

        def check() -> tuple[Passes, Record]:
            sequence = open_sequence(setting, self.shape)
            passes = passes_of(lambda q, k, v: sequence.attention(q, k, v), inputs, sequence.shard)
            kernel = select_kernel(setting.kernel, self.shape.problem(self.device)).name
            before = Counter(sequence.context.transport.bytes_sent)
            results = passes.both()
            sent = sum((Counter(sequence.context.transport.bytes_sent) - before).values())
            schedules, layout, sizes = sequence.schedules, sequence.layout, self.shape.sizes
            promised = sum(sum(link_bytes(schedules, layout, sizes, direction).values()) for direction in ("forward", "backward"))
            forward, backward = (promise(schedules, layout, sizes, transport.rank, direction) for direction in ("forward", "backward"))
            # Out is a result; the lse that the backward needs is held beside it.
            lse = layout.shard_length(transport.rank) * sizes.batch * sizes.heads * sizes.accumulator_bytes
            both = max(forward, backward, key=lambda each: each.total)
            gathered = transport.gather_objects(
                (sent, {**forward.as_json()}, {**both.as_json(), "lse": lse, "total": both.total + lse}, sequence.choice)
            )
            reason = f"{sequence.choice.strategy}: {sequence.choice.reason}" if sequence.choice is not None else ""
            made = replace(
                record,
                kernel=kernel,
                reason=reason,
                bytes_sent=sum(each[0] for each in gathered),
                bytes_promised=promised,
                promised_bytes={
                    "forward": max((each[1] for each in gathered), key=lambda parts: parts["total"]),
                    "both": max((each[2] for each in gathered), key=lambda parts: parts["total"]),
                },
            )
            return passes, self._judged(made, results, passes, LAW_5)

        self._check_and_time(record, check)

    def _peer(self, name: str, peer: Peer, inputs: Inputs) -> None:
        record = Record(kind="peer", name=name, shape=self.shape)
        reason = _first(self.bench.clock.transport.gather_objects(peer.refusal(self.shape, self.device)))
        if reason:
            self.keep(replace(record, status="refused", reason=reason))
            return

        def check() -> tuple[Passes, Record]:
            passes = stack.enter_context(peer.open(self.shape, inputs, self.bench.clock.transport))
            return passes, self._judged(replace(record, kernel=peer.kernel(self.device)), passes.both(), passes, PEERS_MAY)

        with ExitStack() as stack:
            self._check_and_time(record, check)

    # ---- checking and timing -----------------------------------------------------------------------------------------------------

    def _judged(self, record: Record, results: tuple[torch.Tensor, ...], passes: Passes, allowance: float) -> Record:
        """`record` with its errors, `wrong` where one is over its budget or bytes are not those of the schedule. Collective."""
        if self.yardstick is None:
            return replace(record, status="wrong", reason="there is nothing to compare with: no kernel on one device is right")
        found = errors(results, self.yardstick, passes.mine, self.bench.clock.transport)
        single = self.single.get(record.kernel) or next(iter(self.single.values()), found)
        allowed = limits(self.shape, self.yardstick, single, allowance)
        problem = wrong(found, allowed)
        if not problem and record.bytes_promised is not None and record.bytes_sent != record.bytes_promised:
            problem = f"{record.bytes_sent} bytes were sent, {record.bytes_promised} are in the schedule"
        made = replace(record, errors=found, budgets=allowed, yardstick=self.yardstick.kind)
        return replace(made, status="wrong", reason=problem) if problem else made

    def _check_and_time(self, record: Record, check: Callable[[], tuple[Passes, Record]]) -> None:
        with _releasing(self.device):
            outcome = self._attempt(record, check)
            if outcome is None:
                return
            passes, checked = outcome
            if checked.is_timed:
                self._timed(checked, passes)
            else:
                self.keep(checked)

    def _attempt(self, record: Record, work: Callable[[], Any]) -> Any:
        """The outcome of `work`, or None where any rank failed: a record that says so is then kept. Collective."""
        outcome, status, reason = None, "", ""
        try:
            outcome = work()
        except RankFailure:
            raise
        except RingspanError as error:
            status, reason = "refused", str(error)
        except Exception as error:
            status, reason = "failed", _words(error)
        said = self.bench.clock.transport.gather_objects((status, reason))
        broken = [(other, f"rank {rank}: {why}" if status != other else why) for rank, (other, why) in enumerate(said) if other]
        if not broken:
            return outcome
        self.keep(replace(record, status=broken[0][0], reason=broken[0][1], timings={}))
        return None

    def _timed(self, record: Record, passes: Passes) -> None:
        """Captures where that is asked for, times both passes, weighs memory and energy, and keeps the record. Collective."""
        clock = self.bench.clock

        def measure() -> Record:
            extra = {which: peak_bytes(getattr(passes, which), clock.device) for which in PASSES}
            works = {which: getattr(passes, which) for which in PASSES}
            if record.launch == "graph":
                works = {which: captured(work) for which, work in works.items()}
                checked = self._replayed(record, works["both"], passes)
                if not checked.is_timed:
                    return checked
            timings = {which: clock.time(work) for which, work in works.items()}
            made = replace(record, timings=timings)
            spent = {which: joules(self.bench.meter, clock, work, made.median_ms(which)) for which, work in works.items()}
            by_rank = clock.transport.gather_objects({which: size for which, size in extra.items() if size is not None})
            return replace(made, joules={which: value for which, value in spent.items() if value is not None}, extra_bytes=worst(by_rank))

        outcome = self._attempt(record, measure)
        if outcome is not None:
            self.keep(outcome)

    def _replayed(self, record: Record, replay: Callable[[], tuple[torch.Tensor, ...]], passes: Passes) -> Record:
        """What a graph computes is compared again: it reads other memory than the eager call did."""
        for tensor in replay():
            tensor.fill_(float("nan"))
        results = replay()
        if record.kind != "one device":
            return self._judged(record, results, passes, LAW_5)
        if self.yardstick is None:
            return replace(record, status="wrong", reason="there is nothing to compare with: no kernel on one device is right")
        problem = wrong(errors(results, self.yardstick, passes.mine, None), record.budgets)
        return replace(record, status="wrong", reason=f"replayed as a graph, {problem}") if problem else record


def release(device: torch.device) -> None:
    """Gives memory back that the allocator keeps, graphs' pools included."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def _releasing(device: torch.device) -> Iterator[None]:
    try:
        yield
    finally:
        release(device)


def _first(reasons: list[str]) -> str:
    return next((reason for reason in reasons if reason), "")


def _words(error: BaseException) -> str:
    """One line of an error."""
    first = str(error).strip().splitlines()
    return f"{type(error).__name__}: {first[0] if first else ''}"[:400]
