"""Chance: elements that a model drops, layers that it leaves out, noise that it adds. Each rank would draw other numbers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ringspan.errors import UnsupportedError

_DROPPING: tuple[Callable[..., Any], ...] = (functional.dropout, functional.alpha_dropout, functional.feature_alpha_dropout, torch.dropout)
"""Of an input, a probability and whether it is training."""

_DRAWING = frozenset({
    torch.randn, torch.randint, torch.rand_like, torch.randn_like, torch.randint_like, torch.normal,
    torch.bernoulli, torch.multinomial, torch.poisson, Tensor.bernoulli, Tensor.multinomial, Tensor.uniform_, Tensor.normal_,
    Tensor.bernoulli_, Tensor.exponential_, Tensor.random_, Tensor.geometric_, Tensor.cauchy_, Tensor.log_normal_,
})  # fmt: skip
"""Not `torch.rand`: some models draw whether to leave a layer out, and then leave none out, having no `layerdrop`."""


def check_no_dropout(model: nn.Module) -> None:
    """That no module of a model drops elements, or leaves out layers.

    Raises:
        UnsupportedError: naming the first that does.
    """
    for name, part in model.named_modules():
        if isinstance(part, nn.Dropout) and part.p > 0:
            raise _by_chance(type(model).__name__, f"{name} drops {part.p} of the elements")
        if isinstance(share := getattr(part, "layerdrop", 0), float | int) and share > 0:
            raise _by_chance(type(model).__name__, f"{name} leaves out {share} of its layers")


def refusing_chance(model: nn.Module) -> AbstractContextManager[object]:
    """Around one forward of a model: it raises `UnsupportedError` where a function drops elements or draws numbers, which no module tells.

    So do the dropout of OPT and Seed-OSS and the noise of some routers. A compiled model is not looked at: its forward is traced, and would
    be again without this around it.
    """
    if any(hasattr(part, "_orig_mod") or getattr(part, "_compiled_call_impl", None) is not None for part in model.modules()):
        return nullcontext()
    return _RefusingChance(type(model).__name__)


class _RefusingChance(TorchFunctionMode):
    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Calls `func`, unless it leaves something to chance."""
        words = kwargs or {}
        if func in _DROPPING:
            share = args[1] if len(args) > 1 else words.get("p", 0.5)
            training = args[2] if len(args) > 2 else words.get("training", words.get("train", True))
            if training and share > 0:
                raise _by_chance(self._name, f"its forward drops {share} of the elements")
        elif func in _DRAWING:
            raise _by_chance(self._name, f"its forward draws random numbers ({func.__name__})")
        return func(*args, **words)


def _by_chance(name: str, found: str) -> UnsupportedError:
    return UnsupportedError(
        f"{name} with dropout, or with noise",
        found,
        "The loss on any number of ranks is the unsplit model's",
        "every dropout and every noise of its configuration set to 0",
    )
