"""Speed over length as a picture: a line for each setting, each peer and the one-device kernel, as a paper would print it."""

from __future__ import annotations

from pathlib import Path

from ringspan.bench import PASSES, BenchReport, Record

# Okabe and Ito: told apart by the colour-blind, and by their markers in print.
_OURS = ("#0072B2", "#009E73", "#56B4E9", "#CC79A7", "#004D73", "#7A7A7A")
_PEERS = ("#D55E00", "#E69F00", "#F0C040", "#A0522D", "#B8860B", "#8B4513", "#CD853F")
_MARKERS = "osD^vPX<>"
_WORDS = {"forward": "forward", "both": "forward + backward"}

Lines = dict[str, list[tuple[int, float]]]


def draw_speed_curve(report: BenchReport, path: Path) -> None:
    """Draws useful TFLOP/s a device over tokens a device into a PNG: forward left, forward and backward right, a row for each problem.

    The report has timed records.
    """
    # The object-oriented interface: pyplot would keep state and look for a screen.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    families = list(dict.fromkeys(_family(record) for record in report.records if record.is_timed))
    figure = Figure(figsize=(11, 3.9 * len(families) + 0.5), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    for row, family in enumerate(families):
        records = [record for record in report.records if record.is_timed and _family(record) == family]
        for column, which in enumerate(PASSES):
            axes = figure.add_subplot(len(families), 2, row * 2 + column + 1)
            lines = curves(records, which)
            ours, peers = iter(_OURS * 9), iter(_PEERS * 9)
            for index, (label, points) in enumerate(lines.items()):
                alone, peer = label.startswith("one device"), label.startswith("peer ")
                axes.plot(
                    *zip(*points, strict=True),
                    label=label.removeprefix("peer "),
                    color="#000000" if alone else next(peers) if peer else next(ours),
                    linestyle=":" if alone else "--" if peer else "-",
                    marker=_MARKERS[index % len(_MARKERS)],
                    markersize=4,
                    linewidth=1.6,
                )
            ticks = sorted({tokens for points in lines.values() for tokens, _ in points})
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=8)
            axes.minorticks_off()
            axes.set_ylim(bottom=0)
            axes.set_xlabel("tokens a device")
            axes.set_ylabel("useful TFLOP/s a device")
            axes.set_title(f"{_WORDS[which]}: {family}", fontsize=9, loc="left")
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
            if column == 1:
                axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    about = report.about
    versions = about.get("versions", {})
    figure.suptitle(
        f"{about.get('num_ranks')} × {about.get('device')}, torch {versions.get('torch', '')}, commit {about.get('commit', '')}",
        fontsize=10, x=0.01, ha="left",
    )  # fmt: skip
    figure.savefig(path)


def curves(records: list[Record], which: str) -> Lines:
    """`{label: [(tokens a device, TFLOP/s a device), …]}`: ringspan's lines, those of peers, and of one device the fastest kernel's."""
    lines: Lines = {}
    order = {"ringspan": 0, "peer": 1, "one device": 2}
    launches = {record.launch for record in records}
    for record in sorted(records, key=lambda record: (order[record.kind], record.shape.tokens)):
        launch = f", {record.launch}" if len(launches) > 1 else ""
        label = f"one device, best kernel{launch}" if record.kind == "one device" else f"{record.label}{launch}"
        points = lines.setdefault(f"peer {label}" if record.kind == "peer" else label, [])
        speed = record.tflops(which)
        if points and points[-1][0] == record.shape.tokens:
            points[-1] = (record.shape.tokens, max(points[-1][1], speed))
        else:
            points.append((record.shape.tokens, speed))
    return lines


def _family(record: Record) -> str:
    """All of a problem but its length."""
    shape = record.shape
    mask = shape.mask_text if len(shape.mask_text) <= 40 else f"{shape.mask_text[:39]}…"
    batch = f", batch {shape.batch}" if shape.batch > 1 else ""
    return f"{mask}, {shape.heads}/{shape.kv_heads} heads × {shape.head_dim}{batch}, {shape.dtype}"
