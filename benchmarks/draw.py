"""Several benches of one machine, each a JSON file of `ringspan bench`, drawn as one picture: a row for each kind of heads and each mask.

    PYTHONPATH=src python3 benchmarks/draw.py PICTURE.png COMMIT RESULTS.json ...

All of as many devices of one kind. `COMMIT` stands above the picture.
"""

from __future__ import annotations

import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from ringspan.bench.case import Setting, Shape
from ringspan.bench.clock import Timing
from ringspan.bench.record import BenchReport, Record
from ringspan.viz.speed_curve import draw_speed_curve

Built = TypeVar("Built")


def built(kind: type[Built], found: dict[str, Any]) -> Built:
    """An instance from what a bench wrote of it, and of what else is derived."""
    return kind(**{each.name: found[each.name] for each in fields(kind)})  # type: ignore[arg-type]


def record_of(found: dict[str, Any]) -> Record:
    """What is drawn of a timed record: of its samples the slowest rank's are enough."""
    return Record(
        kind=found["kind"],
        name=found["name"],
        shape=built(Shape, found["shape"]),
        setting=None if found["setting"] is None else built(Setting, found["setting"]),
        launch=found["launch"],
        kernel=found["kernel"],
        timings={which: Timing((tuple(each["samples_ms"]),), each["repeats"]) for which, each in found["passes"].items()},
    )


def main(picture: str, commit: str, *paths: str) -> None:
    """Draws what was timed; ends where the benches are of different devices."""
    benches = [json.loads(Path(path).read_text(encoding="utf-8")) for path in paths]
    devices = [f"{bench['about']['num_ranks']} × {bench['about']['device']}" for bench in benches]
    if len(set(devices)) > 1:
        each = "\n".join(f"  {path}: {found}" for path, found in zip(paths, devices, strict=True))
        sys.exit(f"these benches are of different devices, and one picture is of one machine:\n{each}")
    records = [record_of(found) for bench in benches for found in bench["records"] if found["status"] == "timed"]
    draw_speed_curve(BenchReport({**benches[0]["about"], "commit": commit}, tuple(records)), Path(picture))


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(f"usage: {sys.argv[0]} PICTURE.png COMMIT RESULTS.json ...")
    main(*sys.argv[1:])
