"""What `ringspan bench` prints: a line as each record comes, a table as each problem ends, and what came of it all."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ringspan.bench import PASSES, BenchReport, Record, Shape
from ringspan.bench.markdown import summary

_STYLES = {"wrong": "red", "failed": "red", "refused": "yellow"}


def row(report: BenchReport, record: Record) -> str:
    """One record in a line."""
    where = f"{record.shape.tokens:>7,} a device  {escape(record.label)}, {record.launch}"
    if not record.is_timed:
        style = _STYLES[record.status]
        return f"[{style}]{record.status}[/{style}] {where}: {escape(record.reason)}"
    return f"{where}: " + ", ".join(
        f"{words} {record.share_ms(which):.3f} ms {record.tflops(which):.3g} TFLOP/s{_ratio(report.ratio(record, which), ' ratio ')}"
        for which, words in zip(PASSES, ("forward", "both"), strict=True)
    )


def show_shape(report: BenchReport, shape: Shape, console: Console) -> None:
    """Prints the table of a problem, where something of it was timed."""
    timed = [record for record in report.of(shape) if record.is_timed]
    if not timed:
        return
    console.print(f"\n[bold]{escape(str(shape))}[/bold]")
    console.print(_table(report, shape))
    for launch in dict.fromkeys(record.launch for record in timed):
        for line in summary(report, shape, launch):
            console.print(f"[dim]{escape(line)}[/dim]")
    console.print()


def show_end(report: BenchReport, console: Console) -> None:
    """Prints what was not timed and why, and one line."""
    reasons: dict[tuple[str, str, str], int] = {}
    for record in report.records:
        if not record.is_timed:
            key = (record.status, record.label, record.reason)
            reasons[key] = reasons.get(key, 0) + 1
    for (status, label, reason), count in reasons.items():
        more = f" ({count} times)" if count > 1 else ""
        console.print(f"[{_STYLES[status]}]{status}[/{_STYLES[status]}] {escape(label)}{more}: {escape(reason)}")
    if report.about.get("joules") and not any(record.joules for record in report.records):
        console.print(f"[dim]no joules: {escape(str(report.about['joules']))}[/dim]")
    console.print(_last(report))


def _table(report: BenchReport, shape: Shape) -> Table:
    records = sorted(
        (record for record in report.of(shape) if record.is_timed), key=lambda record: (record.launch, record.share_ms("both"))
    )
    joules = any(record.joules for record in records)
    memory = any(record.extra_bytes for record in records)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    table.add_column("\nwho", overflow="fold")
    table.add_column("\nlaunch")
    for name in ("forward\nms", "\nTFLOP/s", "\nratio", "fwd + bwd\nms", "\nTFLOP/s", "\nratio", "same\nkernel", "best\npeer", "sent\nMiB"):
        table.add_column(name, justify="right", no_wrap=True)
    if memory:
        table.add_column("extra MiB\n(promised)", justify="right", no_wrap=True)
    if joules:
        table.add_column("\nJ", justify="right", no_wrap=True)
    for record in records:
        cells = [escape(record.label), record.launch]
        for which in PASSES:
            cells += [f"{record.share_ms(which):.3f}", f"{record.tflops(which):.3g}", _ratio(report.ratio(record, which))]
        peers = report.ratios_to_peers(record, "both") if record.kind == "ringspan" else {}
        cells += [_ratio(report.ratio_to_same_kernel(record, "both")), _ratio(min(peers.values(), default=None)), _mib(record.bytes_sent)]
        if memory:
            promised = record.promised_bytes.get("both", {}).get("total")
            cells.append(_mib(record.extra_bytes.get("both")) + (f" ({_mib(promised)})" if promised is not None else ""))
        if joules:
            cells.append(f"{record.joules['both']:.3g}" if "both" in record.joules else "")
        table.add_row(*cells)
    return table


def _last(report: BenchReport) -> str:
    ours = [record for record in report.records if record.kind != "peer"]
    timed = sum(record.is_timed for record in ours)
    broken = sum(record.status in ("wrong", "failed") for record in ours)
    verdict = "[green]passed[/green]" if report.passed else "[red]not passed[/red]"
    peers = sum(record.kind == "peer" and record.is_timed for record in report.records)
    return (
        f"{verdict}: {timed} timed after they were found right, {broken} wrong or broken, and {peers} of peers; median of "
        f"{report.about.get('samples')} samples after {report.about.get('warmup')} calls, {report.about.get('num_ranks')} × "
        f"{escape(str(report.about.get('device')))}, {report.about.get('backend')}"
    )


def _ratio(value: float | None, before: str = "") -> str:
    return "" if value is None else f"{before}{value:.2f}"


def _mib(value: int | None) -> str:
    return "" if value is None else f"{value / 2**20:,.1f}"
