"""Runs the grid: inputs, yardstick, one-device kernels, ringspan's settings and the peers, each checked before it is timed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar, cast

import torch

from ringspan.attention.replay import EAGER_CALLS
from ringspan.bench.case import Grid, Setting, Shape, parse_strategy
from ringspan.bench.check import (
    LAW_5,
    PEER,
    TENSORS,
    Yardstick,
    dense_yardstick,
    errors,
    limits,
    probe,
    wrong,
)
from ringspan.bench.clock import SHORTEST_SAMPLE_MS, Clock
from ringspan.bench.energy import Meter, joules
from ringspan.bench.graph import captured
from ringspan.bench.memory import peak_bytes, promises, release, releasing, staged
from ringspan.bench.one_device import capable_kernels, one_device
from ringspan.bench.passes import Passes, open_sequence, passes_of, weights_for, whole_inputs
from ringspan.bench.peers import PEERS, Peer
from ringspan.bench.record import PASSES, Record, worst
from ringspan.bench.together import Broken, Together, first_of, one_line
from ringspan.bench.watch import Watch
from ringspan.errors import RankFailure, RingspanError
from ringspan.kernels import KERNELS
from ringspan.strategies import link_bytes
from ringspan.transport import Transport
from ringspan.verify import Error, Inputs

Outcome = TypeVar("Outcome")


@dataclass(frozen=True)
class Bench:
    """The machine at hand and how it is timed.

    Attributes:
        clock: the device, the ranks, warm-up and samples.
        meter: of energy.
    """

    clock: Clock
    meter: Meter

    @cached_property
    def together(self) -> Together:
        """The clock's ranks."""
        return Together(self.clock.transport)

    def run(self, grid: Grid, watch: Watch | None = None) -> list[Record]:
        """The records of every shape of `grid`, the same on every rank. Collective.

        Args:
            watch: is told each record as it comes, and the end of each shape.

        Raises:
            RankFailure: where a rank is lost.
        """
        records: list[Record] = []
        watch = watch or Watch()
        for shape in grid.shapes():
            _Problem(self, grid, shape, records, watch).run()
            watch.ended(shape, records)
            release(self.clock.device)
        return records


@dataclass
class _Problem:
    """One shape: what all its solvers share, and the records that they leave behind those of the shapes before it."""

    bench: Bench
    grid: Grid
    shape: Shape
    records: list[Record]
    watch: Watch
    yardstick: Yardstick | None = None
    single: dict[str, Mapping[str, Error]] = field(default_factory=dict)
    wrong_alone: set[str] = field(default_factory=set)
    alone: list[int] = field(default_factory=list)
    whole: Inputs | None = None

    @property
    def device(self) -> torch.device:
        return self.bench.clock.device

    @property
    def together(self) -> Together:
        return self.bench.together

    @property
    def _clock(self) -> Clock:
        """The bench's, whose ranks hear of one that fails."""
        return replace(self.bench.clock, transport=cast(Transport, self.together))

    def run(self) -> None:
        """Baselines, settings, peers."""
        try:
            inputs = self.whole = self.inputs()
            self.yardstick = dense_yardstick(self.shape, inputs)
        except torch.OutOfMemoryError as error:
            self.keep(Record(kind="ringspan", name="inputs", shape=self.shape, status="failed", reason=one_line(error)))
            return
        settings = self.grid.settings()
        asked = tuple(dict.fromkeys(setting.kernel for setting in settings))
        launches = tuple(dict.fromkeys(setting.launch for setting in settings))
        for kernel, reason in capable_kernels(self.shape, self.device, asked).items():
            if not reason and kernel in (self.grid.baselines or (kernel,)):
                self._one_device(kernel, inputs, launches)
        for setting in settings:
            self._setting(setting, inputs)
        self._one_device_again(inputs)
        for name in self.grid.peers:
            self._peer(name, PEERS[name], inputs)

    def keep(self, record: Record) -> None:
        """Adds a record, and shows it."""
        self.records.append(record)
        self.watch.came(record, self.records)

    # ---- the three kinds of solvers ----------------------------------------------------------------------------------------------

    def _one_device(self, kernel: str, inputs: Inputs, launches: tuple[str, ...]) -> None:
        record = Record(kind="one device", name=kernel, kernel=kernel, shape=self.shape, launch=launches[0])

        def check() -> tuple[Passes, Record]:
            passes, how = one_device(kernel, self.shape, inputs)
            results = passes.both()
            yardstick, off = self.yardstick, 0.0
            if yardstick is None:
                yardstick = Yardstick(kernel, dict(zip(TENSORS, results, strict=True)))
            if not yardstick.is_exact:
                off = probe(self.shape, inputs, results[0])
            # Every rank computes all of it, and what rank 0 finds counts: kernels that add in no fixed order differ in the last digits.
            found, off = self.together.gather_objects((errors(results, yardstick, passes.mine, None), off))[0]
            allowed = limits(self.shape, yardstick, found, LAW_5)
            problem = wrong(found, allowed)
            if not problem and not off <= allowed["out"].limit:
                problem = f"some rows of out err by {off:.1e} against float64, of at most {allowed['out'].limit:.1e}"
            made = replace(record, yardstick=yardstick.kind, errors=found, budgets=allowed, reason=how)
            if problem:
                self.wrong_alone.add(kernel)
                return passes, replace(made, status="wrong", reason=problem)
            # The fastest comes first: where no float64 is affordable, others are compared with it.
            self.yardstick, self.single[kernel] = yardstick, found
            return passes, made

        with releasing(self.device):
            outcome = self._attempt(record, check)
            if outcome is None:
                return
            passes, checked = outcome
            for launch in launches if checked.is_timed else ():
                if self._timed(replace(checked, launch=launch), passes) is not None:
                    self.alone.append(len(self.records) - 1)
            if not checked.is_timed:
                self.keep(checked)

    def _one_device_again(self, inputs: Inputs) -> None:
        """The other half of the samples of those that nothing was timed in turns with, after all that they are compared with.

        A device that has grown warm is slower by some hundredths.
        """
        for place in self.alone:
            record = self.records[place]
            short = [which for which in PASSES if len(record.timings[which].samples_ms) < self.bench.clock.samples]
            if not short:
                continue
            with releasing(self.device):

                def measure(record: Record = record, short: list[str] = short) -> Record:
                    passes, _ = one_device(record.kernel, self.shape, inputs)
                    timings = dict(record.timings)
                    for which in short:
                        work = getattr(passes, which)
                        work = captured(work) if record.launch == "graph" else work
                        timings[which] = timings[which].with_more(self._clock.half.time(work))
                    return replace(record, timings=timings)

                if (made := self._attempt(record, measure)) is not None:
                    self.records[place] = made
                    self.watch.timed_again(self.records)

    def _setting(self, setting: Setting, inputs: Inputs) -> None:
        record = Record(kind="ringspan", name=setting.strategy, shape=self.shape, setting=setting, launch=setting.launch)
        transport = self.bench.clock.transport

        def check() -> tuple[Passes, Record]:
            weights = weights_for(setting, [self.records[place] for place in self.alone])
            sequence = open_sequence(setting, self.shape, weights)
            passes = passes_of(lambda q, k, v: sequence.attention(q, k, v), inputs, sequence.shard)
            # By itself it takes no peer memory for a backward.
            passes.forward()
            peer_bytes = {"forward": sequence.peer_bytes}
            for _ in range(EAGER_CALLS + 1 if setting.launch == "replay" else 0):
                # What is checked then is a replay.
                passes.both()
            before = Counter(sequence.context.transport.bytes_sent)
            results = passes.both()
            assert sequence.kernel is not None
            sent = sum((Counter(sequence.context.transport.bytes_sent) - before).values())
            schedules, layout, context = sequence.schedules, sequence.layout, sequence.context
            # Ring Self-Attention computes its tiles itself, and rounds nothing on the way.
            materialised = "ring_self_attention" in (context.strategy, context.options.get("inner"))
            sizes = self.shape.sizes_with(None if materialised else sequence.kernel)
            promised = sum(sum(link_bytes(schedules, layout, sizes, direction).values()) for direction in ("forward", "backward"))
            at_once = staged(sizes, parse_strategy(setting.strategy)[1].get("kv_heads_per_stage"))
            gathered = self.together.gather_objects((sent, promises(schedules, layout, sizes, at_once, transport.rank)))
            chosen = f"{sequence.choice.strategy}: {sequence.choice.reason}" if sequence.choice is not None else ""
            made = replace(
                record,
                kernel=sequence.kernel.name,
                reason="; ".join(each for each in (chosen, f"weights {weights}" if weights else "") if each),
                bytes_sent=sum(each[0] for each in gathered),
                bytes_promised=promised,
                peer_bytes={**peer_bytes, "both": sequence.peer_bytes},
                promised_bytes={which: max((each[1][which] for each in gathered), key=lambda parts: parts["total"]) for which in PASSES},
            )
            return passes, self._judged(made, results, passes, LAW_5)

        self._check_and_time(record, check)

    def _peer(self, name: str, peer: Peer, inputs: Inputs) -> None:
        record = Record(kind="peer", name=name, shape=self.shape)
        reason = first_of(self.together.gather_objects(peer.refusal(self.shape, self.device)))
        if reason:
            self.keep(replace(record, status="refused", reason=reason))
            return

        def check() -> tuple[Passes, Record]:
            passes = stack.enter_context(peer.open(self.shape, inputs, self.bench.clock.transport))
            return passes, self._judged(replace(record, kernel=peer.kernel(self.device)), passes.both(), passes, PEER)

        with ExitStack() as stack:
            self._check_and_time(record, check)

    # ---- checking and timing -----------------------------------------------------------------------------------------------------

    def _judged(self, record: Record, results: tuple[torch.Tensor, ...], passes: Passes, allowance: float) -> Record:
        """`record` with its errors, `wrong` where one is over its budget or bytes are not those of the schedule. Collective."""
        if self.yardstick is None:
            return replace(record, status="wrong", reason="there is nothing to compare with: no kernel on one device is right")
        found = errors(results, self.yardstick, passes.mine, self.together)
        single = self._single(record.kernel) or next(iter(self.single.values()), found)
        allowed = limits(self.shape, self.yardstick, single, allowance)
        problem = wrong(found, allowed)
        if not problem and record.bytes_promised is not None and record.bytes_sent != record.bytes_promised:
            problem = f"{record.bytes_sent} bytes were sent, {record.bytes_promised} are in the schedule"
        made = replace(record, errors=found, budgets=allowed, yardstick=self.yardstick.kind)
        return replace(made, status="wrong", reason=problem) if problem else made

    def _single(self, kernel: str) -> Mapping[str, Error] | None:
        """The errors of `kernel` on one device; None where it is not known or nothing exact is there to compare with. Collective."""
        assert self.yardstick is not None
        if kernel in KERNELS and kernel not in {*self.single, *self.wrong_alone} and self.yardstick.is_exact:
            passes, _ = one_device(kernel, self.shape, self.inputs())
            self.single[kernel] = self.together.gather_objects(errors(passes.both(), self.yardstick, passes.mine, None))[0]
        return self.single.get(kernel)

    def inputs(self) -> Inputs:
        """The same at every call."""
        return whole_inputs(self.shape, self.device)

    def _check_and_time(self, record: Record, check: Callable[[], tuple[Passes, Record]]) -> None:
        with releasing(self.device):
            outcome = self._attempt(record, check)
            if outcome is None:
                return
            passes, checked = outcome
            if checked.is_timed:
                self._timed(checked, passes)
            else:
                self.keep(checked)

    def _attempt(self, record: Record, work: Callable[[], Outcome]) -> Outcome | None:
        """The outcome of `work`, or None where any rank failed: a record that says so is then kept. Collective.

        Raises:
            RankFailure: where a rank is lost; it says at what, and what this rank met before.
        """
        met = ""
        try:
            try:
                outcome = work()
                self.together.gather_objects(None)
                return outcome
            except (Broken, RankFailure):
                raise
            except Exception as error:
                met = str(error) if isinstance(error, RingspanError) else one_line(error)
                # A device that an error has broken takes part in nothing any more, and not in this.
                raise self.together.fail("refused" if isinstance(error, RingspanError) else "failed", met) from error
        except Broken as ended:
            self.keep(replace(record, status=ended.status, reason=ended.reason))
            return None
        except RankFailure as failure:
            during = f"{record.label}, {record.launch}, {self.shape.tokens:,} tokens a device, {self.shape.mask_text}"
            found = f"{met}; then {failure.found}" if met else failure.found
            raise RankFailure(f"while measuring {during}: {failure.asked}", found, failure.rule, failure.nearest) from failure

    def _timed(self, record: Record, passes: Passes) -> Record | None:
        """Captures where that is asked for, times both passes, weighs memory and energy, and keeps the record. Collective."""
        clock = self._clock.half if record.kind == "one device" else self._clock

        def measure() -> Record:
            made = record
            # Both first: a graph that computes something else is found before anything is timed. One graph at a time holds memory.
            for which in reversed(PASSES):
                work = getattr(passes, which)
                size = peak_bytes(work, clock.device)
                extra = {} if size is None else {which: size + record.peer_bytes.get(which, 0)}
                if record.launch == "graph":
                    work = captured(work)
                    if which == "both" and not (checked := self._replayed(record, work, passes)).is_timed:
                        return checked
                made = self._sampled(made, which, work, clock)
                spent = joules(self.bench.meter, clock, work, made.median_ms(which))
                made = replace(
                    made,
                    joules=made.joules if spent is None else {which: spent, **made.joules},
                    extra_bytes={**worst(self.together.gather_objects(extra)), **made.extra_bytes},
                )
                del work
                release(clock.device)
            return made

        if (made := self._attempt(record, measure)) is not None:
            self.keep(made)
        return made if made is not None and made.is_timed else None

    def _sampled(self, record: Record, which: str, work: Callable[[], object], clock: Clock) -> Record:
        """`record` with the samples of one pass, in turns with the fastest kernel on one device where it is ringspan's. Collective."""
        launched = [place for place in self.alone if self.records[place].launch == record.launch]
        fastest = min(launched, key=lambda place: self.records[place].median_ms(which), default=None)
        beside = None if fastest is None or record.kind != "ringspan" else self._alone(self.records[fastest], which)
        if fastest is None or beside is None:
            # A peer's sample lasts as long as those that it is compared with.
            alone_ms = [self.records[place].median_ms(which) for place in self.alone if record.kind != "one device"]
            return replace(record, timings={which: clock.time(work, min(alone_ms, default=SHORTEST_SAMPLE_MS)), **record.timings})
        share = self._alone(self.records[fastest], which, self.shape.num_ranks) if self.grid.share else None
        timing, other, *of_share = clock.in_turns(work, beside, *([] if share is None else [share]))
        alone = self.records[fastest]
        self.records[fastest] = replace(alone, timings={**alone.timings, which: alone.timings[which].with_more(other)})
        self.watch.timed_again(self.records)
        return replace(
            record,
            timings={which: timing, **record.timings},
            beside={which: (alone.kernel, other), **record.beside},
            share={**record.share, **({which: of_share[0]} if of_share else {})},
        )

    def _alone(self, record: Record, which: str, parts: int = 1) -> Callable[[], object] | None:
        """What a record of one device timed, or None where a rank lacks the memory for it beside what is timed now. Collective.

        Args:
            parts: of as many equal parts of the heads the first.
        """
        try:
            whole = cast(Inputs, self.whole)
            shape = replace(self.shape, heads=self.shape.heads // parts, kv_heads=self.shape.kv_heads // parts)
            part = Inputs(*(each[:, :, : each.shape[2] // parts] for each in (whole.q, whole.k, whole.v, whole.dout)))
            passes, _ = one_device(record.kernel, shape, part)
            call = getattr(passes, which)
            made = captured(call) if record.launch == "graph" else call
            made()
            work: Callable[[], object] | None = made
        except torch.OutOfMemoryError:
            work = None
        return work if all(self.together.gather_objects(work is not None)) else None

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
