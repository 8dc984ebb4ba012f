"""A checkpoint as a Hugging Face folder that plain transformers loads, without ringspan: configuration, safetensors, tokenizer,
and what the model it began from says of chats and of generating."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from ringspan.errors import RingspanError
from ringspan.training.checkpoint import MODEL, list_checkpoints, read_weights, verify_checkpoint, weight_sizes, write_tensors
from ringspan.training.config import BYTES, TrainingConfig
from ringspan.training.lora import ADAPTER, ADAPTER_CONFIG, ADAPTER_TENSORS, merged
from ringspan.training.model import build_model
from ringspan.training.plan import RunFiles

FILE_BYTES = 4 << 30
"""Of one safetensors file of an exported model."""
_TOKENIZER, _DESCRIPTION = "tokenizer.json", "tokenizer_config.json"


def check_target(target: Path) -> None:
    """Whether a model may be written to `target`.

    Raises:
        RingspanError: where something is there already.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RingspanError(
            f"export to {target}",
            "something is there already",
            "A model gets a folder of its own",
            f"{target}-2, or rm -r {target}",
        )


def find_checkpoint(source: Path) -> tuple[Path, Path]:
    """A checkpoint and the run that it belongs to: `source` is the one or the other.

    Raises:
        RingspanError: where it is neither.
    """
    if (source / MODEL / "config.json").is_file():
        checkpoint = source.resolve()
        return checkpoint, checkpoint.parents[1]
    whole = list_checkpoints(RunFiles(source).checkpoints)
    if not whole:
        raise RingspanError(
            f"export of {source}", "there is no checkpoint in it", "A run or one of its checkpoints is exported", "runs/train"
        )
    return whole[-1], source


def export(source: Path, target: Path) -> Path:
    """Writes the model of a run's last checkpoint, or of the checkpoint given, to `target`, which is whole once it is there.

    Weights are float32, as they were trained, with adapters merged into them. A model of bytes gets a tokenizer that turns text into its
    UTF-8 bytes.

    Returns:
        The checkpoint that was exported.

    Raises:
        RingspanError: where there is none, where it is damaged, where `target` is taken or the disk refuses.
    """
    checkpoint, run = find_checkpoint(source)
    check_target(target)
    verify_checkpoint(checkpoint)
    partial = target.with_name(f".{target.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.parent.mkdir(parents=True, exist_ok=True)
        config = TrainingConfig.load(RunFiles(run).config)
        shutil.copytree(checkpoint / MODEL, partial)
        if config.lora_rank:
            _merge(checkpoint, config, partial)
        else:
            _write_weights(checkpoint, partial)
        _complete_tokenizer(partial, config.tokenizer)
        if target.exists():
            target.rmdir()
        partial.rename(target)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise RingspanError(f"export to {target}", str(error), "There must be room for the model", "another folder") from None
    return checkpoint


def _write_weights(checkpoint: Path, folder: Path) -> None:
    """The weights, whole, in files that each fit in memory beside nothing else, with an index where they are several."""
    files: list[dict[str, int]] = [{}]
    for name, size in weight_sizes(checkpoint).items():
        if files[-1] and sum(files[-1].values()) + 4 * size.numel() > FILE_BYTES:
            files.append({})
        files[-1][name] = 4 * size.numel()
    places: dict[str, str] = {}
    for number, names in enumerate(files, start=1):
        file = "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        write_tensors(read_weights(checkpoint, names), folder, file)
        places |= dict.fromkeys(names, file)
    if len(files) > 1:
        index = {"metadata": {"total_size": sum(sum(names.values()) for names in files)}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _merge(checkpoint: Path, config: TrainingConfig, folder: Path) -> None:
    """The run's model with its adapters added to its weights."""
    from safetensors.torch import load_file

    described = json.loads((checkpoint / ADAPTER / ADAPTER_CONFIG).read_text())
    adapter = load_file(checkpoint / ADAPTER / ADAPTER_TENSORS)
    base = build_model(
        config.model,
        vocabulary_size=1,
        context=config.context,
        seed=config.seed,
        rope_scaling=config.rope_scaling,
        rope_factor=config.rope_factor,
    )
    weights = {name: parameter.detach() for name, parameter in base.named_parameters()}
    write_tensors(merged(weights, adapter, described["lora_alpha"] / described["r"]), folder)


def _complete_tokenizer(folder: Path, name: str | None) -> None:
    """What `AutoTokenizer` wants beside what the run had: the class, and for bytes the tokenizer itself."""
    if name == BYTES:
        (folder / _TOKENIZER).write_text(byte_tokenizer())
    if (folder / _TOKENIZER).is_file() and not (folder / _DESCRIPTION).is_file():
        description = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        (folder / _DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")


def byte_tokenizer() -> str:
    """A `tokenizer.json` under which every byte of the text's UTF-8 is the id of its value."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer.to_str()


def _byte_characters() -> list[str]:
    """The character by which byte-level tokenizers write each byte: itself where it prints, else the next from 256 on (GPT-2's table)."""
    printing = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printing else next(others)) for byte in range(256)]
