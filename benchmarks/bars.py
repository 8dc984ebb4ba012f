"""What benches have shown beside what attention is held to: a table of every setting, and what is short.

    python3 benchmarks/bars.py RESULTS.json ...

Bars are ratios to one device, forward and forward + backward, that one setting must reach together; how many times faster than the best
peer forward + backward must be; how much of a setting's memory may be beyond its schedule's; and how near `auto` must come to the best.
Ends with 1 where anything is short, was wrong or broke.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

PASSES = ("forward", "both")
CAUSAL = {2048: 0.60, 8192: 0.90, 32768: 0.97, 131072: 0.98}
MASKED = {"documents": 0.85, "window": 0.75}
PEERS = {2048: 2.0, 8192: 1.3, 32768: 1.15}
MORE_MEMORY, AUTO = 1.05, 0.90

COLUMNS = ("heads x width", "GPUs", "mask", "tokens per GPU", "setting")
COLUMNS += ("forward ms", "ratio", "forward + backward ms", "ratio", "best peer", "extra MiB (schedule)")

Row = dict[str, Any]
Cell = tuple[str, int, str, int]
"""Heads and width, GPUs, mask, tokens per GPU."""


def rows_of(found: Row) -> list[Row]:
    """The timed settings of a bench's JSON, and those that were wrong or broke."""
    rows = []
    for record in found["records"]:
        shape = record["shape"]
        mask = "documents" if shape["document_lengths"] else shape["mask"].split(":")[0]
        heads = f"{shape['heads']}/{shape['kv_heads']} x {shape['head_dim']}"
        cell: Cell = (heads, shape["num_ranks"], mask, shape["tokens"])
        if record["kind"] != "peer" and record["status"] in ("wrong", "failed"):
            rows.append({"cell": cell, "label": record["label"], "problem": f"{record['status']}: {record['reason']}"})
        elif record["kind"] == "ringspan" and record["status"] == "timed":
            passes = record["passes"]
            row: Row = {"cell": cell, "label": record["label"], "problem": "", "auto": record["setting"]["strategy"] == "auto"}
            row["ms"] = {which: passes[which]["median_ms"] for which in PASSES}
            row["ratio"] = {which: passes[which]["ratio_to_one_device"] for which in PASSES}
            row["peer"] = min(passes["both"]["ratio_to_peers"].values(), default=None)
            row["extra"], row["promised"] = record["extra_bytes"].get("both"), record["promised_bytes"]["both"]["total"]
            rows.append(row)
    return rows


def table(rows: list[Row]) -> list[str]:
    """A line for each setting."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for row in sorted((row for row in rows if not row["problem"]), key=lambda row: row["cell"]):
        heads, gpus, mask, tokens = row["cell"]
        cells = [heads, str(gpus), mask, f"{tokens:,}", row["label"]]
        for which in PASSES:
            cells += [f"{row['ms'][which]:.3f}", f"{row['ratio'][which]:.3f}"]
        cells.append("" if row["peer"] is None else f"{row['peer']:.2f}")
        cells.append("" if row["extra"] is None else f"{row['extra'] / 2**20:,.0f} ({row['promised'] / 2**20:,.0f})")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def short(rows: list[Row]) -> list[str]:
    """A sentence for each bar that is not reached."""
    found = [f"{row['label']}, {', '.join(map(str, row['cell']))}: {row['problem']}" for row in rows if row["problem"]]
    cells: dict[Cell, list[Row]] = defaultdict(list)
    for row in rows:
        if not row["problem"]:
            cells[row["cell"]].append(row)
    for (heads, gpus, mask, tokens), settings in sorted(cells.items()):
        cell = f"{heads}, {gpus} GPUs, {mask}, {tokens:,} tokens"
        bar = MASKED.get(mask, CAUSAL.get(tokens))
        least = {row["label"]: min(row["ratio"].values()) for row in settings}
        nearest = max(least, key=lambda label: least[label])
        if bar is not None and least[nearest] < bar:
            found.append(f"{cell}: {least[nearest]:.4f} of one device by {nearest}, the bar is {bar}")
        best = max((row["peer"] for row in settings if row["peer"] is not None), default=None)
        if best is not None and tokens in PEERS and best < PEERS[tokens]:
            found.append(f"{cell}: {best:.2f} times as fast as the best peer, the bar is {PEERS[tokens]}")
        for row in settings:
            if row["extra"] is not None and row["extra"] > MORE_MEMORY * row["promised"]:
                found.append(f"{cell}: {row['label']} takes {row['extra']:,} bytes, its schedule {row['promised']:,}")
        for which in PASSES:
            mine = [row["ms"][which] for row in settings if row["auto"]]
            if mine and min(row["ms"][which] for row in settings) < AUTO * min(mine):
                found.append(
                    f"{cell}: auto takes {min(mine):.3f} ms {which}, the best setting {min(row['ms'][which] for row in settings):.3f}"
                )
    return found


def main(paths: list[str]) -> int:
    """Prints the table and what is short."""
    rows = [row for path in paths for row in rows_of(json.loads(Path(path).read_text(encoding="utf-8")))]
    missing = short(rows)
    said = ["Short:", *missing] if missing else ["Nothing is short." if rows else "Nothing was measured."]
    print(*table(rows), "", *said, sep="\n")
    return int(bool(missing) or not rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
