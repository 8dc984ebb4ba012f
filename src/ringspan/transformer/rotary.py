"""Rotary embeddings whose angles depend on the longest position of a call (`dynamic`, `longrope`): of the whole sequence, on every rank.

transformers takes the longest position that a call sees, and a rank sees its own alone. Here the ranks agree on the longest of all, one
number a forward, and each hands it to the embedding as one position more, whose angles nobody uses.

transformers' `dynamic` also remembers: a sequence after a longer one keeps that one's angles, so that what is computed depends on what was
computed before, and a run that goes on from a checkpoint would be another. Here every forward is as a new model's first.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from ringspan.attention import Sequence
from ringspan.attention.batch import SEQUENCE_KEYWORD
from ringspan.attention.graphs import stays_uncompiled
from ringspan.transformer.layers import decoder, original_forward, replace_forward

LENGTH_DEPENDENT = frozenset({"dynamic", "longrope"})
"""The kinds of rotary embedding that transformers makes anew for the longest position of a call."""
ROTARY_KEYWORD = "ringspan_whole_rotary"
"""The keyword under which a model's attention learns that its angles are those of the whole sequence."""
_NAMES, _SEQUENCE = "_ringspan_rotary", "_ringspan_rotary_sequence"


def depends_on_length(rope_type: Any) -> bool:
    """Whether a `rope_type` of transformers, or any of one for each kind of layer, is such."""
    kinds = rope_type.values() if isinstance(rope_type, dict) else [rope_type]
    return any(kind in LENGTH_DEPENDENT for kind in kinds)


def prepare_rotary(model: nn.Module) -> None:
    """Makes a model's length-dependent rotary embeddings those of the whole sequence, wherever it is given one. In place; collective then.

    Other models are left as they are, and so is a forward without a sequence. A second call changes nothing.

    Args:
        model: a Hugging Face causal language model with `attn_implementation="ringspan"`.
    """
    inner = decoder(model)
    found = [name for name, part in inner.named_modules() if name and depends_on_length(getattr(part, "rope_type", None))]
    if not found or hasattr(inner, _NAMES):
        return
    setattr(inner, _NAMES, tuple(found))
    for name in found:
        replace_forward(inner.get_submodule(name), _forward)
    inner.register_forward_pre_hook(_begin, with_kwargs=True)
    inner.register_forward_hook(_end, always_call=True)


def _begin(module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> Any:
    sequence = named.get(SEQUENCE_KEYWORD)
    if sequence is None:
        return None
    for name in getattr(module, _NAMES):
        setattr(module.get_submodule(name), _SEQUENCE, sequence)
    return positional, {**named, ROTARY_KEYWORD: True}


def _end(module: nn.Module, *rest: Any) -> None:
    for name in getattr(module, _NAMES):
        vars(module.get_submodule(name)).pop(_SEQUENCE, None)


def _longest_position(sequence: Sequence, position_ids: Tensor) -> Tensor:
    """`[1]`, the same on every rank. Collective."""
    longest = position_ids.amax().reshape(1)
    sequence.context.transport.all_reduce(longest, "max")
    return longest


stays_uncompiled(sys.modules[__name__], "_longest_position")


def _forward(self: nn.Module, x: Tensor, position_ids: Tensor, *arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
    original = original_forward(self)
    sequence: Sequence | None = vars(self).get(_SEQUENCE)
    if sequence is None:
        return original(x, position_ids, *arguments, **keywords)
    longest = _longest_position(sequence, position_ids)
    # A call of one token makes transformers forget the longest that it has seen.
    original(x, torch.zeros_like(position_ids[..., :1]), *arguments, **keywords)
    cos, sin = original(x, torch.cat([position_ids, longest.expand(*position_ids.shape[:-1], 1)], -1), *arguments, **keywords)
    return cos[..., :-1, :], sin[..., :-1, :]
