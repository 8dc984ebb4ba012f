"""AdamW whose moments have 8 or 4 bits (2110.02861), through torchao (the extra `torchao`).

A moment is quantised by blocks of `BLOCKS[name]` values in the order of memory, each with a scale of its own. torchao keeps the moments of
a parameter of fewer than `SMALLEST` values in float32, as it does those of one that blocks do not divide. The first are next to nothing;
the second are refused here, since a run that was asked for 8 bits would take 32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ringspan.errors import RingspanError

BLOCKS = {"adamw8bit": 256, "adamw4bit": 128}
"""Values that share a scale, by the optimizer's name."""
SMALLEST = 4096
_CLASSES = {"adamw8bit": "AdamW8bit", "adamw4bit": "AdamW4bit"}
_CONSTANT = "qmap"
_SIGNED = {"exp_avg": True, "exp_avg_sq": False}


def check_low_memory(name: str) -> None:
    """Whether the optimizer `name` can be had here.

    Raises:
        RingspanError: where torchao is not installed, or has no such optimizer.
    """
    _optimizer_class(name)


def check_blocks(name: str, parameters: Mapping[str, Tensor]) -> None:
    """Whether the moments of `parameters` can be quantised.

    Raises:
        RingspanError: where blocks do not divide a parameter that is not small, all are small, or one is sharded.
    """
    block = BLOCKS[name]
    sharded = next((key for key, parameter in parameters.items() if hasattr(parameter, "device_mesh")), None)
    if sharded is not None:
        # Blocks would begin anew in each rank's part, and a checkpoint of them could not be read on another mesh.
        raise RingspanError(
            f"--optimizer {name}",
            f"{sharded} is sharded over ranks",
            "Moments of few bits are kept of parameters that are whole on every rank",
            "--no-shard-parameters, or --optimizer adamw, whose moments are sharded as the parameters are",
        )
    large = {key: parameter for key, parameter in parameters.items() if parameter.numel() >= SMALLEST}
    odd = next((key for key, parameter in large.items() if parameter.numel() % block), None)
    if odd is not None:
        raise RingspanError(
            f"--optimizer {name}",
            f"{odd} {tuple(large[odd].shape)} has {large[odd].numel():,} values",
            f"Moments are quantised by blocks of {block}, which divide every parameter of at least {SMALLEST:,} values",
            "--optimizer adamw",
        )
    if not large:
        raise RingspanError(
            f"--optimizer {name}",
            "no parameter is large enough to be quantised",
            f"Moments of fewer than {SMALLEST:,} values stay in float32",
            "--optimizer adamw, which is the same then",
        )


def make_low_memory(name: str, groups: Sequence[dict[str, Any]], **settings: Any) -> Any:
    """The optimizer over `groups`, with moments of zero for every parameter.

    Raises:
        RingspanError: as `check_low_memory` does.
    """
    adam = _optimizer_class(name)(list(groups), block_size=BLOCKS[name], **settings)
    for group in adam.param_groups:
        for parameter in group["params"]:
            # As its first step makes them; here so that a checkpoint has something to be read into.
            state = {moment: adam._new_buffer(parameter, signed) for moment, signed in _SIGNED.items()}
            adam.state[parameter] = {"step": torch.tensor(0.0), **state}
    return adam


def parts_of(name: str, moment: Tensor) -> dict[str, Tensor]:
    """What a checkpoint keeps of a moment, by name: a quantised one's codes and scales, as they are, or else itself."""
    flatten = getattr(moment, "__tensor_flatten__", None)
    # A sharded tensor, which flattens too, is one tensor to a checkpoint.
    if flatten is None or type(moment) is Tensor or hasattr(moment, "device_mesh"):
        return {name: moment}
    return {f"{name}.{part}": getattr(moment, part) for part in flatten()[0] if part != _CONSTANT}


def stepping(device: torch.device) -> AbstractContextManager[Any]:
    """Around a step. torchao compiles it, which pays on a GPU; on a CPU it would need a C++ compiler for the same numbers."""
    return nullcontext() if device.type == "cuda" else torch.compiler.set_stance("force_eager")


def _optimizer_class(name: str) -> Any:
    try:
        return getattr(import_module("torchao.optim"), _CLASSES[name])
    except (ImportError, AttributeError) as error:
        raise RingspanError(
            f"--optimizer {name}",
            str(error),
            "Moments of few bits are kept by torchao",
            "pip install 'ringspan[torchao]', or --optimizer adamw",
        ) from None
