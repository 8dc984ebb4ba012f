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

from ringspan.attention.tape import Keep, Tape, keep_here, recording, replaying
from ringspan.errors import RingspanError, UnsupportedError
from ringspan.transformer.chance import check_no_dropout
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


class _Group:
    """Layers that share one checkpoint: the first keeps its input, and from it the inputs of the others are computed again."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.last: _Input | None = None


@dataclass(frozen=True)
class _Settings:
    mode: str
    store: HostStore | None
    keep_outputs_on_host: bool
    group: _Group
    place: int


def check_mode(mode: str, *, strategy: str = "ring", offloads: bool = False, layers_per_checkpoint: int = 1) -> None:
    """Raises where the mode is unknown, or is not what it says under this strategy, or has no checkpoints to offload or to share."""
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
    if type(layers_per_checkpoint) is not int or layers_per_checkpoint < 1:
        rule = "A checkpoint serves a whole number of layers, at least one"
        raise RingspanError(f"layers_per_checkpoint={layers_per_checkpoint!r}", "", rule, "layers_per_checkpoint=1")
    if layers_per_checkpoint > 1 and mode in ("none", "selective"):
        raise RingspanError(
            f"layers_per_checkpoint={layers_per_checkpoint} with rematerialise={mode!r}",
            "no layer checkpoints are made",
            "What layers share are the checkpoints of rematerialised layers",
            "rematerialise='full', or 'attention_output'",
        )
    if offloads and mode in ("none", "selective"):
        raise RingspanError(
            f"offload with rematerialise={mode!r}",
            "no layer checkpoints are made",
            "What is offloaded are the checkpoints of rematerialised layers",
            "rematerialise='full', or 'attention_output'",
        )


def rematerialise(
    layers: Sequence[nn.Module],
    mode: str,
    store: HostStore | None = None,
    *,
    attention_outputs: bool = True,
    layers_per_checkpoint: int = 1,
) -> None:
    """Makes decoder layers keep what `mode` says for their backward. In place; `none` and `selective` take it back.

    Bytes that a layer keeps for a token, with e bytes an element, hidden size h, and a attention heads of d (PAPERS: Korthikanti's full
    recomputation is 2sbh at e = 2): `full` e·h; `attention_output` e·(h + a·d) + 4·a. While a layer is in its backward it holds what
    `none` would keep of it, for that one layer.

    Under `attention_output` neither attention's kernel nor the messages of its ring run again. The exchanges of positions for heads that
    `ulysses` and `two_dimensional` put around it do, for q, k and v as for the output: they are part of what rebuilds q, k and v. So do the
    gathering of tokens before it and their sum after it on a tensor axis.

    With `layers_per_checkpoint` = g only the first of every g layers keeps its input. When the backward comes to them, the first g − 1 run
    once without a graph, for the inputs of the others; attention's results are kept from that run, so that what runs twice is all but
    attention, and g inputs and g − 1 results are there for that while. A g-th of e·h a layer is what stays kept (Chen et al., 1604.06174).

    Args:
        layers: the decoder layers, each called with hidden states first, with attention by ringspan.
        mode: one of `MODES`.
        store: where checkpoints go, if not left on the device.
        attention_outputs: whether what `attention_output` keeps goes to the store too.
        layers_per_checkpoint: g.

    Raises:
        RingspanError: for an unknown mode, a store or groups for a mode without checkpoints, or groups of layers with dropout.
    """
    check_mode(mode, offloads=store is not None, layers_per_checkpoint=layers_per_checkpoint)
    if layers_per_checkpoint > 1:
        for layer in layers:
            check_no_dropout(layer)
    group = _Group(1)
    for index, layer in enumerate(layers):
        place = index % layers_per_checkpoint
        if place == 0:
            group = _Group(min(layers_per_checkpoint, len(layers) - index))
        if mode in ("none", "selective"):
            restore_forward(layer)
            vars(layer).pop(_SETTINGS, None)
        else:
            setattr(layer, _SETTINGS, _Settings(mode, store, attention_outputs, group, place))
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
    group, store = settings.group, settings.store
    number = 0 if store is None else store.new_layer()
    keep = keep_here if store is None else partial(store.put, layer=number)
    previous = group.last if settings.place else None
    if settings.place and previous is None:
        raise RingspanError(
            f"a {type(self).__name__} that shares a checkpoint, called by itself",
            "the layer before it was not called",
            "Layers that share a checkpoint run one after the other",
            "the whole decoder, or layers_per_checkpoint=1",
        )
    tape = Tape(keep if settings.keep_outputs_on_host else keep_here) if settings.mode == "attention_output" else None
    kept = _Input(self, hidden_states, keep if previous is None else None, previous, tape, (arguments, keywords))
    group.last = kept if settings.place + 1 < group.size else None
    # Random numbers are drawn by dropout alone.
    random = self.training and any(isinstance(module, nn.Dropout) and module.p > 0 for module in self.modules())
    return checkpoint(kept.run, use_reentrant=False, context_fn=kept.contexts, preserve_rng_state=random)


class _Input:
    """A layer's input, which the checkpoint knows only by this object: here while the layer runs, and then kept, or computed again.

    Args:
        module: the layer.
        hidden_states: its input.
        keep: where the input is kept; None where it is computed again from the layer before.
        previous: that layer's.
        tape: of its attention, where results are kept from the forward on.
        call: its other arguments.
    """

    def __init__(
        self, module: nn.Module, hidden_states: Tensor, keep: Keep | None, previous: _Input | None, tape: Tape | None, call: tuple[Any, Any]
    ) -> None:
        self._module, self._previous, self._tape, self._call = module, previous, tape, call
        self._here: Tensor | None = hidden_states
        self._needs_gradient = hidden_states.requires_grad
        self._kept = None if keep is None else keep(hidden_states.detach())
        # Of attention, from a run that computed the next layer's input again until this layer's own backward.
        self._again: Tape | None = None

    def run(self) -> Any:
        """The layer on its input."""
        hidden_states, self._here = self._here, None
        arguments, keywords = self._call
        return original_forward(self._module)(self._found() if hidden_states is None else hidden_states, *arguments, **keywords)

    def contexts(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """Of the forward, and of each time that it is computed again."""
        return nullcontext() if self._tape is None else recording(self._tape), _Replaying(self._take_tape)

    def _found(self) -> Tensor:
        if self._previous is None:
            assert self._kept is not None
            found = self._kept()
        else:
            found = self._previous.output()
        return found.detach().requires_grad_(self._needs_gradient)

    def output(self) -> Tensor:
        """What the layer made of its input, computed without a graph; the input and attention's results stay for its own backward."""
        self._here = self._found()
        unshard = getattr(self._module, "unshard", None)
        if callable(unshard):
            # FSDP knows of no use of its parameters but the layer's own forward and backward; that comes next, and gives them up.
            unshard()
        again = Tape()
        arguments, keywords = self._call
        with torch.no_grad(), recording(again) if self._tape is None else replaying(self._tape):
            output = original_forward(self._module)(self._here.detach(), *arguments, **keywords)
        self._again = again if self._tape is None else None
        return output[0] if isinstance(output, tuple) else output

    def _take_tape(self) -> Tape | None:
        tape, self._again = self._again or self._tape, None
        return tape


class _Replaying:
    """`replaying`, to be entered once for every backward through the same graph; nothing without a tape."""

    def __init__(self, tape: Callable[[], Tape | None]) -> None:
        self._tape = tape

    def __enter__(self) -> None:
        tape = self._tape()
        self._within = nullcontext() if tape is None else replaying(tape)
        self._within.__enter__()

    def __exit__(self, *error: Any) -> Any:
        return self._within.__exit__(*error)
