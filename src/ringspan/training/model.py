"""The model: a small Llama of our own sizes, or any Hugging Face decoder in a folder, with ringspan's attention."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ringspan.errors import RingspanError
from ringspan.training.rope import base_for, check_scaling, scaled

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

ATTENTION = "ringspan"
_ONE_AT_A_TIME = threading.RLock()
"""While a model is made without first weights transformers switches torch's initialisers off, for every thread of the process."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """The sizes of a built-in Llama, and the learning rate that suits them.

    Every head is `hidden / heads` wide, and the feed-forward part is SwiGLU.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    feed_forward: int
    learning_rate: float
    purpose: str

    def num_parameters(self, vocabulary_size: int) -> int:
        """Of the whole model, with separate input and output embeddings."""
        head_dim = self.hidden // self.heads
        attention = 2 * self.hidden * self.hidden + 2 * self.hidden * self.kv_heads * head_dim
        layer = attention + 3 * self.hidden * self.feed_forward + 2 * self.hidden
        return 2 * vocabulary_size * self.hidden + self.layers * layer + self.hidden


PRESETS = {
    "nano": Preset(hidden=128, layers=3, heads=4, kv_heads=2, feed_forward=256, learning_rate=3e-3, purpose="minutes on a laptop"),
    "tiny": Preset(hidden=256, layers=6, heads=8, kv_heads=4, feed_forward=768, learning_rate=2e-3, purpose="an hour on a laptop"),
    "small": Preset(hidden=768, layers=12, heads=12, kv_heads=4, feed_forward=2048, learning_rate=6e-4, purpose="one or more GPUs"),
    "pico": Preset(hidden=32, layers=2, heads=4, kv_heads=2, feed_forward=64, learning_rate=1e-2, purpose="seconds, to see it run"),
}
CONTINUED_LEARNING_RATE = 2e-5


def default_learning_rate(model: str) -> float:
    """The peak learning rate of a preset, or a careful one for a model that is trained already."""
    return PRESETS[model].learning_rate if model in PRESETS else CONTINUED_LEARNING_RATE


def check_model(model: str, *, with_weights: bool = True) -> None:
    """Whether `--model` names a preset or a folder that transformers can read, without importing transformers.

    Args:
        with_weights: whether the folder must hold them; a checkpoint keeps them elsewhere.

    Raises:
        RingspanError: where it names neither.
    """
    if model in PRESETS:
        return
    folder = Path(model)
    rule = f"A model is one of {', '.join(PRESETS)}, or a Hugging Face folder with config.json and safetensors"
    if not folder.is_dir():
        raise RingspanError(f"--model {model}", "no such name and no such folder", rule, "--model nano")
    if not (folder / "config.json").is_file():
        raise RingspanError(f"--model {model}", "the folder has no config.json", rule, "--model nano")
    if with_weights and not list(folder.glob("*.safetensors")):
        is_checkpoint = (folder.parent / "tensors").is_dir()
        nearest = f"`ringspan export {folder.parent} DIR` and --model DIR" if is_checkpoint else "--model nano"
        raise RingspanError(f"--model {model}", "the folder has no .safetensors file", rule, nearest)


def head_sizes(model: str) -> tuple[int, int, int]:
    """Query heads, key and value heads, and the width of a head."""
    if model in PRESETS:
        preset = PRESETS[model]
        return preset.heads, preset.kv_heads, preset.hidden // preset.heads
    described = _read_config(model)
    try:
        heads = described["num_attention_heads"]
        return heads, described.get("num_key_value_heads") or heads, described.get("head_dim") or described["hidden_size"] // heads
    except (KeyError, TypeError):
        raise RingspanError(
            f"--model {model}", "its config.json names no attention heads", "A model is a decoder of the Llama kind", "--model nano"
        ) from None


def _read_config(model: str) -> dict:
    try:
        return json.loads((Path(model) / "config.json").read_text())
    except ValueError as error:
        raise RingspanError(
            f"--model {model}", f"its config.json is no JSON ({error})", "transformers must be able to read it", "--model nano"
        ) from None


def check_vocabulary(model: str, vocabulary_size: int) -> None:
    """Whether a folder's model has an embedding for each of so many tokens, as far as its config.json tells.

    Raises:
        RingspanError: where it has fewer.
    """
    own = None if model in PRESETS else _read_config(model).get("vocab_size")
    if isinstance(own, int):
        _check_embeddings(model, own, vocabulary_size)


def _check_embeddings(model: str, own: int, vocabulary_size: int) -> None:
    if own < vocabulary_size:
        raise RingspanError(
            f"--model {model}",
            f"its vocabulary has {own} tokens and the tokenizer {vocabulary_size}",
            "Every token needs an embedding",
            f"--tokenizer {model}" if (Path(model) / "tokenizer.json").is_file() else f"--tokenizer ids:{own}",
        )


def checkpoint_bytes(model: str, vocabulary_size: int) -> int:
    """About how large a checkpoint is: weights and two moments, each in float32."""
    if model in PRESETS:
        return 12 * PRESETS[model].num_parameters(vocabulary_size)
    stored = sum(file.stat().st_size for file in Path(model).glob("*.safetensors"))
    return stored * (3 if _read_config(model).get("dtype") == "float32" else 6)


def build_model(
    model: str, *, vocabulary_size: int, context: int, seed: int, rope_scaling: str | None = None, rope_factor: float | None = None
) -> PreTrainedModel:
    """A new model of a preset, the same for a seed on every machine and rank; or the one in a folder. In float32, on the CPU.

    Raises:
        RingspanError: for a folder whose model cannot be read, is no decoder, or has something that ringspan would not do exactly.
    """
    import transformers

    from ringspan.transformer import register

    register()
    if model in PRESETS:
        with _ONE_AT_A_TIME, torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return transformers.LlamaForCausalLM(_llama(PRESETS[model], vocabulary_size, context))
    stretched = {} if rope_scaling is None else {"config": stretched_config(model, context, rope_scaling, rope_factor)}
    try:
        with _ONE_AT_A_TIME:
            built = transformers.AutoModelForCausalLM.from_pretrained(
                model, **stretched, attn_implementation=ATTENTION, dtype=torch.float32, local_files_only=True
            )
    except RingspanError:
        raise
    except Exception as error:  # a folder can be broken in more ways than transformers has errors for
        raise RingspanError(
            f"--model {model}", f"{type(error).__name__}: {error}", "transformers must be able to read the folder", "--model nano"
        ) from None
    check_exact(built, model)
    if getattr(built.config, "tie_word_embeddings", False) and not _is_tied(built):
        # A folder that says tied and holds two that differ: a checkpoint must say what was trained.
        built.config.tie_word_embeddings = False
    _check_embeddings(model, built.config.vocab_size, vocabulary_size)
    return built


def _is_tied(model: PreTrainedModel) -> bool:
    """Whether the input and output embeddings are one parameter."""
    output = model.get_output_embeddings()
    return output is not None and output.weight is model.get_input_embeddings().weight


def stretched_config(model: str, context: int, rope_scaling: str, rope_factor: float | None) -> PretrainedConfig:
    """The configuration in a folder, its rotary embeddings stretched for `context`.

    Raises:
        RingspanError: as `ringspan.training.rope.scaled` does, and for a preset, which has no context of its own.
    """
    import transformers

    check_scaling(rope_scaling)
    if model in PRESETS:
        raise RingspanError(
            f"--rope-scaling {rope_scaling} with --model {model}",
            "a new model has no context of its own to go beyond",
            "Scaling is for models that are trained already",
            "leaving --rope-scaling out",
        )
    return scaled(transformers.AutoConfig.from_pretrained(model, local_files_only=True), rope_scaling, context=context, factor=rope_factor)


def rebuild_model(folder: Path) -> PreTrainedModel:
    """The architecture that `folder/config.json` describes, as `empty_model` makes it."""
    import transformers

    return empty_model(transformers.AutoConfig.from_pretrained(folder, local_files_only=True), str(folder))


def empty_model(config: PretrainedConfig, name: str) -> PreTrainedModel:
    """The architecture of `config`, its weights any numbers, and no memory before they are written. In float32, on the CPU.

    Args:
        name: what a refusal calls it.
    """
    import transformers
    from transformers.initialization import no_init_weights

    from ringspan.transformer import register

    register()
    with _ONE_AT_A_TIME, no_init_weights():
        built = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION, dtype=torch.float32)
    # Without first weights transformers leaves out the tying too.
    built.tie_weights()
    check_exact(built, name)
    return built


def _llama(preset: Preset, vocabulary_size: int, context: int):
    from transformers import LlamaConfig

    config = LlamaConfig(
        # The library's 0.02 suits widths of about a thousand; at a width of 128 it costs half of the steps.
        initializer_range=0.7 / math.sqrt(preset.hidden),
        vocab_size=vocabulary_size,
        hidden_size=preset.hidden,
        num_hidden_layers=preset.layers,
        num_attention_heads=preset.heads,
        num_key_value_heads=preset.kv_heads,
        intermediate_size=preset.feed_forward,
        max_position_embeddings=context,
        rope_parameters={"rope_type": "default", "rope_theta": base_for(context)},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    config._attn_implementation = ATTENTION
    return config


def check_exact(model: PreTrainedModel, name: str) -> None:
    """Refuses what would differ between numbers of ranks, dropout, and makes the same what can be: angles that depend on a call's length.

    Raises:
        RingspanError: naming it.
    """
    from ringspan.transformer import prepare_rotary
    from ringspan.transformer.chance import check_no_dropout

    rule = "The loss on any number of ranks is the unsplit model's"
    check_no_dropout(model)
    if (dropout := getattr(model.config, "attention_dropout", 0.0) or 0.0) > 0:
        raise RingspanError(f"--model {name}", f"it has dropout {dropout}", rule, "setting every dropout in its config.json to 0")
    # Angles that depend on the length that a call sees, `dynamic` among them, are then the whole sequence's.
    prepare_rotary(model)


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Turns the parameters into `dtype`, in place, and leaves buffers: rotary angles in bfloat16 would blur every far position."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


@contextmanager
def plain_attention(model: PreTrainedModel) -> Iterator[None]:
    """The same weights with torch's own attention, for generating on one rank."""
    try:
        model.set_attn_implementation("sdpa")
    except ValueError:
        # Torch's has no softcap (Gemma 2) and no sinks (gpt-oss); transformers then takes its own alone.
        model.set_attn_implementation("eager")
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        model.set_attn_implementation(ATTENTION)
