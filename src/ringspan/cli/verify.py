"""`ringspan verify`: lists in, errors beside their budgets out, and exit status 1 where one is over."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ringspan.cli.lists import names, numbers
from ringspan.errors import RingspanError

if TYPE_CHECKING:
    from ringspan.verify import Grid, VerifyReport, World

_LIST = "comma-separated"
_COLUMNS = 110
"""Width of what is printed where there is no terminal to ask."""


def command(
    ranks: Annotated[str | None, typer.Option(help=f"Numbers of ranks, {_LIST}. Under torchrun: the ranks that it started.")] = None,
    strategy: Annotated[str | None, typer.Option(help=f"Strategies, {_LIST}. [default: all]", show_default=False)] = None,
    layout: Annotated[
        str | None, typer.Option(help=f"Layouts, {_LIST}; 'weighted' has shares 1, 2, 0, … [default: all]", show_default=False)
    ] = None,
    mask: Annotated[str | None, typer.Option(help=f"Masks, {_LIST}. [default: all]", show_default=False)] = None,
    length: Annotated[str | None, typer.Option(help=f"Sequence lengths, {_LIST}; nothing needs to divide them.")] = None,
    heads: Annotated[str | None, typer.Option(help=f"Query heads, {_LIST}.")] = None,
    kv_heads: Annotated[str | None, typer.Option(help=f"KV heads, {_LIST}; each divides the query heads.")] = None,
    head_dim: Annotated[str | None, typer.Option(help=f"Widths of a head, {_LIST}.")] = None,
    batch: Annotated[str | None, typer.Option(help=f"Sequences side by side, {_LIST}.")] = None,
    dtype: Annotated[str | None, typer.Option(help=f"Dtypes of q, k, v, {_LIST}: float64, float32, bfloat16, float16.")] = None,
    kernel: Annotated[str | None, typer.Option(help=f"Kernels, {_LIST}; 'auto' is the fastest that computes the tensors.")] = None,
    seed: Annotated[str | None, typer.Option(help=f"Seeds of the random tensors, {_LIST}.")] = None,
    most: Annotated[int, typer.Option(help="Of more combinations than this, verify an even choice; 0: all.", metavar="N")] = 600,
    device: Annotated[str, typer.Option(help="auto, cpu, or cuda.")] = "auto",
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write everything that was measured.", metavar="FILE")] = None,
    timeout_seconds: Annotated[float, typer.Option(help="How long a rank waits for another.")] = 120.0,
) -> None:
    """Compare attention that is split over ranks with float64 dense attention: out, lse, dq, dk, dv, and the bytes that were sent.

    In one process with ranks that are threads, or under torchrun with real ones over gloo or NCCL. Exit status 1 if an error is over its
    budget or a byte was not promised by the schedule, 2 for what cannot be carried out.
    """
    lists = {
        "num_ranks": numbers("--ranks", ranks),
        "strategies": names("--strategy", strategy),
        "layouts": names("--layout", layout),
        "masks": names("--mask", mask),
        "lengths": numbers("--length", length),
        "heads": numbers("--heads", heads),
        "kv_heads": numbers("--kv-heads", kv_heads),
        "head_dims": numbers("--head-dim", head_dim),
        "batches": numbers("--batch", batch),
        "dtypes": names("--dtype", dtype),
        "kernels": names("--kernel", kernel),
        "seeds": numbers("--seed", seed),
    }
    report = run(lists, most=most, device=device, json_file=json_file, timeout_seconds=timeout_seconds)
    raise typer.Exit(0 if report.passed else 1)


def run(lists: dict[str, tuple | None], *, most: int, device: str, json_file: Path | None, timeout_seconds: float) -> VerifyReport:
    """Verifies the grid of `lists` (a field of `Grid` each, None for its default), shows and writes what was found, and returns it.

    Args:
        lists: what is combined.
        most: how many combinations at most, 0 for all.
        device: `auto`, `cpu` or `cuda`.
        json_file: takes everything that was measured.
        timeout_seconds: how long a rank waits for another.

    Raises:
        RingspanError: on every rank and before anything runs, for what does not exist or cannot be written; and afterwards where every
            combination was refused, so that nothing was verified.
    """
    from ringspan.verify import Grid, open_world, verify

    grid = Grid(**{name: values for name, values in lists.items() if values is not None})
    grid.check()
    if not timeout_seconds > 0 or most < 0:
        asked = f"--most {most}" if most < 0 else f"--timeout-seconds {timeout_seconds:g}"
        raise RingspanError(asked, "", "Neither is below zero, and a rank waits for a while", "--most 600 --timeout-seconds 120")
    with open_world(device, timeout_seconds) as world:
        world.agree(f"{lists} most={most} device={device}", _unwritable(json_file) if world.is_first else None)
        if world.transport is not None:
            grid = _as_many_as_there_are(grid, world.transport.size, given=lists["num_ranks"] is not None)
        cases = grid.cases(most or None)
        with _progress(world, len(cases)) as watch:
            report = verify(cases, world, watch)
        if world.is_first:
            _publish(report, json_file, combinations=grid.size)
    if not report.of("exact", "over", "failed"):
        raise RingspanError(
            f"verification of {len(report.cases)} configurations",
            f"each was refused, the first for this reason: {report.cases[0].reason}",
            "A refusal is not a pass",
            "ringspan verify, without options",
        )
    return report


def _publish(report: VerifyReport, json_file: Path | None, combinations: int) -> None:
    from rich.console import Console

    from ringspan.cli.verify_table import show

    if json_file is not None:
        json_file.write_text(json.dumps({"combinations": combinations, **report.as_json()}, indent=1, allow_nan=False) + "\n")
    console = Console(highlight=False)
    show(report, console if console.is_terminal else Console(highlight=False, width=_COLUMNS), combinations)


def _progress(world: World, total: int) -> Any:
    """A bar in a terminal; nothing elsewhere."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if not (world.is_first and console.is_terminal):
        return nullcontext(lambda report: None)
    return _Bar(Progress(console=console, transient=True), total)


class _Bar:
    def __init__(self, progress: Any, total: int) -> None:
        self._progress, self._task = progress, progress.add_task("verifying", total=total)

    def __enter__(self) -> Any:
        self._progress.start()
        return lambda report: self._progress.advance(self._task)

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()


def _as_many_as_there_are(grid: Grid, size: int, *, given: bool) -> Grid:
    if given and grid.num_ranks != (size,):
        raise RingspanError(
            f"--ranks {','.join(map(str, grid.num_ranks))} under torchrun",
            f"it started {size}",
            "Real ranks are as many as torchrun started",
            f"--ranks {size}, or no --ranks; without torchrun any numbers",
        )
    return replace(grid, num_ranks=(size,))


def _unwritable(json_file: Path | None) -> RingspanError | None:
    try:
        if json_file is not None:
            json_file.open("a").close()
    except OSError as error:
        return RingspanError(f"--json {json_file}", error.strerror or str(error), "The file can be written", "--json verify.json")
    return None
