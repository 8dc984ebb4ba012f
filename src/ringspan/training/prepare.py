"""Everything that can be refused before a process is started, and the plan that is left."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from ringspan.errors import RingspanError
from ringspan.training.checkpoint import MODEL, TrainingState, list_checkpoints, verify_checkpoint
from ringspan.training.config import BYTES, TrainingConfig, option
from ringspan.training.export import check_target
from ringspan.training.folders import free_folder, mark, newest_folder, occupied, own_folder
from ringspan.training.lora import check_lora, weights_digest
from ringspan.training.low_memory import check_low_memory
from ringspan.training.machine import check_attention, check_kernel, settled_device
from ringspan.training.model import PRESETS, check_model, check_vocabulary, checkpoint_bytes, default_learning_rate, stretched_config
from ringspan.training.notes import is_own_name
from ringspan.training.plan import Plan, RunFiles
from ringspan.training.spread import check_spread
from ringspan.training.tensorboard import check_tensorboard
from ringspan.training.token_files import find_ids, is_token_file
from ringspan.training.tokenizer import IDS, Tokenizer, load_tokenizer
from ringspan.training.tokens import Split, TokenFile, ensure_tokens, load_tokens

Result = TypeVar("Result")
DEFAULT_OUT = Path(TrainingConfig().out)
_OF = {
    "rope_factor": ("rope_scaling", "linear"),
    "lora_alpha": ("lora_rank", "16"),
    "lora_targets": ("lora_rank", "16"),
    "spike_factor": ("on_spike", "skip"),
    "spike_window": ("on_spike", "skip"),
}
"""Options that do nothing without another, and what would have them do something."""


def prepare(given: dict[str, Any], *, resume: bool, world_size: int | None = None) -> Plan:
    """Checks what was asked for against this machine and its disk, writes the token file, and settles every open choice.

    Args:
        given: the options that were given, by field name of TrainingConfig.
        resume: whether to go on from the last checkpoint in `out`.
        world_size: number of ranks that torchrun started; None where the launcher starts them.

    Raises:
        RingspanError: for everything that stands in the way; nothing has been started then.
    """
    if world_size is not None:
        if given.get("ranks", world_size) != world_size:
            raise RingspanError(
                f"--ranks {given['ranks']}", f"torchrun started {world_size}", "Under torchrun its ranks are used", f"--ranks {world_size}"
            )
        given = given | {"ranks": world_size}
    plan = _prepare_resumed(given) if resume else _prepare_new(given)
    if world_size is not None:
        _writing(lambda: mark(plan.files.out), plan.files.out)
    return plan


def _prepare_new(given: dict[str, Any]) -> Plan:
    defaults: dict[str, Any] = {"out": str(free_folder(DEFAULT_OUT))}
    config = TrainingConfig(**defaults | given)
    config.check()
    _check_used(config)
    config = _settled(config, config.model)
    if config.rope_scaling is not None:
        stretched_config(config.model, config.context, config.rope_scaling, config.rope_factor)
    files = RunFiles(Path(config.out))
    # os.path's `exists`: pathlib's raises where one may not look, and what is wrong with the folder is said below.
    used = [path for path in (files.checkpoints, files.metrics) if os.path.exists(path)]
    if used:
        # A live run is named as such, whether or not it has a checkpoint yet.
        _check_unoccupied(files.out)
        whole = list_checkpoints(files.checkpoints)
        raise RingspanError(
            f"--out {config.out}",
            f"it holds a run already ({used[0].name}{'' if whole else ', which ended before its first checkpoint'})",
            "One folder keeps one run",
            "--resume to go on with it, or another --out" if whole else f"another --out, or removing {config.out}",
        )
    was_there = os.path.exists(files.out)
    try:
        _check_writable(files.out)
        # A run that has just been started has written nothing yet but what this one would write over.
        _check_unoccupied(files.out)
        tokens = _writing(lambda: _tokens(files, config), files.out)
        Split.of(tokens, config.context)
        vocabulary = load_tokenizer(config.tokenizer or BYTES).vocabulary_size
        check_vocabulary(config.model, vocabulary)
        _check_room(config, 0 if config.lora_rank else checkpoint_bytes(config.model, vocabulary), files.out)
        _writing(lambda: config.save(files.config), files.out)
    except RingspanError:
        # A run that never was leaves no folder: it would take the name from the next, and the room of its tokens.
        if not was_there:
            shutil.rmtree(files.out, ignore_errors=True)
        raise
    return Plan(config=config, tokens=tokens, checkpoint=None, first_step=0)


def restarted(plan: Plan) -> Plan:
    """The plan of ranks that are started again: from the last checkpoint, or anew where there is none yet.

    Raises:
        RingspanError: for a checkpoint that is damaged.
    """
    checkpoints = list_checkpoints(plan.files.checkpoints)
    if not checkpoints:
        return replace(plan, checkpoint=None, first_step=0)
    return replace(plan, checkpoint=str(checkpoints[-1]), first_step=verify_checkpoint(checkpoints[-1]).step)


def prepare_restarted(given: dict[str, Any], *, world_size: int) -> Plan:
    """The same where it was torchrun itself that started the ranks again, with the options of the first start.

    Raises:
        RingspanError: as `prepare` does, and where no `out` is given and none of the folders there can be told to be this job's.
    """
    out = Path(given["out"]) if given.get("out") else own_folder(DEFAULT_OUT)
    if out is None or not RunFiles(out).config.is_file() or (tokens := load_tokens(RunFiles(out).tokens)) is None:
        return prepare(given, resume=False, world_size=world_size)
    files, given = RunFiles(out), given | {"out": str(out)}
    if list_checkpoints(files.checkpoints):
        return prepare(given, resume=True, world_size=world_size)
    config = TrainingConfig.load(files.config).resumed(given | {"ranks": world_size})
    config.check()
    return Plan(config=_settled(config, config.model), tokens=tokens, checkpoint=None, first_step=0)


def _prepare_resumed(given: dict[str, Any]) -> Plan:
    out = Path(given.get("out") or newest_folder(DEFAULT_OUT))
    files = RunFiles(out)
    checkpoints = list_checkpoints(files.checkpoints)
    if not checkpoints:
        held = os.path.exists(files.metrics)
        if held:
            _check_unoccupied(out)
        hint = f"leaving --resume out, with another --out or after removing {out}" if held else "leaving --resume out"
        raise RingspanError(f"--resume with --out {out}", "there is no checkpoint in it", "A run goes on from its last checkpoint", hint)
    config = TrainingConfig.load(files.config).resumed(given | {"out": str(out)})
    config.check()
    if config.export and not given.get("export"):
        config = replace(config, export=str(_free_target(Path(config.export))))
    state = verify_checkpoint(checkpoints[-1])
    if config.steps < state.step:
        asked, found = f"--steps {config.steps} with --resume", f"{state.step} are taken"
        raise RingspanError(asked, found, "A run goes on and not back", f"--steps {2 * state.step}")
    # The folder that the run once began from need not be there any more.
    model = config.model if config.model in PRESETS or config.lora_rank else str(checkpoints[-1] / MODEL)
    if config.lora_rank:
        _check_base(config, state)
    config = _settled(config, model, with_weights=bool(config.lora_rank))
    _check_writable(files.out)
    _check_unoccupied(files.out)
    tokens = _same_tokens(config, files, state)
    _check_room(config, _folder_bytes(checkpoints[-1]), files.out)
    _writing(lambda: config.save(files.config), files.out)
    return Plan(config=config, tokens=tokens, checkpoint=str(checkpoints[-1]), first_step=state.step)


def _free_target(wanted: Path) -> Path:
    """Where a run that goes on exports to: beside what it exported when it ended before."""
    try:
        check_target(wanted)
    except RingspanError:
        return free_folder(wanted)
    return wanted


def _settled(config: TrainingConfig, model: str, *, with_weights: bool = True) -> TrainingConfig:
    """The configuration with every choice made that was left to the `model` (a preset, or a folder as it is now) or the machine."""
    check_spread(config)
    check_attention(config)
    check_model(model, with_weights=with_weights)
    device = settled_device(config)
    check_kernel(config, model, device)
    tokenizer = config.tokenizer or _own_tokenizer(config)
    _check_documents(config, load_tokenizer(tokenizer))
    if config.lora_rank:
        check_lora(config.model, config.model in PRESETS)
    if config.optimizer != "adamw":
        check_low_memory(config.optimizer)
    if config.tensorboard:
        check_tensorboard()
    if config.export:
        check_target(Path(config.export))
    rate = config.learning_rate or default_learning_rate(config.model)
    # Ranks may be started elsewhere, and a checkpoint is gone on with from anywhere.
    paths = {
        name: str(Path(value).resolve())
        for name, value in (("data", config.data), ("model", config.model), ("tokenizer", tokenizer))
        if not is_own_name(name, value) and Path(value).exists()
    }
    return replace(config, **{"tokenizer": tokenizer, "learning_rate": rate, "device": device} | paths)


def _tokens(files: RunFiles, config: TrainingConfig) -> TokenFile:
    return ensure_tokens(
        files.tokens,
        config.data,
        config.tokenizer or BYTES,
        token_dtype=config.token_dtype,
        text_column=config.text_column,
        separator=config.separator,
    )


def _check_documents(config: TrainingConfig, tokenizer: Tokenizer) -> None:
    separator = tokenizer.separator if config.separator is None else config.separator
    if separator is not None and not 0 <= separator < tokenizer.vocabulary_size:
        raise RingspanError(
            f"--separator {separator}", f"the vocabulary has {tokenizer.vocabulary_size} ids", "A separator is one of them", "--separator 0"
        )
    if config.documents == "packed" and separator is None:
        raise RingspanError(
            "--documents packed",
            f"tokenizer {tokenizer.name} names no end of a text",
            "Documents are told apart by the token that ends them",
            "--separator with its id, or --documents joined",
        )


def _check_used(config: TrainingConfig) -> None:
    """That no option was given which would do nothing: who sets a rank's alpha believes that there are adapters."""
    for name, (owner, value) in _OF.items():
        if getattr(config, name) != getattr(TrainingConfig(), name) and not getattr(config, owner):
            asked = f"{option(name)} {getattr(config, name)} without {option(owner)}"
            raise RingspanError(asked, "it would change nothing", "Nothing that is asked for is ignored", f"{option(owner)} {value}")


def _own_tokenizer(config: TrainingConfig) -> str:
    """The tokenizer where none was named: the model's own, bytes for a preset, and for a preset on a file of ids as many as it holds."""
    if config.model not in PRESETS:
        return config.model
    return f"{IDS}{find_ids(config.data, config.token_dtype).largest() + 1}" if is_token_file(config.data) else BYTES


def _same_tokens(config: TrainingConfig, files: RunFiles, state: TrainingState) -> TokenFile:
    """The token file that the run began with: as it lies there, or written again from the same text."""
    tokens = load_tokens(files.tokens)
    if tokens is None or not tokens.is_whole():
        tokens = _writing(lambda: _tokens(files, config), files.out)
    if tokens.digest != state.tokens_digest:
        raise RingspanError(
            f"--resume with --data {config.data}",
            "its text is no longer what the run began with",
            "A resumed run reads on where it stopped, in the same text",
            f"`ringspan export {files.out} DIR`, and a new run on the new text with another --out and --model DIR",
        )
    return tokens


def _check_writable(out: Path) -> None:
    def probe() -> None:
        out.mkdir(parents=True, exist_ok=True)
        file = out / ".writable"
        file.write_bytes(b"ringspan")
        file.unlink()

    _writing(probe, out)


def _check_unoccupied(out: Path) -> None:
    def probe() -> None:
        with occupied(out):
            pass

    _writing(probe, out)


def _check_base(config: TrainingConfig, state: TrainingState) -> None:
    """Adapters are trained further only on the weights that they were trained on."""
    if not list(Path(config.model).glob("*.safetensors")) or weights_digest(Path(config.model)) != state.base_digest:
        raise RingspanError(
            f"--resume with adapters for {config.model}",
            "its weights are no longer there, or others",
            "Adapters belong to the weights that they were trained on",
            "putting them back, or a new run with another --out",
        )


def _check_room(config: TrainingConfig, size: int, out: Path) -> None:
    """Whether there is room for checkpoints of `size` bytes each; those of adapters count nothing beside the model, which is there."""
    checkpoints = RunFiles(out).checkpoints
    # One more than is kept: the new one is whole before the oldest goes. What a killed run left half written goes before.
    needed = size * max(1, config.keep_checkpoints + 1 - len(list_checkpoints(checkpoints)))
    free = shutil.disk_usage(out).free + sum(_folder_bytes(left) for left in checkpoints.glob(".step-*"))
    if free < needed:
        raise RingspanError(
            f"--out {out}",
            f"{_megabytes(free)} are free and checkpoints need {_megabytes(needed)}",
            f"There must be room for {config.keep_checkpoints} checkpoints and the next one",
            f"an --out on a larger disk, a smaller --model, or {option('keep_checkpoints')} 1",
        )


def _megabytes(size: int) -> str:
    """Of a small disk with two decimals, so that what is free and what is needed do not read alike."""
    return f"{size / 1e6:.{2 if size < 1e7 else 0}f} MB"


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _writing(write: Callable[[], Result], out: Path) -> Result:
    """Calls `write`, and says what is wrong with the folder where the operating system refuses."""
    try:
        return write()
    except OSError as error:
        raise RingspanError(
            f"--out {out}",
            f"{error.strerror} ({error.filename or out})",
            "A run writes its checkpoints, metrics and tokens there",
            "an --out that you may write to, with room",
        ) from None
