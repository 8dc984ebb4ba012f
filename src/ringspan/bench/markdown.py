"""The report as Markdown: what ran, on what, and a table for each problem."""

from __future__ import annotations

from ringspan.bench.case import EVERYTHING_ON, Shape
from ringspan.bench.record import PASSES, BenchReport, Record

_HEAD = (
    "| who | launch | forward ms | TFLOP/s | ratio | same kernel | fwd + bwd ms | TFLOP/s | ratio | same kernel | extra MiB (schedule) "
    "| sent MiB | J |"
)


def markdown(report: BenchReport, title: str = "ringspan bench") -> str:
    """Tables of every problem, with what was refused and why."""
    about = report.about
    versions = ", ".join(f"{name} {version}" for name, version in about.get("versions", {}).items())
    lines = [
        f"# {title}",
        "",
        f"{about.get('date', '')}, commit `{about.get('commit', '')}`: {about.get('num_ranks')} × {about.get('device')}, "
        f"{about.get('backend')}; {versions}. Median of {about.get('samples')} samples after {about.get('warmup')} calls of warm-up; "
        "the slowest rank counts; ringspan's and those of the fastest kernel on one device are taken in turns, and a ratio is of those; "
        "what takes less time is repeated within a sample until it lasts as long. "
        "TFLOP/s a device count the pairs that the mask allows, the backward as 2.5 forwards. The ratio is to the fastest kernel on one "
        "device over the same whole sequence, its time divided by the number of devices, launched in the same way. "
        "Peers are launched as they are, eagerly.",
    ]
    if not report.finished:
        lines += ["", "**Not finished**: what there was when this was written. The run still goes on, or was cut off."]
    for shape in report.shapes:
        lines += ["", *shape_table(report, shape)]
    return "\n".join(lines) + "\n"


def shape_table(report: BenchReport, shape: Shape) -> list[str]:
    """One problem: who was timed, the fastest forward + backward first, then who was not."""
    records = report.of(shape)
    timed = sorted((record for record in records if record.is_timed), key=lambda record: (record.launch, record.share_ms("both")))
    lines = [f"## {shape}", ""]
    if shape.document_lengths:
        lengths = shape.document_lengths
        lines += [f"{len(lengths)} documents of {min(lengths)} to {max(lengths)} tokens.", ""]
    if timed:
        lines += [_HEAD, "|" + "---|" * 13]
        lines += [_row(report, record) for record in timed]
    for launch in dict.fromkeys(record.launch for record in timed):
        lines += ["", *(f"- {line}" for line in summary(report, shape, launch))]
    lines += _ablation(report, shape)
    others = [record for record in records if not record.is_timed]
    if others:
        lines += ["", "Not timed:", ""]
        lines += [f"- {record.label}, {record.launch}: {record.status}: {record.reason}" for record in others]
    return lines


def _ablation(report: BenchReport, shape: Shape) -> list[str]:
    """What each thing that was taken away costs, beside one device that does it all alone."""
    ours = [(record.setting.note, record) for record in report.of(shape, "ringspan") if record.is_timed and record.setting is not None]
    whole = next((record for note, record in ours if note == EVERYTHING_ON), None)
    if whole is None:
        return []
    rows = [(note, {which: record.median_ms(which) for which in PASSES}) for note, record in ours if note]
    alone = {which: report.best_one_device(shape, whole.launch, which) for which in PASSES}
    rows.append(("no ring: one device over the whole", {which: best.median_ms(which) for which, best in alone.items() if best}))
    lines = ["", "| taken away | forward ms | × | fwd + bwd ms | × |", "|---|---|---|---|---|"]
    for words, times in rows:
        cells = [f"{times[which]:.3f} | {times[which] / whole.median_ms(which):.2f}" for which in PASSES if which in times]
        lines.append(f"| {words} | {' | '.join(cells)} |")
    return lines


def _row(report: BenchReport, record: Record) -> str:
    cells = [record.label, record.launch]
    for which in PASSES:
        cells += [f"{record.share_ms(which):.3f}", f"{record.tflops(which):.3g}"]
        cells += [_ratio(report.ratio(record, which)), _ratio(report.ratio_to_same_kernel(record, which))]
    extra, promised = record.extra_bytes.get("both"), record.promised_bytes.get("both", {}).get("total")
    cells.append(" ".join([_mib(extra), f"({_mib(promised)})" if promised is not None else ""]).strip())
    cells.append(_mib(record.bytes_sent))
    cells.append(f"{record.joules['both']:.3g}" if "both" in record.joules else "")
    return "| " + " | ".join(cells) + " |"


def summary(report: BenchReport, shape: Shape, launch: str) -> list[str]:
    """A sentence a pass: which kernel won on one device, how far ahead of the peers ringspan is, and whether auto was right."""
    lines = []
    for which, words in zip(PASSES, ("forward", "forward + backward"), strict=True):
        best = report.best_one_device(shape, launch, which)
        fastest = min(report.timed_settings(shape, launch), key=lambda record: record.median_ms(which), default=None)
        said = [f"{words}, {launch}: on one device {best.name} is the fastest" if best else f"{words}, {launch}"]
        if fastest is not None:
            said.append(f"over the ranks {fastest.label}")
            if (ratio := report.ratio_to_share(fastest, which)) is not None:
                said.append(f"{ratio:.3f} of one device with its share of the heads alone, {fastest.share[which].median_ms:.3f} ms")
            peers = report.ratios_to_peers(fastest, which)
            if peers:
                name = min(peers, key=lambda peer: peers[peer])
                said.append(f"{peers[name]:.2f} times as fast as the best peer, {name}")
        auto = report.auto_to_best(shape, launch, which)
        if auto is not None:
            said.append(f"auto reaches {auto:.2f} of the best setting")
        lines.append(f"{'; '.join(said)}.")
    return lines


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _mib(value: int | None) -> str:
    return "" if value is None else f"{value / 2**20:,.1f}"
