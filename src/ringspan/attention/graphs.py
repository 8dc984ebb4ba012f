"""How ringspan stands in code that `torch.compile` compiles: what is collective runs as it is, between the compiled parts.

A rank's transfers have an order that the others rely on, and what a call does depends on what the ranks have agreed on; a compiler that
traced through it would bake in one rank's view. Each such call is therefore a graph break on purpose, and everything around it is compiled.
"""

from __future__ import annotations

import sys
from threading import Lock
from typing import Any

import torch

REASON = "what ringspan's ranks do together is not compiled: it runs as it stands, between the compiled parts"
"""What torch says of such a graph break."""

_WAITING: list[tuple[Any, str]] = []
_LOCK = Lock()


def stays_uncompiled(owner: Any, *names: str) -> None:
    """Says that calls of these methods of a class, or functions of a module, are not compiled."""
    _WAITING.extend((owner, name) for name in names)


def keep_uncompiled() -> None:
    """Tells the compiler, once it is there: importing it takes seconds, and who compiles nothing shall not wait for it.

    Called wherever something is made that compiled code may be handed.
    """
    if not _WAITING or "torch._dynamo" not in sys.modules:
        return
    with _LOCK:
        while _WAITING:
            owner, name = _WAITING.pop()
            setattr(owner, name, torch.compiler.disable(getattr(owner, name), reason=REASON))
