"""How ringspan stands in code that `torch.compile` compiles: what is collective runs as it is, between the compiled parts.

A rank's transfers have an order that the others rely on, and what a call does depends on what the ranks have agreed on; a compiler that
traced through it would bake in one rank's view. Each such call is therefore a graph break on purpose, and everything around it is compiled.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

import torch

REASON = "what ringspan's ranks do together is not compiled: it runs as it stands, between the compiled parts"
"""What torch says of such a graph break."""

_WAITING: list[tuple[Any, str]] = []
_COMPILER = "torch._dynamo"


class WhenImported(MetaPathFinder):
    """Calls `then` once, right after `module` has been imported; a finder for `sys.meta_path` that finds nothing else."""

    def __init__(self, module: str, then: Callable[[], None]) -> None:
        self._module, self._then = module, then

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """See `MetaPathFinder`: the spec of `module` that its path gives, with a loader that calls."""
        if fullname != self._module:
            return None
        sys.meta_path.remove(self)
        found = PathFinder.find_spec(fullname, path, target)
        if found is not None and found.loader is not None:
            execute = found.loader.exec_module

            def then_call(module: Any) -> None:
                execute(module)
                self._then()

            found.loader.exec_module = then_call
        return found


def stays_uncompiled(owner: Any, *names: str) -> None:
    """Says that calls of these methods of a class, or functions of a module, are not compiled."""
    _WAITING.extend((owner, name) for name in names)


def keep_uncompiled() -> None:
    """Tells the compiler, once it is there: importing it takes seconds, and who compiles nothing shall not wait for it.

    Called wherever something is made that compiled code may be handed, and where the compiler is imported after that.
    """
    if _COMPILER not in sys.modules:
        return
    while _WAITING:
        try:
            # No lock: whoever is still importing the compiler in another thread comes here too.
            owner, name = _WAITING.pop()
        except IndexError:
            return
        setattr(owner, name, torch.compiler.disable(getattr(owner, name), reason=REASON))


sys.meta_path.insert(0, WhenImported(_COMPILER, keep_uncompiled))
