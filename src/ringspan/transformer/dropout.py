"""Dropout: each rank would drop other elements than the unsplit model does."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ringspan.errors import UnsupportedError

_NEAREST = "every dropout of its configuration set to 0"
_FUNCTIONS: tuple[Callable[..., Any], ...] = (functional.dropout, functional.alpha_dropout, functional.feature_alpha_dropout, torch.dropout)
"""Of an input, a probability and whether it is training."""


def check_no_dropout(model: nn.Module) -> None:
    """That no module of a model drops elements.

    Raises:
        UnsupportedError: naming the first that does.
    """
    for name, part in model.named_modules():
        if isinstance(part, nn.Dropout) and part.p > 0:
            raise _drops(type(model).__name__, f"{name} drops {part.p} of the elements")


def refusing_dropout(model: nn.Module) -> AbstractContextManager[object]:
    """Around one forward of a model: it raises `UnsupportedError` where a function drops elements, which no module of the model tells.

    Nothing is looked at in a model that is compiled: its forward is traced, and would be again without this around it.
    """
    if any(hasattr(part, "_orig_mod") or getattr(part, "_compiled_call_impl", None) is not None for part in model.modules()):
        return nullcontext()
    return _RefusingDropout(type(model).__name__)


class _RefusingDropout(TorchFunctionMode):
    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Calls `func`, unless it drops elements."""
        words = kwargs or {}
        if func in _FUNCTIONS:
            share = args[1] if len(args) > 1 else words.get("p", 0.5)
            training = args[2] if len(args) > 2 else words.get("training", words.get("train", True))
            if training and share > 0:
                raise _drops(self._name, f"its forward drops {share} of the elements")
        return func(*args, **words)


def _drops(name: str, found: str) -> UnsupportedError:
    return UnsupportedError(f"{name} with dropout", found, "The loss on any number of ranks is the unsplit model's", _NEAREST)
