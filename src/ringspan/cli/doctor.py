"""`ringspan doctor`: what this machine has, which kernels it runs and how fast, and what `kernel="auto"` takes here."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from ringspan.errors import RingspanError, nearest_name

if TYPE_CHECKING:
    from ringspan.cli.diagnosis import Diagnosis
    from ringspan.kernels import Problem

_PROBLEM = "The attention that kernels are tried on"
_COLUMNS = 110


def command(
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    heads: Annotated[int, typer.Option(help="Query heads.", rich_help_panel=_PROBLEM)] = 32,
    kv_heads: Annotated[
        int | None,
        typer.Option(
            help="Key and value heads. [dim]\\[default: 8, or as many as divide --heads][/dim]",
            show_default=False,
            rich_help_panel=_PROBLEM,
        ),
    ] = None,
    head_dim: Annotated[int, typer.Option(help="Width of a head.", rich_help_panel=_PROBLEM)] = 128,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16, float32 or float64.", rich_help_panel=_PROBLEM)] = "bfloat16",
    length: Annotated[
        int | None,
        typer.Option(help="Tokens of a rank. [dim]\\[default: 8192; 512 on a CPU][/dim]", show_default=False, rich_help_panel=_PROBLEM),
    ] = None,
    mask: Annotated[str, typer.Option(help="causal, window:7, …, as `ringspan show` reads them.", rich_help_panel=_PROBLEM)] = "causal",
    softcap: Annotated[bool, typer.Option("--softcap", help="Scores are bounded.", rich_help_panel=_PROBLEM)] = False,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Gradients are the same bits at every run.", rich_help_panel=_PROBLEM)
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Say what this machine has: versions, GPUs and links, transports, and each kernel with its speed, or why it cannot be used.

    On a GPU the first look at a kernel compiles it, which may take a minute. Exit status 2 for a problem that does not exist.
    """
    from ringspan.cli.diagnosis import diagnose

    problem, tokens = problem_of(device, heads, kv_heads, head_dim, dtype, length, mask, softcap=softcap, deterministic=deterministic)
    found = diagnose(problem, tokens)
    if as_json:
        print(json.dumps(asdict(found), indent=2))
    else:
        _show(found)


def problem_of(
    device: str,
    heads: int,
    kv_heads: int | None,
    head_dim: int,
    dtype: str,
    length: int | None,
    mask: str,
    *,
    softcap: bool,
    deterministic: bool,
) -> tuple[Problem, int]:
    """What the options ask for, and how many tokens.

    Raises:
        RingspanError: for what does not exist, here or at all.
    """  # fmt: skip
    import torch

    from ringspan.attention.checks import features
    from ringspan.geometry import parse_mask
    from ringspan.kernels import Problem
    from ringspan.verify.case import DTYPES

    has_cuda = torch.cuda.is_available()
    if device not in ("auto", "cpu", "cuda") or (device == "cuda" and not has_cuda):
        found = "there is no CUDA device here" if device == "cuda" else "there are auto, cpu and cuda"
        raise RingspanError(f"--device {device}", found, "A device is one of this machine's", "--device auto")
    if dtype not in DTYPES:
        nearest = nearest_name(dtype, ("bfloat16", *DTYPES))
        raise RingspanError(f"--dtype {dtype}", f"there are {', '.join(DTYPES)}", "A dtype is asked for by name", f"--dtype {nearest}")
    place = "cuda" if device != "cpu" and has_cuda else "cpu"
    kv_heads = (8 if heads % 8 == 0 else heads) if kv_heads is None else kv_heads
    length = (8192 if place == "cuda" else 512) if length is None else length
    if min(heads, kv_heads, head_dim, length) < 1 or heads % kv_heads:
        asked = f"--heads {heads} --kv-heads {kv_heads} --head-dim {head_dim} --length {length}"
        raise RingspanError(asked, "", "All are at least 1, and KV heads divide query heads", "--heads 32 --kv-heads 8 --head-dim 128")
    wanted = features(parse_mask(mask), 1.0 if softcap else None)
    asked = Problem(
        device=place, dtype=DTYPES[dtype], heads=heads, kv_heads=kv_heads, head_dim=head_dim, features=wanted, deterministic=deterministic
    )
    return asked, length


def _show(found: Diagnosis) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, _COLUMNS)

    def say(text: str) -> None:
        console.print(escape(text), highlight=False, soft_wrap=True)

    say(", ".join(f"{name} {version}" for name, version in found.versions.items() if version is not None))
    if not found.gpus:
        say("This is a CPU machine: no CUDA device is found here, and the kernels and transports for GPUs cannot be used.")
    for index, gpu in enumerate(found.gpus):
        say(f"GPU {index}: {gpu}")
    for link in found.links:
        say(f"GPU {link.source} → GPU {link.target}: {'peer access' if link.peer_access else 'no peer access'}")
    for way in (*found.transports, found.symmetric_memory):
        say(f"{way.name}: {'can be used' if way.usable else f'cannot be used: {way.reason}'}")
    say(f"\nkernels on {found.device} ({found.device_name}): {found.problem}, {found.tokens:,} tokens, forward and backward")
    table = Table(box=None, pad_edge=False)
    for column in ("kernel", "ms", "TFLOP/s", "same bits", ""):
        table.add_column(column, justify="right" if column in ("ms", "TFLOP/s") else "left")
    for kernel in found.kernels:
        milliseconds = "" if kernel.seconds is None else f"{1e3 * kernel.seconds:.2f}"
        rate = "" if kernel.teraflops_per_second is None else f"{kernel.teraflops_per_second:.3g}"
        remark = "auto takes it" if kernel.name == found.auto else "" if kernel.usable else f"cannot be used: {kernel.reason}"
        table.add_row(kernel.name, milliseconds, rate, kernel.determinism, escape(remark))
    console.print(table, highlight=False)
    say(f"kernel='auto' takes {found.auto}: {found.auto_reason}")
