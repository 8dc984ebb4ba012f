"""`ringspan train`: options in, a checked plan, ranks started, and how it ended as an exit status."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ringspan.errors import RingspanError

if TYPE_CHECKING:
    from ringspan.training.plan import Plan

_SIGNAL_STATUS = {"SIGINT": 130, "SIGTERM": 143}
_WHAT, _HOW, _PARALLEL, _LEAVES = "What is trained", "How", "How it is split over ranks", "What it leaves"


def _option(panel: str, text: str, default: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=f"{text} [dim]\\[default: {default}][/dim]", show_default=False, rich_help_panel=panel, **more)


def command(
    data: Annotated[
        str | None,
        _option(
            _WHAT,
            "File or folder of text, .bin or .npy of token ids, or a folder that Hugging Face datasets has saved.",
            "the Python standard library",
            metavar="PATH",
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        _option(
            _WHAT,
            "'bytes', a tokenizers JSON file or a folder with one, or 'ids:N'.",
            "bytes, or a model folder's own",
            metavar="bytes|PATH|ids:N",
        ),
    ] = None,
    model: Annotated[
        str | None, _option(_WHAT, "nano, tiny, small, pico, or a Hugging Face folder to go on training.", "nano", metavar="NAME|DIR")
    ] = None,
    documents: Annotated[
        str | None, _option(_WHAT, "joined, or packed: each document by itself, with positions of its own.", "joined")
    ] = None,
    separator: Annotated[int | None, _option(_WHAT, "The id that ends a document.", "the tokenizer's own")] = None,
    token_dtype: Annotated[str | None, _option(_WHAT, "Of a .bin file: uint16 or uint32.", "uint16")] = None,
    text_column: Annotated[str | None, _option(_WHAT, "Of a dataset.", "text")] = None,
    context: Annotated[int | None, _option(_WHAT, "Tokens in one sequence, over all ranks that share it.", "1024")] = None,
    rope_scaling: Annotated[
        str | None, _option(_WHAT, "For a context above the model's own: linear, dynamic or yarn.", "none", metavar="NAME")
    ] = None,
    rope_factor: Annotated[float | None, _option(_WHAT, "How far.", "the context over the model's own")] = None,
    lora_rank: Annotated[
        int | None, _option(_WHAT, "Rank of adapters, which are then all that is trained (peft); 0 for full training.", "0")
    ] = None,
    lora_alpha: Annotated[float | None, _option(_WHAT, "Adapters count alpha / rank times.", "twice the rank")] = None,
    lora_targets: Annotated[str | None, _option(_WHAT, "Names of the layers that get one, by commas.", "all-linear")] = None,
    mask: Annotated[
        str | None,
        _option(
            _WHAT,
            "What a token sees: causal, or causal joined with others, see `ringspan show`. Text is sampled under causal alone.",
            "causal",
        ),
    ] = None,
    steps: Annotated[int | None, _option(_HOW, "Optimizer steps.", "1000")] = None,
    batch_size: Annotated[int | None, _option(_HOW, "Sequences in one forward pass.", "1")] = None,
    accumulate: Annotated[int | None, _option(_HOW, "Times that many are read in one step, whatever the ranks.", "1")] = None,
    seed: Annotated[int | None, _option(_HOW, "Of weights, data order and samples.", "0")] = None,
    optimizer: Annotated[
        str | None, _option(_HOW, "adamw; adamw8bit or adamw4bit keep its moments in few bits (torchao).", "adamw")
    ] = None,
    learning_rate: Annotated[
        float | None, _option(_HOW, "Its peak.", "3e-3 for nano, 2e-3 tiny, 6e-4 small, 1e-2 pico; 2e-5 for a folder, adapters too")
    ] = None,
    warmup_steps: Annotated[int | None, _option(_HOW, "Steps up to the peak.", "20")] = None,
    schedule: Annotated[str | None, _option(_HOW, "After the peak: cosine, linear or constant.", "cosine")] = None,
    final_rate: Annotated[float | None, _option(_HOW, "Where the schedule ends, as a share of the peak.", "0.1")] = None,
    weight_decay: Annotated[float | None, _option(_HOW, "Of matrices.", "0.1")] = None,
    gradient_clip: Annotated[float | None, _option(_HOW, "Largest norm of all gradients together.", "1")] = None,
    on_nan: Annotated[str | None, _option(_HOW, "A loss or gradient that is no number: stop, or skip the update.", "stop")] = None,
    on_spike: Annotated[str | None, _option(_HOW, "A loss far above those before: stop, or skip the update.", "off")] = None,
    spike_factor: Annotated[float | None, _option(_HOW, "How far: times the median of the last losses.", "2")] = None,
    spike_window: Annotated[int | None, _option(_HOW, "Of how many.", "32")] = None,
    dtype: Annotated[str | None, _option(_HOW, "float32 or bfloat16; weights and optimizer stay float32.", "float32")] = None,
    ranks: Annotated[
        int | None,
        _option(_PARALLEL, "Processes: shard × replicate × tensor × those that split a sequence; under torchrun, its own.", "2"),
    ] = None,
    shard: Annotated[int | None, _option(_PARALLEL, "Groups of ranks that read different sequences and share parameters.", "1")] = None,
    replicate: Annotated[int | None, _option(_PARALLEL, "Copies of all that, which read different sequences too.", "1")] = None,
    tensor: Annotated[
        int | None, _option(_PARALLEL, "Ranks that share each layer's heads and columns; no text is sampled then.", "1")
    ] = None,
    shard_parameters: Annotated[
        bool | None,
        _option(
            _PARALLEL,
            "Whether FSDP2 shards parameters, gradients and optimizer over the ranks of a copy.",
            "from ten million parameters on",
            "--shard-parameters/--no-shard-parameters",
        ),
    ] = None,
    parameters_on_host: Annotated[
        bool | None,
        _option(
            _PARALLEL, "Sharded parameters, gradients and optimizer in host memory.", "no", "--parameters-on-host/--parameters-on-device"
        ),
    ] = None,
    rematerialise: Annotated[
        str | None,
        _option(_PARALLEL, "What layers compute again: none, selective, attention_output or full.", "auto, by memory", metavar="NAME"),
    ] = None,
    offload: Annotated[
        bool | None, _option(_PARALLEL, "The checkpoints of such layers in host memory.", "no", "--offload/--no-offload")
    ] = None,
    layers_per_checkpoint: Annotated[
        int | None, _option(_PARALLEL, "Layers that share a checkpoint, for all but attention computed once more.", "1")
    ] = None,
    feed_forward_chunk: Annotated[
        str | None, _option(_PARALLEL, "Tokens that a feed-forward part computes at a time.", "auto, by memory", metavar="N|auto|none")
    ] = None,
    loss_tile: Annotated[
        str | None, _option(_PARALLEL, "Tokens whose logits exist at a time.", "auto, by memory", metavar="N|auto|none")
    ] = None,
    strategy: Annotated[str | None, _option(_PARALLEL, "How queries and keys meet.", "ring")] = None,
    layout: Annotated[str | None, _option(_PARALLEL, "Which positions a rank owns.", "zigzag")] = None,
    kernel: Annotated[str | None, _option(_PARALLEL, "What computes a block; never replaced when named.", "auto")] = None,
    device: Annotated[str | None, _option(_PARALLEL, "auto, cpu or cuda (one GPU a rank).", "auto")] = None,
    timeout_seconds: Annotated[float | None, _option(_PARALLEL, "How long a rank waits for another.", "300")] = None,
    restarts: Annotated[int | None, _option(_PARALLEL, "How often to go on from the last checkpoint where a rank died.", "0")] = None,
    out: Annotated[
        str | None, _option(_LEAVES, "Folder of the run.", "runs/train, or the first free of runs/train-2 …", metavar="DIR")
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(
            help="Options from the config.json of a run, all but --out; those on the command line go first.",
            metavar="FILE",
            show_default=False,
            rich_help_panel=_WHAT,
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in --out, on any number of ranks.", rich_help_panel=_LEAVES)
    ] = False,
    tensorboard: Annotated[
        bool | None, _option(_LEAVES, "Whether to write TensorBoard's files too.", "no", "--tensorboard/--no-tensorboard")
    ] = None,
    export: Annotated[
        str | None, _option(_LEAVES, "Folder for the finished model, as plain transformers loads it.", "none", metavar="DIR")
    ] = None,
    validation_tokens: Annotated[int | None, _option(_LEAVES, "Held-out tokens to measure the loss on.", "16384")] = None,
    validation_every: Annotated[int | None, _option(_LEAVES, "Steps between measurements.", "100")] = None,
    checkpoint_every: Annotated[int | None, _option(_LEAVES, "Steps between checkpoints.", "200")] = None,
    keep_checkpoints: Annotated[int | None, _option(_LEAVES, "How many of the newest stay.", "2", "--keep-checkpoints", "--keep")] = None,
    sample_tokens: Annotated[int | None, _option(_LEAVES, "Length of the text generated before and after; 0 for none.", "300")] = None,
    prompt: Annotated[str | None, _option(_LEAVES, "What that text starts from.", "held-out text")] = None,
    temperature: Annotated[float | None, _option(_LEAVES, "Of that text; 0 takes the likeliest.", "0.8")] = None,
) -> None:
    """Train a transformer on a text, with its context split exactly over several processes.

    Ctrl-C or SIGTERM lets the step end, writes a checkpoint and says how to go on; the exit status is then 130 or 143. What cannot be done
    is said before anything starts, with exit status 2.
    """
    given = {name: value for name, value in locals().items() if value is not None and name not in ("resume", "config")}
    if config is not None:
        from ringspan.training.config import TrainingConfig

        if resume:
            raise RingspanError("--config with --resume", "a run that goes on has its configuration", "One of them", "leaving --config out")
        given = TrainingConfig.options(Path(config)) | given
    raise typer.Exit(run(given, resume=resume))


def run(given: dict[str, Any], *, resume: bool) -> int:
    """Trains with the options `given` by field name, and returns the exit status.

    Raises:
        RingspanError: for everything that stands in the way, and where a rank fails.
    """
    from ringspan.transport import is_launched

    if is_launched():
        from ringspan.cli.train_rank import under_torchrun

        # torchrun takes any status but 0 for a failure, and a run that was asked to stop has not failed.
        under_torchrun(given, resume=resume, show_plan=_show)
        return 0
    from ringspan.cli.train_rank import go_on
    from ringspan.training.checkpoint import list_checkpoints
    from ringspan.training.launch import launch
    from ringspan.training.prepare import prepare

    plan = prepare(given, resume=resume)
    _show(plan)
    if plan.first_step >= plan.config.steps:
        print(f"all {plan.config.steps} steps are taken; --steps {2 * plan.first_step} would go on")
        return 0
    try:
        outcome = launch(plan, "ringspan.cli.train_rank", _say)
    except KeyboardInterrupt as end:
        whole = list_checkpoints(plan.files.checkpoints)
        _say(f"ended at once; to go on from {whole[-1].name}: {go_on(plan.files.out)}" if whole else "ended at once, before any checkpoint")
        return _SIGNAL_STATUS[str(end) or "SIGINT"]
    return _SIGNAL_STATUS[outcome.stopped_by] if outcome.stopped_by else 0


def _say(line: str) -> None:
    from rich.console import Console

    Console(stderr=True).print(line, highlight=False, soft_wrap=True)


def _show(plan: Plan) -> None:
    """Prints the configuration, three choices a row, and what is to be known about it."""
    from rich.console import Console
    from rich.table import Table

    from ringspan.training.notes import notes

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    cells = [f"[dim]{name}[/dim] {value!s}" for name, value in asdict(plan.config).items() if value not in ("", None, False)]
    for start in range(0, len(cells), 3):
        table.add_row(*cells[start : start + 3])
    console = Console()
    console.print(table, highlight=False)
    for note in notes(plan.config):
        console.print(f"note: {note}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    console.print(f"[dim]starting {plan.config.ranks} processes on {plan.config.device} …[/dim]", highlight=False)
