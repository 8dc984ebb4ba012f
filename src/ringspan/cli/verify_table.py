"""What `ringspan verify` prints: errors beside their budgets, why the budgets are what they are, what was refused, and one line."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ringspan.verify import TENSORS, CaseReport, VerifyReport

_MOST_ROWS = 30
_ROWS: tuple[Callable[[CaseReport], Hashable], ...] = (
    lambda entry: entry.case,
    lambda entry: (entry.case.strategy, entry.case.layout, entry.case.mask, entry.case.dtype, entry.kernel),
    lambda entry: (entry.case.strategy, entry.case.dtype, entry.kernel),
    lambda entry: (entry.case.dtype, entry.kernel),
)
"""What shares a row, from the finest to the coarsest: the first that gives at most `_MOST_ROWS` rows is taken."""


def show(report: VerifyReport, console: Console, combinations: int) -> None:
    """Prints `report`, which is of so many combinations or of an even choice of them. Nothing where all were refused."""
    if not report.of("exact", "over", "failed"):
        return
    compared = report.of("exact", "over")
    if compared:
        console.print(_table(compared, wide=console.width >= 100))
        console.print("[dim]Relative errors against float64 dense attention, the worst of each row, and below each its budget:")
        for line in _reasons(compared):
            console.print(f"[dim]  {line}[/dim]")
    for status, style in (("failed", "red"), ("refused", "yellow")):
        by_reason: dict[str, list[CaseReport]] = defaultdict(list)
        for entry in report.of(status):
            by_reason[entry.reason].append(entry)
        for reason, entries in by_reason.items():
            more = f" and {len(entries) - 1} more" if len(entries) > 1 else ""
            console.print(f"[{style}]{status}[/{style}] {escape(str(entries[0].case))}{more}: {escape(reason)}")
    for entry in report.of("over")[:5]:
        console.print(f"[red]over[/red] {escape(str(entry.case))}: {_excess(entry)}")
    if len(report.cases) < combinations:
        console.print(f"[dim]{len(report.cases)} of {combinations} combinations, evenly chosen; --most 0 verifies all[/dim]")
    console.print(_summary(report))


def _table(compared: list[CaseReport], *, wide: bool) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    for names in ("strategy\n[dim]layout, mask[/dim]", "dtype\n[dim]kernel[/dim]", "ranks\n[dim]length[/dim]"):
        table.add_column(names)
    for name in TENSORS:
        table.add_column(name, justify="right", no_wrap=True)
    if wide:
        table.add_column("max |Δ|", justify="right", no_wrap=True)
    table.add_column("\n[dim]bytes sent[/dim]", no_wrap=True)
    for entries in _rows(compared):
        table.add_row(*_row(entries, wide=wide))
    return table


def _rows(compared: list[CaseReport]) -> list[list[CaseReport]]:
    rows: dict[Hashable, list[CaseReport]] = {}
    for key in _ROWS:
        rows = defaultdict(list)
        for entry in compared:
            rows[key(entry)].append(entry)
        if len(rows) <= _MOST_ROWS:
            break
    return list(rows.values())


def _row(entries: list[CaseReport], *, wide: bool) -> list[str]:
    cases = [entry.case for entry in entries]
    layouts, masks = _some((case.layout for case in cases), "layouts"), _some((case.mask for case in cases), "masks")
    cells = [
        f"{_some((case.strategy for case in cases), 'strategies')}\n[dim]{layouts}, {masks}[/dim]",
        f"{cases[0].dtype}\n[dim]{entries[0].kernel}[/dim]",
        f"{_range({case.num_ranks for case in cases})}\n[dim]{_range({case.length for case in cases})}[/dim]",
    ]
    for name in TENSORS:
        worst = max(entries, key=lambda entry: entry.strain_of(name))
        error = _short(worst.errors[name].relative)
        cells.append(f"{f'[red]{error}[/red]' if name in worst.over() else error}\n[dim]{_short(worst.budgets[name].limit)}[/dim]")
    if wide:
        cells.append(_short(max(error.max_abs for entry in entries for error in entry.errors.values())))
    exact = all(entry.status == "exact" for entry in entries)
    sent = _bytes(sum(sum(entry.bytes_sent.values()) for entry in entries))
    as_planned = all(entry.counts for entry in entries)
    verdict = "[green]exact[/green]" if exact else "[red]over[/red]"
    return [*cells, f"{verdict}\n" + (f"[dim]{sent}[/dim]" if as_planned else f"[red]{sent}, not as planned[/red]")]


def _reasons(compared: list[CaseReport]) -> list[str]:
    """Each reason for a budget once, with the largest budget that it gave."""
    limits: dict[tuple[str, str], float] = defaultdict(float)
    for entry in compared:
        for budget in entry.budgets.values():
            key = (entry.case.dtype, budget.reason)
            limits[key] = max(limits[key], budget.limit)
    return [f"{dtype}, up to {_short(limit)}: {escape(reason)}" for (dtype, reason), limit in limits.items()]


def _excess(entry: CaseReport) -> str:
    what = [f"{name} errs by {_short(entry.errors[name].relative)}, budget {_short(entry.budgets[name].limit)}" for name in entry.over()]
    if not entry.counts:
        what.append(f"{sum(entry.bytes_sent.values())} bytes sent, {sum(entry.bytes_promised.values())} in the schedule")
    return "; ".join(what)


def _summary(report: VerifyReport) -> str:
    compared = report.of("exact", "over")
    where = f"on {report.device} with {report.transport} ranks, torch {report.torch_version}, {report.seconds:.1f} s"
    parts = [f"{len(report.of('exact'))} of {len(compared) + len(report.of('failed'))} configurations are exact {where}"]
    if compared:
        worst = max(compared, key=lambda entry: entry.strain)
        name = max(TENSORS, key=worst.strain_of)
        parts.append(f"worst: {name} at {worst.strain:.2g} of its budget ({escape(str(worst.case))})")
        miscounted = sum(not entry.counts for entry in compared)
        parts.append(f"bytes sent differ from the schedule's in {miscounted}" if miscounted else "every byte sent is in the schedule")
    if refused := len(report.of("refused")):
        parts.append(f"{refused} refused")
    return f"{'[green]passed[/green]' if report.passed else '[red]not passed[/red]'}: {'; '.join(parts)}"


def _some(names: Iterable[str], many: str) -> str:
    distinct = list(dict.fromkeys(names))
    return escape(distinct[0]) if len(distinct) == 1 else f"{len(distinct)} {many}"


def _range(numbers: set[int]) -> str:
    return ",".join(map(str, sorted(numbers))) if len(numbers) <= 3 else f"{min(numbers)}…{max(numbers)}"


def _short(value: float) -> str:
    """`2.1e-7`: two digits, without the exponent's leading zero."""
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
