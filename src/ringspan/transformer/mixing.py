"""How a Hugging Face model's tokens learn of each other: ranks share its attention, and what they do not share is refused."""

from __future__ import annotations

import inspect
from functools import wraps
from typing import Any

from torch import nn

from ringspan.attention.batch import SEQUENCE_KEYWORD
from ringspan.errors import UnsupportedError

ATTENTION_NAME = "ringspan"
"""What `attn_implementation` is set to."""

RULE = "Ranks share full and sliding attention; by any other way tokens would learn of one rank's tokens alone"
FAMILIES = "a decoder with full and sliding attention alone, such as Llama, Qwen 2 and 3, Mistral, Gemma or gpt-oss"

# As transformers calls them; `attention` is the older name of full.
_SHARED = {"full_attention", "sliding_attention", "attention"}
# In these tokens learn nothing of each other.
_TOKENWISE = {"mlp", "moe"}
_WATCHED = "_is_watched_by_ringspan"


def unshared_kinds(config: Any) -> list[str]:
    """The kinds of layer that a configuration names in which tokens learn of each other by anything but attention that ranks share."""
    # Transformers 5.17 has the second alone for RecurrentGemma.
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()
    return sorted({str(kind) for kind in kinds} - _SHARED - _TOKENWISE)


def check_kinds(config: Any, asked: str) -> None:
    """That ranks can share every layer that a configuration names.

    Raises:
        UnsupportedError: naming the kinds of the others.
    """
    if kinds := unshared_kinds(config):
        raise UnsupportedError(asked, f"it has layers of the kind {', '.join(kinds)}", RULE, FAMILIES)


def check_models() -> None:
    """Makes transformers ask of each model that is to call ringspan's attention whether it does, and whether that is all on several ranks.

    A model that has attention of its own, or none, never calls another's, and would compute with its rank's tokens alone, or under no mask,
    since that is left to the attention that is named: nobody but the model itself can say so. Transformers settles what attention a model
    has in `PreTrainedModel.get_correct_attn_implementation`, and what is raised there reaches who loads it;
    `PreTrainedModel.set_attn_implementation` passes over models with attention of their own. More calls of this do no harm. A transformers
    without those names is left as it is.
    """
    from transformers import PreTrainedModel

    names = ("get_correct_attn_implementation", "set_attn_implementation", "_can_set_attn_implementation")
    settle, change, _ = (getattr(PreTrainedModel, name, None) for name in names)
    if settle is None or change is None or hasattr(settle, _WATCHED) or not hasattr(PreTrainedModel, names[-1]):
        return

    @wraps(settle)
    def settle_and_check(self: Any, *arguments: Any, **keywords: Any) -> Any:
        settled = settle(self, *arguments, **keywords)
        if settled == ATTENTION_NAME:
            _check_loaded(self)
        return settled

    @wraps(change)
    def change_and_watch(self: Any, *arguments: Any, **keywords: Any) -> Any:
        changed = change(self, *arguments, **keywords)
        for part in self.modules():
            if isinstance(part, PreTrainedModel) and _has_its_own(type(part)):
                _watch(part)
        return changed

    setattr(settle_and_check, _WATCHED, True)
    PreTrainedModel.get_correct_attn_implementation = settle_and_check
    PreTrainedModel.set_attn_implementation = change_and_watch


def _check_loaded(model: Any) -> None:
    """Refuses a model that does not call ringspan's attention, and watches over one that may not, or that has layers of other kinds."""
    # A part of another model, a tower for pictures say, is not refused before it is given a sequence: it may never be given one.
    if _has_its_own(type(model)) and model.can_generate():
        _refuse_its_own(f"a {type(model).__name__} with attn_implementation={ATTENTION_NAME!r}")
    if _unsupported(type(model)) is not None or unshared_kinds(model.config):
        _watch(model)


def _watch(model: Any) -> None:
    if not hasattr(model, _WATCHED):
        setattr(model, _WATCHED, True)
        model.register_forward_pre_hook(_check_forward, with_kwargs=True)


def _check_forward(model: Any, arguments: Any, keywords: dict[str, Any]) -> None:
    sequence = keywords.get(SEQUENCE_KEYWORD)
    if sequence is None:
        return
    asked = f"a forward of a {type(model).__name__} with a sequence on {_ranks(sequence.num_ranks)}"
    is_split = sequence.num_ranks > 1
    # On one rank it is right unless it leaves its mask to ringspan's attention, which it does not call.
    if _has_its_own(type(model)) and (is_split or model.config._attn_implementation == ATTENTION_NAME):
        _refuse_its_own(asked)
    if not is_split:
        return
    check_kinds(model.config, asked)
    if _unsupported(type(model)) is not None and not _takes_positions(model):
        found = "no part of it takes position_ids: it has the order of its tokens otherwise, or counts each rank's from 0"
        raise UnsupportedError(asked, found, RULE, FAMILIES)


def _ranks(count: int) -> str:
    return "1 rank" if count == 1 else f"{count} ranks"


def _refuse_its_own(asked: str) -> None:
    rule = "Attention is computed here where a model calls the one that is named"
    raise UnsupportedError(asked, "transformers gave it attention of its own, which calls no other", rule, FAMILIES)


def _has_its_own(kind: Any) -> bool:
    own = _unsupported(kind)
    return own is not None and not own._can_set_attn_implementation()


def _unsupported(kind: Any) -> Any:
    """The class of transformers' that says of `kind` that its attention may not be another's; None where that is not said.

    Of classes that are not transformers', a user's or those of a model's own code, nothing is known by that: it is said where nobody
    thought of it. FSDP puts a class of its own before a model's.
    """
    if kind._supports_attention_backend:
        return None
    return next((each for each in kind.__mro__ if each.__module__.startswith("transformers.models.")), None)


def _takes_positions(model: nn.Module) -> bool:
    parts = (part for part in model.modules() if hasattr(part, "config"))
    return any("position_ids" in inspect.signature(part.forward).parameters for part in parts)
