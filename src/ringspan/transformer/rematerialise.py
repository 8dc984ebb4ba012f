"""What a decoder layer keeps for its backward, and what it computes again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ringspan.attention.tape import Tape, keep_here, recording, replaying
from ringspan.errors import RingspanError, UnsupportedError
from ringspan.transformer.layers import original_forward, replace_forward, restore_forward
from ringspan.transformer.offload import HostStore

MODES: dict[str, str] = {
    "none": "everything that autograd saves is kept",
    "selective": "attention's scores are computed again (Korthikanti): every kernel here does that by itself, so that it is `none`",
    "attention_output": "the layer's input and attention's output are kept; all but attention is computed again (DISTFLASHATTN)",
    "full": "the layer's input is kept; the layer is computed again, attention and its messages included",
}
"""The rematerialisation modes, from most memory to least."""

_SETTINGS = "_ringspan_rematerialise"
_CACHES = ("cache", "past_key_values", "past_key_value")


@dataclass(frozen=True)
class _Settings:
    mode: str
    store: HostStore | None
    keep_outputs_on_host: bool


def check_mode(mode: str, *, strategy: str = "ring", offloads: bool = False) -> None:
    """Raises where the mode is unknown, or is not what it says under this strategy, or has nothing to offload."""
    if mode not in MODES:
        rule = f"The modes are {', '.join(MODES)}"
        raise RingspanError(f"rematerialise={mode!r}", "", rule, "rematerialise='attention_output'")
    if strategy == "ring_self_attention" and mode in ("selective", "attention_output"):
        raise UnsupportedError(
            f"rematerialise={mode!r} with strategy 'ring_self_attention'",
            "that strategy keeps its scores, which is what the mode says it does not",
            "What a mode says is kept is what is kept",
            "rematerialise='full', or strategy='ring'",
        )
    if offloads and mode in ("none", "selective"):
        raise RingspanError(
            f"offload with rematerialise={mode!r}",
            "no layer checkpoints are made",
            "What is offloaded are the checkpoints of rematerialised layers",
            "rematerialise='full', or 'attention_output'",
        )


def rematerialise(layers: Sequence[nn.Module], mode: str, store: HostStore | None = None, *, attention_outputs: bool = True) -> None:
    """Makes decoder layers keep what `mode` says for their backward. In place; `none` and `selective` take it back.

    Bytes that a layer keeps for a token, with e bytes an element, hidden size h, and a attention heads of d (PAPERS: Korthikanti's full
    recomputation is 2sbh at e = 2): `full` e·h; `attention_output` e·(h + a·d) + 4·a. While a layer is in its backward it holds what
    `none` would keep of it, for that one layer.

    Under `attention_output` neither attention's kernel nor the messages of its ring run again. The exchanges of positions for heads that
    `ulysses` and `two_dimensional` put around it do, for q, k and v as for the output: they are part of what rebuilds q, k and v. So do the
    gathering of tokens before it and their sum after it on a tensor axis.

    Args:
        layers: the decoder layers, each called with hidden states first, with attention by ringspan.
        mode: one of `MODES`.
        store: where checkpoints go, if not left on the device.
        attention_outputs: whether what `attention_output` keeps goes to the store too.

    Raises:
        RingspanError: for an unknown mode, or a store for a mode without checkpoints.
    """
    check_mode(mode, offloads=store is not None)
    for layer in layers:
        if mode in ("none", "selective"):
            restore_forward(layer)
            vars(layer).pop(_SETTINGS, None)
        else:
            setattr(layer, _SETTINGS, _Settings(mode, store, attention_outputs))
            replace_forward(layer, _forward)


def _forward(self: nn.Module, hidden_states: Tensor, *arguments: Any, **keywords: Any) -> Any:
    layer = original_forward(self)
    if not torch.is_grad_enabled():
        return layer(hidden_states, *arguments, **keywords)
    if any(keywords.get(name) is not None for name in _CACHES):
        raise RingspanError(
            f"a {type(self).__name__} with a cache of keys, rematerialised",
            "computing it again would add its keys a second time",
            "A forward whose layers are computed again has no cache",
            "model(…, use_cache=False)",
        )
    settings: _Settings = getattr(self, _SETTINGS)
    contexts, store = _no_contexts, settings.store
    number = 0 if store is None else store.new_layer()
    if settings.mode == "attention_output":
        keep = partial(store.put, layer=number) if store is not None and settings.keep_outputs_on_host else keep_here
        contexts = partial(_tape_contexts, Tape(keep))
    # Random numbers are drawn by dropout alone.
    random = self.training and any(isinstance(module, nn.Dropout) and module.p > 0 for module in self.modules())
    options: dict[str, Any] = {"use_reentrant": False, "context_fn": contexts, "preserve_rng_state": random}
    if store is None:
        return checkpoint(layer, hidden_states, *arguments, **options, **keywords)
    return checkpoint(_Input(hidden_states, store, number).run, layer, *arguments, **options, **keywords)


class _Input:
    """A layer's input, which the checkpoint knows only by this object: here while the layer runs, in a store until it runs again."""

    def __init__(self, hidden_states: Tensor, store: HostStore, number: int) -> None:
        self._here: Tensor | None = hidden_states
        self._needs_gradient = hidden_states.requires_grad
        self._kept = store.put(hidden_states.detach(), number)

    def run(self, layer: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        hidden_states, self._here = self._here, None
        if hidden_states is None:
            hidden_states = self._kept().detach().requires_grad_(self._needs_gradient)
        return layer(hidden_states, *arguments, **keywords)


def _no_contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
    return nullcontext(), nullcontext()


def _tape_contexts(tape: Tape) -> tuple[AbstractContextManager, AbstractContextManager]:
    return recording(tape), _Replaying(tape)


class _Replaying:
    """`replaying`, to be entered once for every backward through the same graph."""

    def __init__(self, tape: Tape) -> None:
        self._tape = tape

    def __enter__(self) -> None:
        self._within = replaying(self._tape)
        self._within.__enter__()

    def __exit__(self, *error: Any) -> Any:
        return self._within.__exit__(*error)
