"""What a training run is: one frozen object, printed at the start, saved as `config.json`, and read back to go on."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ringspan.errors import RingspanError, nearest_name
from ringspan.training.manifest import write_whole

STDLIB = "stdlib"
BYTES = "bytes"
DTYPES = ("float32", "bfloat16")
DEVICES = ("auto", "cpu", "cuda")
DOCUMENTS = ("joined", "packed")
TOKEN_DTYPES = ("uint16", "uint32")
OPTIMIZERS = ("adamw", "adamw8bit", "adamw4bit")
SCHEDULES = ("cosine", "linear", "constant")
ON_NAN = ("stop", "skip")
# What a resumed run may change: none of these enters the weights, except `steps`, which stretches the learning rate's schedule.
CHANGEABLE = frozenset(
    {"ranks", "strategy", "layout", "kernel", "device", "steps", "out", "checkpoint_every", "keep_checkpoints", "validation_every"}
    | {"sample_tokens", "temperature", "prompt", "timeout_seconds", "on_nan", "on_spike", "spike_factor", "spike_window"}
    | {"restarts", "tensorboard", "export", "shard", "replicate", "tensor", "shard_parameters", "parameters_on_host"}
    | {"feed_forward_chunk", "loss_tile", "rematerialise", "offload", "layers_per_checkpoint"}
)
_AT_LEAST = {
    "ranks": 1,
    "shard": 1,
    "replicate": 1,
    "tensor": 1,
    "context": 2,
    "batch_size": 1,
    "layers_per_checkpoint": 1,
    "accumulate": 1,
    "spike_window": 1,
    "steps": 1,
    "seed": 0,
    "warmup_steps": 0,
    "validation_tokens": 1,
    "validation_every": 1,
    "checkpoint_every": 1,
    "keep_checkpoints": 1,
    "restarts": 0,
    "lora_rank": 0,
    "sample_tokens": 0,
}


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Every choice of a training run.

    Args:
        data: a file or folder of text, or `"stdlib"`: the Python standard library's own source; a `.bin` or `.npy` file of token ids; a
            folder that Hugging Face datasets has saved.
        tokenizer: `"bytes"`, a tokenizers JSON file, a folder that holds `tokenizer.json`, or `"ids:N"` for N ids without text; None is
            the model's own.
        documents: `"joined"`: a context runs on from one document into the next; `"packed"`: a token sees its own document alone,
            positions begin again in each, and no token predicts the first of the next.
        separator: the id that ends a document; None is the tokenizer's own.
        token_dtype: of a `.bin` file: `"uint16"` or `"uint32"`.
        text_column: of a dataset.
        model: a name of `ringspan.training.model.PRESETS`, or a Hugging Face folder to go on training.
        rope_scaling: for a `context` above that of the model in a folder: `"linear"`, `"dynamic"` or `"yarn"`; None leaves its positions
            as they are.
        rope_factor: how far; None is as far as `context` needs.
        lora_rank: of adapters through peft, which are then all that is trained; 0 trains every weight.
        lora_alpha: they count alpha / rank times; None is twice the rank.
        lora_targets: `"all-linear"`, or the ends of module names, joined by commas.
        ranks: number of processes. Those that the next three leave share each sequence: ranks / (shard · replicate · tensor).
        shard: groups of ranks that read different sequences and share the parameters.
        replicate: copies of all that, which read different sequences too; parameters are sharded within a copy, not over them.
        tensor: ranks that share the heads and columns of each layer.
        shard_parameters: whether FSDP2 shards parameters, gradients and optimizer over the ranks of a copy; None does from ten million
            parameters on, see `ringspan.training.spread`.
        parameters_on_host: whether sharded parameters, gradients and optimizer live in host memory; the CPU then takes the step.
        rematerialise: what layers keep for their backward, see `ringspan.transformer.MODES`; `"auto"` chooses by memory.
        offload: whether the checkpoints of rematerialised layers go to host memory.
        layers_per_checkpoint: how many layers share one, for all but attention computed once more.
        feed_forward_chunk: tokens that feed-forward parts compute at a time: a number, `"auto"`, or `"none"` for all.
        loss_tile: tokens whose logits exist at a time: a number, `"auto"`, or `"none"` for all.
        context: tokens in one sequence, over all ranks that share it.
        batch_size: sequences in one forward pass.
        accumulate: a step reads `batch_size · accumulate` sequences, on whatever mesh: passes of `batch_size` at most, dealt out to those
            who read different ones, each token weighing the same.
        steps: optimizer steps.
        seed: of the first weights, the order of the data and the samples; in 0 … 2⁶³ − 1.
        optimizer: `"adamw"`, or with moments of few bits `"adamw8bit"` or `"adamw4bit"`, through torchao.
        learning_rate: its peak, reached after `warmup_steps`; None is the preset's, and 2e-5 for a folder, adapters too.
        schedule: what follows the peak until the last step: `"cosine"` (half of one), `"linear"`, or `"constant"`.
        final_rate: where the schedule ends, as a share of the peak.
        weight_decay: AdamW's, on matrices only.
        gradient_clip: largest norm of all gradients together.
        on_nan: what a loss or gradient norm that is no finite number does: `"stop"` the run, or `"skip"` the step's update.
        on_spike: the same for a loss above `spike_factor` times the median of the last `spike_window` losses; None does nothing.
        strategy, layout, kernel, mask: as in `ringspan.ContextParallel`.
        dtype: what the model computes in; weights and optimizer are float32 whichever it is.
        device: `"cuda"` wants one GPU a rank; `"auto"` takes them where there are enough.
        out: folder for everything that the run leaves.
        tensorboard: whether to write TensorBoard's files too.
        export: a folder for the finished model as plain transformers loads it; empty writes none.
        validation_tokens: held-out tokens to measure the loss on, rounded to whole contexts, at least one.
        validation_every, checkpoint_every: in steps; both also happen at the end.
        keep_checkpoints: how many of the newest stay.
        sample_tokens: length of the text generated before and after; 0 for none.
        temperature: of that text; 0 takes the likeliest token.
        prompt: what that text starts from; empty takes the beginning of the held-out text.
        timeout_seconds: how long a rank waits for another before it gives up.
        restarts: how often the ranks are started again, from the last checkpoint, where one of them died; under torchrun its own count.
    """

    data: str = STDLIB
    tokenizer: str | None = None
    documents: str = "joined"
    separator: int | None = None
    token_dtype: str = "uint16"
    text_column: str = "text"
    model: str = "nano"
    rope_scaling: str | None = None
    rope_factor: float | None = None
    lora_rank: int = 0
    lora_alpha: float | None = None
    lora_targets: str = "all-linear"
    ranks: int = 2
    shard: int = 1
    replicate: int = 1
    tensor: int = 1
    shard_parameters: bool | None = None
    parameters_on_host: bool = False
    rematerialise: str = "auto"
    offload: bool = False
    layers_per_checkpoint: int = 1
    feed_forward_chunk: str = "auto"
    loss_tile: str = "auto"
    context: int = 1024
    batch_size: int = 1
    accumulate: int = 1
    steps: int = 1000
    seed: int = 0
    optimizer: str = "adamw"
    learning_rate: float | None = None
    warmup_steps: int = 20
    schedule: str = "cosine"
    final_rate: float = 0.1
    weight_decay: float = 0.1
    gradient_clip: float = 1.0
    on_nan: str = "stop"
    on_spike: str | None = None
    spike_factor: float = 2.0
    spike_window: int = 32
    strategy: str = "ring"
    layout: str = "zigzag"
    kernel: str = "auto"
    mask: str = "causal"
    dtype: str = "float32"
    device: str = "auto"
    out: str = "runs/train"
    tensorboard: bool = False
    export: str = ""
    validation_tokens: int = 16384
    validation_every: int = 100
    checkpoint_every: int = 200
    keep_checkpoints: int = 2
    sample_tokens: int = 300
    temperature: float = 0.8
    prompt: str = ""
    timeout_seconds: float = 300.0
    restarts: int = 0

    def check(self) -> None:
        """Checks every count and number on its own; what needs the disk or the machine is checked in `ringspan.training.prepare`.

        Raises:
            RingspanError: naming the option, what was given and what works.
        """
        for name, least in _AT_LEAST.items():
            value = getattr(self, name)
            if value < least:
                default = _default(name)
                raise RingspanError(
                    f"{option(name)} {value}", "too small", f"{option(name)} is a whole number from {least} up", f"{option(name)} {default}"
                )
        if not self.out.strip():
            raise RingspanError(f"--out {self.out!r}", "it is no name", "A run is kept in a folder", "--out runs/train")
        if self.seed >= 2**63:
            raise RingspanError(f"--seed {self.seed}", "too large", "A seed is below 2^63", "--seed 0")
        for name in ("learning_rate", "gradient_clip", "timeout_seconds", "spike_factor", "rope_factor", "lora_alpha"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                nearest = _default(name) or 0.001
                raise RingspanError(
                    f"{option(name)} {value}", "not above zero", f"{option(name)} is a positive number", f"{option(name)} {nearest}"
                )
        for name in ("weight_decay", "temperature", "final_rate"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise RingspanError(
                    f"{option(name)} {value}",
                    "below zero",
                    f"{option(name)} is zero or a positive number",
                    f"{option(name)} {_default(name)}",
                )
        check_name("dtype", self.dtype, DTYPES)
        check_name("device", self.device, DEVICES)
        check_name("documents", self.documents, DOCUMENTS)
        check_name("token_dtype", self.token_dtype, TOKEN_DTYPES)
        check_name("optimizer", self.optimizer, OPTIMIZERS)
        check_name("schedule", self.schedule, SCHEDULES)
        check_name("on_nan", self.on_nan, ON_NAN)
        if self.on_spike is not None:
            check_name("on_spike", self.on_spike, ON_NAN)
        if self.spike_factor <= 1:
            raise RingspanError(
                f"--spike-factor {self.spike_factor}", "every loss would be a spike", "A spike is above the median", "--spike-factor 2.0"
            )
        if self.final_rate > 1:
            raise RingspanError(
                f"--final-rate {self.final_rate}", "above the peak", "It is a share of the peak, from 0 to 1", "--final-rate 0.1"
            )

    def save(self, path: Path) -> None:
        """Writes the configuration as JSON."""
        write_whole(path, json.dumps(asdict(self), indent=2) + "\n")

    @staticmethod
    def load(path: Path) -> TrainingConfig:
        """Reads what `save` wrote.

        Raises:
            RingspanError: for a missing file, or one that is no configuration.
        """
        try:
            kept = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise RingspanError(
                f"configuration {path}", str(error), "A run keeps its configuration in config.json", "start a new run with another --out"
            ) from None
        return TrainingConfig(**_typed(kept, f"configuration {path}"))

    @staticmethod
    def options(path: Path) -> dict[str, Any]:
        """The choices in a file that `save` or a hand wrote, for another run: all that it names, but for `out`.

        Raises:
            RingspanError: for a file that is no JSON object, a name that is no option, and a value of another type.
        """
        try:
            given = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise RingspanError(f"--config {path}", str(error), "A configuration is a JSON object", "the config.json of a run") from None
        return {name: value for name, value in _typed(given, f"--config {path}").items() if name != "out"}

    def resumed(self, given: dict[str, Any]) -> TrainingConfig:
        """This saved configuration with the options `given` for going on; None is an option that was not given.

        Raises:
            RingspanError: for an option that would make it another run.
        """
        given = {name: value for name, value in given.items() if value is not None}
        for name, value in given.items():
            kept = getattr(self, name)
            if name not in CHANGEABLE and not _same(name, kept, value):
                raise RingspanError(
                    f"{option(name)} {value} with --resume",
                    f"this run has {kept}",
                    f"A resumed run goes on as if it had never stopped, so {option(name)} stays",
                    f"leave {option(name)} out, or start a new run with another --out (`ringspan export` makes a --model of this one)",
                )
        return replace(self, **{name: value for name, value in given.items() if name in CHANGEABLE})


def option(name: str) -> str:
    """The command-line option of a field: `batch_size` -> `--batch-size`."""
    return "--" + name.replace("_", "-")


def check_name(field: str, name: str, known: tuple[str, ...]) -> None:
    """Raises RingspanError where `name` is not one of the `known` names of `field`."""
    if name not in known:
        raise RingspanError(
            f"{option(field)} {name}",
            "unknown",
            f"{option(field)} is one of {', '.join(known)}",
            f"{option(field)} {nearest_name(name, known)}",
        )


def _typed(given: Any, asked: str) -> dict[str, Any]:
    """What was read from a configuration's JSON, if its names are those of options and its values of their types."""
    kinds = {field.name: str(field.type) for field in fields(TrainingConfig)}
    unknown = sorted(set(given) - set(kinds)) if isinstance(given, dict) else ["no object"]
    if unknown:
        raise RingspanError(asked, f"it has {', '.join(unknown)}", "Its names are those of the options", f"some of {', '.join(kinds)}")
    for name, value in given.items():
        kind = "None" if value is None else type(value).__name__
        if kind not in kinds[name].split(" | ") and not (kind == "int" and "float" in kinds[name]):
            raise RingspanError(asked, f"{name} is {value!r}", f"{name} is of type {kinds[name]}", f"{name}: {_default(name)!r}")
    return given


def _default(name: str) -> Any:
    return next(field.default for field in fields(TrainingConfig) if field.name == name)


def _same(name: str, kept: Any, given: Any) -> bool:
    if name in {"data", "tokenizer", "model"}:
        return kept == given or (kept is not None and Path(kept).resolve() == Path(given).resolve())
    return kept == given
