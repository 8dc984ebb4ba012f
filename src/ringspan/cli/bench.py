"""`ringspan bench`: lists in, ranks started, speeds beside one device and beside the peers, exit status 1 where something is wrong."""

from __future__ import annotations

import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ringspan.cli.lists import names, numbers
from ringspan.errors import RankFailure

if TYPE_CHECKING:
    from ringspan.cli.bench_rank import Request

_LIST = "comma-separated"
_PROBLEM, _SOLVERS, _HOW, _LEAVES = "What is computed", "Who computes it", "How it is timed", "What it leaves"


def _option(panel: str, text: str, default: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=f"{text} [dim]\\[default: {default}][/dim]", show_default=False, rich_help_panel=panel, **more)


def command(
    length: Annotated[
        str | None, _option(_PROBLEM, f"Tokens a device, {_LIST}.", "2048,8192,32768,131072 on GPUs, 512,1024 on CPUs")
    ] = None,
    mask: Annotated[str | None, _option(_PROBLEM, f"Masks, {_LIST}, as ringspan show takes them.", "causal")] = None,
    documents: Annotated[
        str | None,
        _option(_PROBLEM, "A realistic mixture of documents beside each mask: realistic:SEED, log-normal with median 600.", "none"),
    ] = None,
    heads: Annotated[str | None, _option(_PROBLEM, f"Query heads, or query/KV heads, {_LIST}.", "32/8 on GPUs, 8/2 on CPUs")] = None,
    head_dim: Annotated[str | None, _option(_PROBLEM, f"Widths of a head, {_LIST}.", "128 on GPUs, 64 on CPUs")] = None,
    batch: Annotated[str | None, _option(_PROBLEM, f"Sequences side by side, {_LIST}.", "1")] = None,
    dtype: Annotated[str | None, _option(_PROBLEM, f"Dtypes of q, k, v, {_LIST}.", "bfloat16 on GPUs, float32 on CPUs")] = None,
    strategy: Annotated[
        str | None,
        _option(
            _SOLVERS, f"Strategies, {_LIST}, options as in all_gather:stages=2.", "ring,all_gather,direct,ulysses,auto; ring,auto on CPUs"
        ),
    ] = None,
    layout: Annotated[str | None, _option(_SOLVERS, f"Layouts, {_LIST}.", "zigzag")] = None,
    kernel: Annotated[str | None, _option(_SOLVERS, f"Kernels, {_LIST}.", "auto")] = None,
    transport: Annotated[str | None, _option(_SOLVERS, f"auto, process_group, peer_memory, {_LIST}.", "auto")] = None,
    peers: Annotated[str | None, _option(_SOLVERS, f"Peers to time beside, {_LIST}; all or none.", "all")] = None,
    one_device: Annotated[str | None, _option(_SOLVERS, f"Kernels to time on one device, {_LIST}.", "all that can")] = None,
    ablate: Annotated[
        bool, typer.Option("--ablate", help="Also take away one thing at a time: overlap, balance, stages.", rich_help_panel=_SOLVERS)
    ] = False,
    share: Annotated[
        bool,
        typer.Option("--share", help="Also one device with its share of the heads alone, in turns with each.", rich_help_panel=_SOLVERS),
    ] = False,
    launch: Annotated[str | None, _option(_HOW, f"eager, graph (one CUDA graph), replay (cuda_graphs=True), {_LIST}.", "eager")] = None,
    ranks: Annotated[int | None, _option(_HOW, "Processes; under torchrun, its own.", "every GPU, or 2 on CPUs")] = None,
    device: Annotated[str, _option(_HOW, "auto, cpu or cuda (one GPU a rank).", "auto")] = "auto",
    samples: Annotated[int, _option(_HOW, "Samples, at least 10; the median counts.", "10")] = 10,
    warmup: Annotated[int, _option(_HOW, "Calls before them.", "5")] = 5,
    timeout_seconds: Annotated[float, _option(_HOW, "How long a rank waits for another.", "600")] = 600.0,
    json_file: Annotated[Path | None, _option(_LEAVES, "Every sample, and where it comes from.", "none", "--json", metavar="FILE")] = None,
    png: Annotated[Path | None, _option(_LEAVES, "Speed over length, drawn.", "none", "--png", metavar="FILE")] = None,
    markdown: Annotated[Path | None, _option(_LEAVES, "The tables as a report.", "none", "--markdown", metavar="FILE")] = None,
) -> None:
    """Time attention over several devices beside one device and beside the peers that are installed, forward and backward.

    Everything is checked before it is timed: against float64 dense attention up to 8,192 tokens in all, else against one device. What is
    wrong is not timed. --json and --markdown are written again with each result, so that a run which is cut off leaves what it has timed.
    Exit status 1 where something of ringspan is wrong or broken, 2 for what cannot be carried out, 143 after SIGTERM, 130 after Ctrl-C.
    """
    given = {
        "tokens": numbers("--length", length),
        "masks": names("--mask", mask),
        "documents": documents,
        "heads": _heads(heads),
        "head_dims": numbers("--head-dim", head_dim),
        "batches": numbers("--batch", batch),
        "dtypes": names("--dtype", dtype),
        "strategies": names("--strategy", strategy),
        "layouts": names("--layout", layout),
        "kernels": names("--kernel", kernel),
        "transports": names("--transport", transport),
        "peers": _peers(peers),
        "baselines": names("--one-device", one_device),
        "launches": names("--launch", launch),
        "num_ranks": ranks,
        "ablate": ablate,
        "share": share,
    }
    files = {"json_file": json_file, "png": png, "markdown": markdown}
    raise typer.Exit(
        run(given, device=device, samples=samples, warmup=warmup, timeout_seconds=timeout_seconds, files=files),
    )


def run(given: dict[str, Any], *, device: str, samples: int, warmup: int, timeout_seconds: float, files: dict[str, Path | None]) -> int:
    """Benches the grid of `given` (fields of `Grid`, None for a default) and returns the exit status.

    Raises:
        RingspanError: before anything starts, for what does not exist or cannot be written; and where a rank fails.
    """
    from ringspan.cli.bench_rank import count_file, outcome_file, prepare, run_rank
    from ringspan.transport import is_launched

    request = prepare(given, device=device, samples=samples, warmup=warmup, timeout_seconds=timeout_seconds, files=files)
    if is_launched():
        return run_rank(request)
    with tempfile.TemporaryDirectory(prefix="ringspan-") as folder, _terminable():
        plan = Path(folder) / "request.json"
        try:
            return run_rank(request, plan) if request.grid.num_ranks == 1 else _start(request, plan)
        except KeyboardInterrupt as end:
            if outcome_file(plan).exists():
                return int(outcome_file(plan).read_text())
            name = str(end) or "SIGINT"
            timed = count_file(plan).read_text() if count_file(plan).exists() else "0"
            kept = " and ".join(path for path in (request.json_file, request.markdown) if path is not None)
            where = f"kept in {kept}" if kept else "above, and nowhere else: --json FILE would have kept them"
            print(f"ended by {name}: not finished, {timed} timed, {where}", file=sys.stderr)
            return 128 + signal.Signals[name]


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM is as Ctrl-C is."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _start(request: Request, plan: Path) -> int:
    """Starts the ranks, and says in one sentence what became of them where they did not end well."""
    from ringspan.cli.bench_rank import outcome_file
    from ringspan.transport import start_ranks

    ranks, folder = request.grid.num_ranks, plan.parent
    request.save(plan)
    exits = start_ranks(ranks, "ringspan.cli.bench_rank", [str(plan)], str(folder), logged_ranks=range(1, ranks))
    if outcome_file(plan).exists():
        return int(outcome_file(plan).read_text())
    rank, status = next(iter(exits.items()), (0, 0))
    if status == 2:
        return status
    said = sorted(folder.glob(f"agent/**/{rank}/stderr.log"))
    last = said[-1].read_text(errors="replace").strip().splitlines()[-1:] if said else []
    raise RankFailure(
        f"rank {rank}", f"it ended with status {status}{f', saying: {last[0]}' if last else ''}", "The ranks go on together or not at all",
        "fewer or shorter configurations; --json keeps what was measured before",
    )  # fmt: skip


def _heads(text: str | None) -> tuple[tuple[int, int], ...] | None:
    """`32/8,16` as ((32, 8), (16, 16))."""
    if text is None:
        return None
    pairs = []
    for part in text.split(","):
        query, slash, kv = part.strip().partition("/")
        counts = numbers("--heads", f"{query},{kv}" if slash else query)
        assert counts is not None
        pairs.append((counts[0], counts[-1]))
    return tuple(dict.fromkeys(pairs))


def _peers(text: str | None) -> tuple[str, ...] | None:
    if text in (None, "all"):
        return None
    return () if text == "none" else names("--peers", text)
