"""`ringspan trace`: one forward and one backward, timed on every rank, beside what the schedule foretells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ringspan.cli.show import parse_options, parse_weights
from ringspan.errors import RingspanError, nearest_name

if TYPE_CHECKING:
    from ringspan.strategies import Machine
    from ringspan.trace import Story, Trace
    from ringspan.verify import World

_WHAT, _SIZES, _HOW = "What is traced", "Its tensors", "Where, and what is written"


def command(
    strategy: Annotated[str, typer.Argument(help="ring, direct, all_gather, …, or auto.", metavar="STRATEGY")] = "ring",
    ranks: Annotated[
        int | None,
        typer.Option(
            help="How many; under torchrun as many as it started. [dim]\\[default: 4][/dim]", show_default=False, rich_help_panel=_WHAT
        ),
    ] = None,
    layout: Annotated[str, typer.Option(help="contiguous, zigzag, striped, weighted or auto.", rich_help_panel=_WHAT)] = "zigzag",
    mask: Annotated[str, typer.Option(help="causal, full, window:7, …; joined by &.", rich_help_panel=_WHAT)] = "causal",
    length: Annotated[int, typer.Option(help="Positions in the whole sequence.", rich_help_panel=_WHAT)] = 4096,
    weights: Annotated[
        str | None, typer.Option(help="One number a rank, for the layout weighted.", metavar="W,W,…", rich_help_panel=_WHAT)
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(help="One of the strategy's own, such as stages=2; repeatable.", metavar="NAME=VALUE", rich_help_panel=_WHAT),
    ] = None,
    heads: Annotated[int, typer.Option(help="Query heads.", rich_help_panel=_SIZES)] = 8,
    kv_heads: Annotated[int, typer.Option(help="Key and value heads.", rich_help_panel=_SIZES)] = 2,
    head_dim: Annotated[int, typer.Option(help="Width of a head.", rich_help_panel=_SIZES)] = 64,
    batch: Annotated[int, typer.Option(help="Sequences side by side.", rich_help_panel=_SIZES)] = 1,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float64, float32, bfloat16 or float16. [dim]\\[default: bfloat16 on GPUs, float32 on CPUs][/dim]",
            show_default=False, rich_help_panel=_SIZES,
        ),
    ] = None,
    kernel: Annotated[str, typer.Option(help="auto, or one of the kernels by name.", rich_help_panel=_SIZES)] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, or cuda.", rich_help_panel=_HOW)] = "auto",
    machine: Annotated[
        str, typer.Option(help="Whose rates the prediction rests on: measured (here, before the trace), cuda or cpu.", rich_help_panel=_HOW)
    ] = "measured",
    png: Annotated[Path | None, typer.Option(help="Draw both timelines into this PNG.", metavar="FILE", rich_help_panel=_HOW)] = None,
    chrome: Annotated[
        Path | None, typer.Option(help="Write them as Chrome JSON, for Perfetto.", metavar="FILE", rich_help_panel=_HOW)
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write everything that was found.", metavar="FILE", rich_help_panel=_HOW)
    ] = None,
    timeout_seconds: Annotated[float, typer.Option(help="How long a rank waits for another.", rich_help_panel=_HOW)] = 120.0,
) -> None:  # fmt: skip
    """Time every part of one forward and backward on every rank, beside what the schedule foretells; say what was hidden, who held the
    others up, and what to change.

    In one process with ranks that are threads, or under torchrun with real ones over gloo or NCCL.
    """
    from ringspan.trace import TraceCase, tell, trace
    from ringspan.verify import open_world

    if not timeout_seconds > 0:
        raise RingspanError(f"--timeout-seconds {timeout_seconds:g}", "", "A rank waits for a while", "--timeout-seconds 120")
    with open_world(device, timeout_seconds) as world:
        case = TraceCase(
            num_ranks=_ranks(ranks, world),
            strategy=strategy,
            layout=layout,
            mask=mask,
            length=length,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            batch=batch,
            dtype=dtype or ("bfloat16" if world.device.type == "cuda" else "float32"),
            kernel=kernel,
            options=parse_options(option or []),
            weights=parse_weights(weights),
        )
        rates = _machine(machine)
        world.agree("files", _unwritable(png, chrome, json_file) if world.is_first else None, "trace")
        traced = trace(case, world, rates)
        if world.is_first:
            _publish(traced, tell(traced), png, chrome, json_file)
        # Rank 0 has spoken and written before any rank leaves: torchrun ends the others when one has left badly.
        world.agree("written", what="trace")


def _ranks(asked: int | None, world: World) -> int:
    if world.transport is None:
        return 4 if asked is None else asked
    if asked not in (None, world.transport.size):
        raise RingspanError(
            f"--ranks {asked} under torchrun",
            f"it started {world.transport.size}",
            "Real ranks are as many as torchrun started",
            f"--ranks {world.transport.size}, or no --ranks; without torchrun any number",
        )
    return world.transport.size


def _machine(name: str) -> Machine | None:
    from ringspan.strategies import MACHINES

    if name == "measured":
        return None
    if name not in MACHINES:
        known = ("measured", *MACHINES)
        nearest = f"--machine {nearest_name(name, known)}"
        raise RingspanError(f"--machine {name}", f"there are {', '.join(known)}", "A machine is asked for by name", nearest)
    return MACHINES[name]


def _unwritable(png: Path | None, chrome: Path | None, json_file: Path | None) -> RingspanError | None:
    from ringspan.viz.picture import check_picture_path

    try:
        if png is not None:
            check_picture_path(png)
    except RingspanError as error:
        return error
    for option, path in (("--chrome", chrome), ("--json", json_file)):
        if path is None:
            continue
        try:
            new = not path.exists()
            path.open("a").close()
            if new:
                path.unlink()
        except OSError as error:
            return RingspanError(f"{option} {path}", error.strerror or str(error), "The file can be written", f"{option} trace.json")
    return None


def _publish(trace: Trace, story: Story, png: Path | None, chrome: Path | None, json_file: Path | None) -> None:
    from rich.console import Console

    from ringspan.cli.trace_table import show
    from ringspan.trace import as_json, chrome_trace
    from ringspan.viz.trace_picture import draw_trace

    console = Console(highlight=False)
    show(trace, story, console)
    if png is not None:
        draw_trace(trace, story, png)
        console.print(f"drawn: {png}", soft_wrap=True, markup=False)
    for path, content in ((chrome, chrome_trace), (json_file, lambda trace: as_json(trace, story))):
        if path is not None:
            hint = " (open it at https://ui.perfetto.dev)" if path is chrome else ""
            path.write_text(json.dumps(content(trace), allow_nan=False) + "\n")
            console.print(f"written: {path}{hint}", soft_wrap=True, markup=False)
