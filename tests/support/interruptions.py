"""Steps that an error ends in the middle, on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any


class Interrupted(Exception):
    """The error."""


def interrupted(part: Any, take_step: Callable[[], object]) -> Iterator[None]:
    """Steps that end where `part`, a module of the model, is computed: in a forward and then in a backward. After each it yields."""

    def interrupt(*ignored: Any) -> None:
        raise Interrupted

    for register in (part.register_forward_hook, part.register_full_backward_hook):
        hook = register(interrupt)
        try:
            take_step()
            raise AssertionError("nothing was interrupted")
        except Interrupted:
            hook.remove()
        yield
