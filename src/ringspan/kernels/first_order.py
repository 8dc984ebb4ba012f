"""Gradients that have no gradient."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch

from ringspan.errors import UnsupportedError

Backward = TypeVar("Backward", bound=Callable[..., Any])


def first_order(backward: Backward) -> Backward:
    """A `torch.autograd.Function`'s `backward` that refuses `create_graph=True`, on every rank and before anything is sent.

    In place of torch's `once_differentiable`, which raises only where a second gradient reaches the first through what came in: through a
    gradient that came as a constant, that of a sum for example, the second would silently lack what the function adds to it.
    """

    @wraps(backward)
    def checked(ctx: Any, *gradients: Any) -> Any:
        # The engine computes with gradients enabled where a graph is asked for, and only there.
        if torch.is_grad_enabled():
            raise UnsupportedError(
                "a gradient with create_graph=True",
                "a gradient of this gradient is not computed",
                "What it is made of, on this rank and the others, has no graph, and a second gradient would lack it",
                "create_graph=False, or torch's own attention where a second gradient is needed",
            )
        return backward(ctx, *gradients)

    return checked  # type: ignore[return-value]
