"""What `ringspan bench` has so far, on the screen and on disk: a run that is cut off, even by SIGKILL, leaves what it has timed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ringspan.bench import BenchReport, Record, Shape, Watch, markdown
from ringspan.cli.bench_table import row, show_end, show_shape
from ringspan.training.manifest import write_whole

_COLUMNS = 130
"""Width of what is printed where there is no terminal to ask."""


class Progress(Watch):
    """Rank 0's: a line a record, a table a problem, and the report's files written again with each record.

    Args:
        about: of the report.
        json_file, markdown_file, png: where they are wanted. The picture is drawn at the end alone.
        count_file: where the number of what was timed is kept, for whoever started the ranks.
    """

    def __init__(
        self, about: dict[str, Any], json_file: str | None, markdown_file: str | None, png: str | None, count_file: Path | None
    ) -> None:
        self._about = about
        self._json_file, self._markdown_file, self._png, self._count_file = json_file, markdown_file, png, count_file
        console = Console(highlight=False)
        self._console = console if console.is_terminal else Console(highlight=False, width=_COLUMNS)
        # The files of a run before this one would otherwise pass for this one's until there is a record.
        self._write(self._report([]))

    def came(self, record: Record, records: Sequence[Record]) -> None:
        """Prints it, after it is on disk."""
        report = self._report(records)
        self._write(report)
        self._console.print(row(report, record), soft_wrap=True)

    def timed_again(self, records: Sequence[Record]) -> None:
        """Keeps the samples."""
        self._write(self._report(records))

    def ended(self, shape: Shape, records: Sequence[Record]) -> None:
        """Prints the table."""
        show_shape(self._report(records), shape, self._console)

    def finish(self, report: BenchReport) -> None:
        """Writes the whole, draws it, and prints what came of it."""
        self._write(report)
        show_end(report, self._console)
        if self._png is not None and any(record.is_timed for record in report.records):
            from ringspan.viz.speed_curve import draw_speed_curve

            draw_speed_curve(report, Path(self._png))
        for path in (self._json_file, self._markdown_file, self._png):
            if path is not None:
                self._console.print(f"  {path}", soft_wrap=True)

    def _report(self, records: Sequence[Record]) -> BenchReport:
        return BenchReport(self._about, tuple(records), finished=False)

    def _write(self, report: BenchReport) -> None:
        if self._json_file is not None:
            write_whole(Path(self._json_file), json.dumps(report.as_json(), indent=1, allow_nan=False) + "\n")
        if self._markdown_file is not None:
            write_whole(Path(self._markdown_file), markdown(report))
        if self._count_file is not None:
            write_whole(self._count_file, str(sum(record.is_timed for record in report.records)))
