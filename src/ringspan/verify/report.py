"""What verification found, as data: for the table, for JSON, for tests."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from ringspan.verify.budget import Budget
from ringspan.verify.case import Case
from ringspan.verify.compare import Error


@dataclass(frozen=True, kw_only=True)
class CaseReport:
    """One configuration and how it fared.

    Attributes:
        case: the configuration.
        status: `exact`, `over` (an error beyond its budget, or bytes that were not promised), `failed` (it broke), or `refused`.
        reason: why it was refused or failed, else empty.
        kernel: the kernel that computed it; `auto` resolved.
        errors: by tensor.
        budgets: by tensor.
        bytes_sent: bytes over each link, as the transport counted them, `{(source, target): bytes}`.
        bytes_promised: the same, as the schedule has them.
        seconds: how long forward and backward took, the first call's planning included.
    """

    case: Case
    status: str
    reason: str
    kernel: str
    errors: dict[str, Error]
    budgets: dict[str, Budget]
    bytes_sent: dict[tuple[int, int], int]
    bytes_promised: dict[tuple[int, int], int]
    seconds: float

    @property
    def counts(self) -> bool:
        """Whether the bytes that were sent are those that the schedule promised, on every link."""
        return self.bytes_sent == self.bytes_promised

    def over(self) -> list[str]:
        """The tensors beyond their budget. NaN is beyond every budget."""
        return [name for name, error in self.errors.items() if not error.relative <= self.budgets[name].limit]

    def strain_of(self, name: str) -> float:
        """The error of a tensor as a part of its budget; infinite where a number is NaN."""
        return _part(self.errors[name].relative, self.budgets[name].limit)

    @property
    def strain(self) -> float:
        """The largest `strain_of` any tensor."""
        return max(map(self.strain_of, self.errors), default=0.0)

    def as_json(self) -> dict[str, Any]:
        """Plain values; an error that is not finite becomes null."""
        return {
            **asdict(self.case),
            "kernel": self.kernel or self.case.kernel,
            "status": self.status,
            "reason": self.reason,
            "errors": {
                name: {
                    "relative": _finite(error.relative),
                    "max_abs": _finite(error.max_abs),
                    "budget": self.budgets[name].limit,
                    "reason": self.budgets[name].reason,
                }
                for name, error in self.errors.items()
            },
            "bytes_sent": sum(self.bytes_sent.values()),
            "bytes_promised": sum(self.bytes_promised.values()),
            "bytes_match": self.counts,
            "seconds": self.seconds,
        }


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """All configurations, and where they ran."""

    device: str
    transport: str
    torch_version: str
    seconds: float
    cases: tuple[CaseReport, ...]

    def of(self, *statuses: str) -> list[CaseReport]:
        """The reports with one of these statuses."""
        return [report for report in self.cases if report.status in statuses]

    @property
    def passed(self) -> bool:
        """Whether something was compared, and all of it was exact."""
        return bool(self.of("exact")) and not self.of("over", "failed")

    def as_json(self) -> dict[str, Any]:
        """Plain values, for `json.dumps`."""
        return {
            "passed": self.passed,
            "device": self.device,
            "transport": self.transport,
            "torch": self.torch_version,
            "seconds": self.seconds,
            "counts": {status: len(self.of(status)) for status in ("exact", "over", "failed", "refused")},
            "cases": [report.as_json() for report in self.cases],
        }


def _part(value: float, limit: float) -> float:
    if math.isnan(value):
        return math.inf
    return value / limit if limit else (math.inf if value else 0.0)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
