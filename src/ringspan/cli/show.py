"""`ringspan show`: a schedule as a table, in numbers and as a picture, proved on the way."""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer

from ringspan.errors import RingspanError
from ringspan.viz.picture import check_picture_path, draw_schedule
from ringspan.viz.study import DIRECTIONS, piece_sizes, study

_WHAT, _SIZES, _HOW = "What is shown", "What a position weighs", "How it is shown"


def command(
    strategy: Annotated[str, typer.Argument(help="ring, direct, all_gather, …, or auto.", metavar="STRATEGY")] = "ring",
    ranks: Annotated[int, typer.Option(help="How many ranks share the sequence.", rich_help_panel=_WHAT)] = 4,
    layout: Annotated[str, typer.Option(help="contiguous, zigzag, striped, weighted or auto.", rich_help_panel=_WHAT)] = "zigzag",
    mask: Annotated[str, typer.Option(help="causal, full, window:7, …; joined by &.", rich_help_panel=_WHAT)] = "causal",
    length: Annotated[int, typer.Option(help="Positions in the whole sequence.", rich_help_panel=_WHAT)] = 32,
    weights: Annotated[
        str | None, typer.Option(help="One number a rank, for the layout weighted.", metavar="W,W,…", rich_help_panel=_WHAT)
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(help="One of the strategy's own, such as stages=2; repeatable.", metavar="NAME=VALUE", rich_help_panel=_WHAT),
    ] = None,
    machine: Annotated[str, typer.Option(help="cuda or cpu: what auto chooses a strategy for.", rich_help_panel=_WHAT)] = "cuda",
    direction: Annotated[str, typer.Option(help="forward or backward: whose table and picture.", rich_help_panel=_HOW)] = "forward",
    full: Annotated[bool, typer.Option("--full", help="Every cell, rank and link, however wide.", rich_help_panel=_HOW)] = False,
    png: Annotated[str | None, typer.Option(help="Also draw it into this PNG.", metavar="FILE", rich_help_panel=_HOW)] = None,
    heads: Annotated[int, typer.Option(help="Query heads.", rich_help_panel=_SIZES)] = 8,
    kv_heads: Annotated[
        int | None,
        typer.Option(help="Key and value heads. [dim]\\[default: as many as heads][/dim]", show_default=False, rich_help_panel=_SIZES),
    ] = None,
    head_dim: Annotated[int, typer.Option(help="Width of a head.", rich_help_panel=_SIZES)] = 128,
    dtype_bytes: Annotated[int, typer.Option(help="Bytes of an element: 2 for bfloat16.", rich_help_panel=_SIZES)] = 2,
) -> None:
    """Show which rank computes what, and what travels, step by step; prove it; and count pairs, bytes and waiting."""
    from rich.console import Console

    from ringspan.viz.terminal import print_study

    if direction not in DIRECTIONS:
        raise RingspanError(
            f"--direction {direction}", "it names no half of a training step", "A direction is forward or backward", "--direction forward"
        )
    sizes = piece_sizes(heads, kv_heads, head_dim, dtype_bytes)
    if png is not None:
        check_picture_path(png)
    shown = study(
        strategy,
        layout=layout,
        mask=mask,
        length=length,
        num_ranks=ranks,
        weights=parse_weights(weights),
        options=parse_options(option or []),
        sizes=sizes,
        machine=machine,
    )
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that cannot show × and → gets a question mark for them, not a traceback.
        sys.stdout.reconfigure(errors="replace")
    console = Console()
    print_study(shown, console, direction=direction, full=full)
    if png is not None:
        draw_schedule(shown, png, direction)
        console.print(f"drawn: {png}", highlight=False, soft_wrap=True)


def parse_weights(text: str | None) -> tuple[float, ...] | None:
    """`1,2,2.5` as numbers.

    Raises:
        RingspanError: for what is no list of numbers.
    """
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise RingspanError(f"--weights {text}", "it does not read", "Weights are numbers joined by commas", "--weights 1,2,2,1") from None


def parse_options(texts: list[str]) -> dict[str, int | str]:
    """`["stages=2", "inner=direct"]` as `{"stages": 2, "inner": "direct"}`.

    Raises:
        RingspanError: for what is no name with a value.
    """
    options: dict[str, int | str] = {}
    for text in texts:
        name, _, value = (part.strip() for part in text.partition("="))
        if not name or not value:
            raise RingspanError(f"--option {text}", "it does not read", "An option is a name and a value", "--option stages=2")
        options[name] = int(value) if value.lstrip("-").isdecimal() else value
    return options
