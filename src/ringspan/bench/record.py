"""What was measured, as data: samples are kept, and every other number is computed from them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ringspan.bench.case import BACKWARD, EVERYTHING_ON, Setting, Shape
from ringspan.bench.clock import Timing
from ringspan.verify import Budget, Error

PASSES = ("forward", "both")
"""What is timed: the forward alone, and the forward with its backward."""

KINDS = ("ringspan", "one device", "peer")


@dataclass(frozen=True, kw_only=True)
class Record:
    """One solver on one problem.

    Attributes:
        kind: one of `KINDS`.
        name: the strategy, the one-device kernel, or the peer.
        shape: the problem.
        setting: how ringspan was asked; None for the others.
        launch: `eager` or `graph`.
        status: `timed`, `wrong` (and not timed), `failed` (it broke), or `refused`.
        reason: why it was not timed; for a timed one, what is worth knowing about it.
        kernel: what computes; `auto` resolved.
        yardstick: what its results were compared with.
        errors: by tensor.
        budgets: by tensor.
        timings: by pass.
        beside: by pass, the kernel on one device that it was timed in turns with, and that one's samples; empty where it was not.
        share: by pass, the samples of the same kernel for an equal share of the heads over the whole length, taken in the same turns; empty
            where that was not asked for.
        bytes_sent: over all links in one forward and one backward, as the transport counted them; None where it does not.
        bytes_promised: the same, as the schedule has them.
        extra_bytes: by pass, beyond inputs and results, of the rank that held most, `peer_bytes` included.
        peer_bytes: by pass, of peer memory, which a rank holds as long as it runs; that of a backward as long as there are any.
        promised_bytes: by pass, the schedule's figure in its parts, of the rank that holds most.
        joules: by pass, of one call over all ranks; empty where no counter answers.
    """

    kind: str
    name: str
    shape: Shape
    setting: Setting | None = None
    launch: str = "eager"
    status: str = "timed"
    reason: str = ""
    kernel: str = ""
    yardstick: str = ""
    errors: Mapping[str, Error] = field(default_factory=dict)
    budgets: Mapping[str, Budget] = field(default_factory=dict)
    timings: Mapping[str, Timing] = field(default_factory=dict)
    beside: Mapping[str, tuple[str, Timing]] = field(default_factory=dict)
    share: Mapping[str, Timing] = field(default_factory=dict)
    bytes_sent: int | None = None
    bytes_promised: int | None = None
    extra_bytes: Mapping[str, int] = field(default_factory=dict)
    peer_bytes: Mapping[str, int] = field(default_factory=dict)
    promised_bytes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    joules: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_timed(self) -> bool:
        """Whether there are samples."""
        return self.status == "timed"

    def median_ms(self, which: str) -> float:
        """The median sample of a pass."""
        return self.timings[which].median_ms

    def share_ms(self, which: str) -> float:
        """The same as a device's share: for the one-device kernel, its time divided by the number of devices."""
        return self.median_ms(which) / (self.shape.num_ranks if self.kind == "one device" else 1)

    def tflops(self, which: str) -> float:
        """Useful TFLOP/s a device: of the device itself, where one has done it all."""
        flops = self.shape.forward_flops * (1 if which == "forward" else 1 + BACKWARD)
        return flops / self.shape.num_ranks / self.share_ms(which) / 1e9

    @property
    def label(self) -> str:
        """What a reader calls it."""
        if self.kind == "one device":
            return f"one device, {self.name}"
        if self.setting is None:
            return self.name
        parts = [self.setting.strategy, self.setting.layout, self.kernel or self.setting.kernel]
        parts += [self.setting.transport] if self.setting.transport != "auto" else []
        return " ".join(parts) + (f" ({self.setting.note})" if self.setting.note else "")


@dataclass(frozen=True)
class BenchReport:
    """All records, and where they come from.

    Attributes:
        about: commit, hardware, versions, dtype, warm-up and so on.
        records: in the order in which they were made.
        finished: whether that is all: not while a run goes on, nor ever where it was cut off.
    """

    about: Mapping[str, Any]
    records: tuple[Record, ...]
    finished: bool = True

    @property
    def passed(self) -> bool:
        """Whether the run is finished, nothing of ringspan, and no one-device kernel, is wrong or broken, and not all of ringspan was
        refused.

        What peers do is told and not judged.
        """
        asked = [record for record in self.records if record.kind == "ringspan"]
        is_refused = bool(asked) and all(record.status == "refused" for record in asked)
        is_broken = any(record.status in ("wrong", "failed") for record in self.records if record.kind != "peer")
        return self.finished and not is_refused and not is_broken

    def of(self, shape: Shape, kind: str | None = None) -> list[Record]:
        """The records of a problem."""
        return [record for record in self.records if record.shape == shape and kind in (None, record.kind)]

    @property
    def shapes(self) -> list[Shape]:
        """The problems, each once."""
        return list(dict.fromkeys(record.shape for record in self.records))

    def best_one_device(self, shape: Shape, launch: str, which: str) -> Record | None:
        """The fastest kernel on one device, launched in the same way."""
        timed = [record for record in self.of(shape, "one device") if record.is_timed and record.launch == launch]
        return min(timed, key=lambda record: record.median_ms(which), default=None)

    def ratio(self, record: Record, which: str) -> float | None:
        """The best one-device kernel's time over the number of devices, over the time of `record`, both launched in the same way.

        Where they were timed in turns, of those samples alone.
        """
        if which in record.beside:
            return self._in_turns(record, which)
        return self._against(self.best_one_device(record.shape, record.launch, which), record, which)

    @staticmethod
    def ratio_to_share(record: Record, which: str) -> float | None:
        """The time of one device for an equal share of the heads over the time of `record`; None where it was not taken.

        Nothing is sent there and no rank waits for another, and its passes are as long as those over the ranks are meant to be: what
        a longer pass of one device has over shorter ones is not in it.
        """
        return record.share[which].median_ms / record.median_ms(which) if which in record.share else None

    def ratio_to_same_kernel(self, record: Record, which: str) -> float | None:
        """The same against the kernel that `record` itself computes with."""
        if which in record.beside and record.beside[which][0] == record.kernel:
            return self._in_turns(record, which)
        same = [other for other in self.of(record.shape, "one device") if other.is_timed and other.launch == record.launch]
        return self._against(next((other for other in same if other.name == record.kernel), None), record, which)

    def ratios_to_peers(self, record: Record, which: str) -> dict[str, float]:
        """How many times faster than each peer."""
        peers = [other for other in self.of(record.shape, "peer") if other.is_timed]
        return {other.name: other.median_ms(which) / record.median_ms(which) for other in peers} if record.is_timed else {}

    def timed_settings(self, shape: Shape, launch: str) -> list[Record]:
        """Ringspan's records that were timed, ablations left out."""
        timed = [record for record in self.of(shape, "ringspan") if record.is_timed and record.launch == launch]
        return [record for record in timed if record.setting is not None and record.setting.note in ("", EVERYTHING_ON)]

    def auto_to_best(self, shape: Shape, launch: str, which: str) -> float | None:
        """The best setting's time over that of strategy `auto`: 1 where auto is the best. Ablations do not count."""
        timed = self.timed_settings(shape, launch)
        auto = [record.median_ms(which) for record in timed if record.setting is not None and record.setting.strategy == "auto"]
        return min(record.median_ms(which) for record in timed) / min(auto) if auto else None

    @staticmethod
    def _against(baseline: Record | None, record: Record, which: str) -> float | None:
        if baseline is None or not record.is_timed or record.kind == "one device":
            return None
        return baseline.share_ms(which) / record.median_ms(which)

    @staticmethod
    def _in_turns(record: Record, which: str) -> float:
        _, alone = record.beside[which]
        return alone.median_ms / record.shape.num_ranks / record.median_ms(which)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        records = [self._record_json(record) for record in self.records]
        return {"about": dict(self.about), "finished": self.finished, "passed": self.passed, "records": records}

    def _record_json(self, record: Record) -> dict[str, Any]:
        shape = record.shape
        made = {
            "kind": record.kind,
            "name": record.name,
            "label": record.label,
            "status": record.status,
            "reason": record.reason,
            "shape": {**asdict(shape), "length": shape.length, "document_lengths": list(shape.document_lengths)},
            "setting": None if record.setting is None else asdict(record.setting),
            "launch": record.launch,
            "kernel": record.kernel,
            "yardstick": record.yardstick,
            "errors": {
                name: {"relative": _finite(error.relative), "max_abs": _finite(error.max_abs), "budget": record.budgets[name].limit}
                for name, error in record.errors.items()
            },
            "bytes_sent": record.bytes_sent,
            "bytes_promised": record.bytes_promised,
            "extra_bytes": dict(record.extra_bytes),
            "peer_bytes": dict(record.peer_bytes),
            "promised_bytes": {which: dict(parts) for which, parts in record.promised_bytes.items()},
            "joules": dict(record.joules),
            "passes": {},
        }
        for which in record.timings:
            best = self.best_one_device(shape, record.launch, which)
            kernel, alone = record.beside.get(which, (None if best is None else best.name, None))
            made["passes"][which] = {
                "samples_ms": list(record.timings[which].samples_ms),
                "repeats": record.timings[which].repeats,
                "median_ms": record.median_ms(which),
                "rank_medians_ms": list(record.timings[which].rank_medians_ms),
                "tflops_per_device": record.tflops(which),
                "ratio_to_one_device": self.ratio(record, which),
                "one_device_kernel": kernel,
                "one_device_samples_ms": None if alone is None else list(alone.samples_ms),
                "one_device_rank_medians_ms": None if alone is None else list(alone.rank_medians_ms),
                "ratio_to_same_kernel": self.ratio_to_same_kernel(record, which),
                "share_samples_ms": list(record.share[which].samples_ms) if which in record.share else None,
                "ratio_to_share": self.ratio_to_share(record, which),
                "ratio_to_peers": {} if record.kind == "peer" else self.ratios_to_peers(record, which),
            }
        return made


def worst(found: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """For each key the largest value of any rank."""
    result: dict[str, int] = {}
    for each in found:
        for name, value in each.items():
            result[name] = max(result.get(name, 0), value)
    return result


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
