"""The attention hook: Hugging Face models call ringspan where they would call their own attention."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ringspan.attention import Sequence
from ringspan.attention.batch import SEQUENCE_KEYWORD
from ringspan.attention.graphs import keep_uncompiled, stays_uncompiled
from ringspan.attention.positions import position_problem
from ringspan.errors import RingspanError, UnsupportedError
from ringspan.geometry import looks_ahead, sliding_window
from ringspan.kernels import autocast_dtype
from ringspan.transformer.mixing import ATTENTION_NAME, check_kinds, check_models
from ringspan.transformer.rotary import LENGTH_DEPENDENT, ROTARY_KEYWORD

# What models pass to every attention and what changes nothing here: positions are already inside q and k (position_problem looks at them),
# labels belong to the loss.
_HARMLESS = {
    "position_ids",
    "cache_position",
    "labels",
    "shift_labels",
    "num_items_in_batch",
    "is_causal",
    "use_cache",
    "output_hidden_states",
    "position_embeddings",
}
_ABSENT = (None, False, 0, 0.0)
# Windows come with each layer's keywords. Positions that jump look packed to transformers, and a shard's do; documents that really are
# packed are told by positions that begin again, which shard_batch compares with the sequence's mask.
_KNOWN_MASKS = {
    "causal_mask_function",
    "bidirectional_mask_function",
    "sliding_window_overlay",
    "sliding_window_bidirectional_overlay",
    "packed_sequence_mask_function",
}
# What only joins or renumbers other functions. Transformers 5.23 renumbers where 5.17 did not.
_WRAPPERS = {"and_masks", "remap_positions_for_packed_sequence", "add_offsets_to_mask_function"}


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """Hugging Face's attention interface: `query [batch, heads, shard, head_dim]` to `[batch, shard, heads, value_dim]`.

    Under `torch.autocast` it computes in autocast's dtype, as PyTorch's own attention does: rotations leave queries and keys in float32.

    Raises:
        RingspanError: without a sequence, on several ranks for a model with layers in which tokens learn of each other otherwise (see
            `ringspan.transformer.mixing`), for every keyword that would change the result and is not computed here, and where the model
            counted the tokens of a shard from 0, not having been given `position_ids`: see `Sequence.refuse_attention` for who raises.
    """
    sequence: Sequence | None = keywords.pop(SEQUENCE_KEYWORD, None)
    if sequence is None:
        raise RingspanError(
            "a forward of a model with attn_implementation='ringspan'",
            "its attention was given no sequence",
            "The batch carries the sequence that it was split by, and the model's layers hand it on",
            "model(**seq.shard_batch(batch)); model.set_attn_implementation('sdpa') to generate, or for a whole batch on each rank",
        )
    if sequence.num_ranks > 1:
        check_kinds(getattr(module, "config", None), f"attention of {type(module).__name__} on {sequence.num_ranks} ranks")
    if not keywords.pop(ROTARY_KEYWORD, False):
        _check_rotation(getattr(module, "config", None), sequence)
    window, softcap, sinks = (keywords.pop(name, None) for name in ("sliding_window", "softcap", "s_aux"))
    refused = {name: given for name, given in keywords.items() if name not in _HARMLESS and not _is_absent(given)}
    if attention_mask is not None:
        refused["attention_mask"] = tuple(attention_mask.shape)
    if dropout:
        refused["dropout"] = dropout
    if refused:
        raise UnsupportedError(
            f"attention of {type(module).__name__} with {', '.join(f'{name}={given}' for name, given in refused.items())}",
            "ringspan does not compute this exactly",
            "Nothing that a model asks for is ignored",
            "a forward without it (dropout: every one in the model's config 0), or attn_implementation='sdpa'",
        )
    wanted = keywords.get("is_causal")
    is_causal = bool(getattr(module, "is_causal", True) if wanted is None else wanted)
    if is_causal == looks_ahead(sequence.mask):
        raise RingspanError(
            f"attention of {type(module).__name__} with is_causal={is_causal}",
            f"the sequence's mask is {sequence.mask}",
            "The model and the sequence ask for the same mask",
            f"cp.sequence(length, mask=ringspan.{'causal' if is_causal else 'full'}())",
        )
    problem = position_problem(sequence, keywords.get("position_ids"), f"attention of {type(module).__name__}")
    if window is not None:
        # A layer's window is narrower than its model's mask; Hugging Face counts the query itself.
        sequence = sequence.context.sequence(sequence.length, sequence.mask & sliding_window(window - 1, 0 if is_causal else window - 1))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = _equally_wide(*(_autocast(x.transpose(1, 2)) for x in (query, key, value)))
    if problem is not None:
        # Here and not before: where the window, or these shapes, are new the ranks agree on them first.
        sequence.refuse_attention(problem, q, k, v, scale, softcap=softcap, sinks=sinks)
    out = sequence.attention(q, k, v, scale=scale, softcap=softcap, sinks=sinks)
    return out if value.shape[-1] == out.shape[-1] else out[..., : value.shape[-1]], None


def _equally_wide(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Zeros behind the narrower ones where values are not as wide as keys (latent attention): no score changes, and they are cut off."""
    width = max(q.shape[-1], v.shape[-1])
    q, k, v = (x if x.shape[-1] == width else functional.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
    return q, k, v


def _autocast(x: Tensor) -> Tensor:
    dtype = autocast_dtype(x.device.type)
    return x if dtype is None or x.dtype == torch.float64 else x.to(dtype)


def _check_rotation(config: Any, sequence: Sequence) -> None:
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in (rope, *(each for each in rope.values() if isinstance(each, dict))):
        kind = parameters.get("rope_type")
        longest = parameters.get("original_max_position_embeddings") or getattr(config, "max_position_embeddings", 0)
        if kind in LENGTH_DEPENDENT and sequence.num_ranks > 1 and sequence.length > longest:
            raise UnsupportedError(
                f"{sequence.length} tokens on {sequence.num_ranks} ranks for a model with rotary embeddings {kind!r}",
                f"beyond {longest} tokens its angles depend on the longest position that a call sees, and each rank sees only its own",
                "Nothing that a model asks for is ignored",
                "ringspan.transformers.prepare_rotary(model), after which the ranks agree on the longest of all",
            )


def _is_absent(given: Any) -> bool:
    return given is None or (isinstance(given, (bool, int, float)) and given in _ABSENT)


def attention_mask(*arguments: Any, attention_mask: Tensor | None = None, mask_function: Any = None, **keywords: Any) -> None:
    """Hugging Face's mask interface: no mask is built, since the sequence has its own.

    Raises:
        UnsupportedError: for a mask that hides tokens, and for a mask function of the model's that is none of those that the sequence's
            mask and the layer's window stand for.
    """
    if attention_mask is not None and not bool((attention_mask != 0).all()):
        raise UnsupportedError(
            f"a model's attention_mask {tuple(attention_mask.shape)}",
            "it hides tokens",
            "Padding is given to shard_batch, which knows whether it is exact",
            "seq.shard_batch({'input_ids': …, 'attention_mask': …})",
        )
    unknown = sorted(set(_mask_names(mask_function)) - _KNOWN_MASKS)
    if unknown:
        raise UnsupportedError(
            f"a model that masks by {', '.join(unknown)}",
            "ringspan knows causal and bidirectional masks, and windows",
            "Nothing that a model asks for is ignored",
            "attn_implementation='sdpa', or seq.attention with ringspan.mask_mod",
        )


def _mask_names(mask_function: Any) -> list[str]:
    """The names of the functions that `mask_function` joins."""
    if mask_function is None:
        return []
    name = getattr(mask_function, "__qualname__", str(mask_function)).partition(".")[0]
    if name not in _WRAPPERS:
        return [name]
    held = [cell.cell_contents for cell in mask_function.__closure__ or ()]
    functions = [each for content in held for each in (content if isinstance(content, tuple) else (content,)) if callable(each)]
    return [inner for each in functions for inner in _mask_names(each)]


stays_uncompiled(sys.modules[__name__], "attention_forward", "attention_mask")


def register() -> None:
    """Makes `attn_implementation="ringspan"` known to transformers, with its mask. Call it once; more often does no harm.

    From then on transformers refuses it, by an `UnsupportedError`, for models that have attention of their own, which never calls this one;
    on several ranks a forward refuses those whose tokens learn of each other by anything else too: see `ringspan.transformer.mixing`.

    Raises:
        RingspanError: where transformers is not installed.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise RingspanError(
            "ringspan.transformers.register()", str(error), "Hugging Face models need transformers", "pip install 'ringspan[transformers]'"
        ) from error
    keep_uncompiled()
    AttentionInterface.register(ATTENTION_NAME, attention_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, attention_mask)
    check_models()
