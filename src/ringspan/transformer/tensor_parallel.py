"""Tensor parallelism with sequence-parallel norms: heads and feed-forward columns split over ranks, tokens everywhere else.

Megatron's split (1909.08053) with Korthikanti's g and ḡ (2205.05198 §4.2.2). Four tokens `a b c d` of a context shard on two ranks:

                 embedding, norms, residual     attention, feed-forward
        rank 0   a b                        g   a b c d, its half of the heads and of the columns    ḡ   a b
        rank 1   c d                        →   a b c d, the other half                              →   c d

q, k, v, gate and up are split by outputs, o and down by inputs; the sums of the latter are cut up into tokens again. Parameters become
`DTensor`s over the tensor axis, which FSDP2 shards further; they are computed with as plain tensors, so that blockwise parts and
rematerialisation are the same code with and without.

Embedding and output embedding are computed by every rank for its own tokens. Their weights lie in columns over the tensor axis and are
gathered while they are used. A vocabulary split over the ranks would save that gathering (vocabulary · hidden elements a pass), and would
need another loss, a maximum and two sums over the ranks for every tile, another kernel where one is fused, and a vocabulary that the ranks
divide. Gathered, the tiled loss is what it is without a tensor axis, tied weights are one parameter with one split, and each rank computes
1/t of the logits either way.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from ringspan.attention.batch import SEQUENCE_KEYWORD
from ringspan.errors import RingspanError, UnsupportedError
from ringspan.transformer.blockwise import norms_of
from ringspan.transformer.fused import feed_forward
from ringspan.transformer.layers import (
    attention_of,
    causal_model,
    decoder,
    decoder_layers,
    feed_forward_of,
    original_forward,
    replace_forward,
)
from ringspan.transformer.pieces import TensorGroup
from ringspan.transformer.plain_parameters import Role, bias_apart, plain_parameters, role_of, set_role, using

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "gemma2", "gemma3_text", "granite")
"""Model types whose attention and feed-forward are known to split so."""

_SLOT = "_ringspan_unsplit_forward"
_ATTENTION = {"q_proj": "column", "k_proj": "column", "v_proj": "column", "o_proj": "row", "q_norm": "alike", "k_norm": "alike"}
_FEED_FORWARD = {"gate_proj": "column", "up_proj": "column", "down_proj": "row"}
_LENGTH: ContextVar[int] = ContextVar("ringspan_shard_length")
_SIZES = {
    "num_key_value_heads": "key heads",
    "num_attention_heads": "query heads",
    "intermediate_size": "feed-forward columns",
    "hidden_size": "hidden columns",
}


def tensor_group(mesh: DeviceMesh) -> TensorGroup:
    """The ranks of a tensor axis."""
    return TensorGroup(mesh.get_group(), mesh.get_local_rank(), mesh.size())


def check_splits(model: nn.Module, size: int, num_shards: int = 1) -> None:
    """That a model can be split over `size` ranks of a tensor axis, and its parts sharded further over `num_shards`.

    Raises:
        UnsupportedError: for a family that is not known to split, sizes that `size` does not divide, and parts that are not the family's.
    """
    config: Any = causal_model(model).config
    asked = f"a {config.model_type} over a tensor axis of {size} ranks"
    others = "these ranks on the context axis, whose strategy='ulysses' splits heads too, or on the shard axis"
    if config.model_type not in FAMILIES:
        rule = f"Heads and columns are split where a family is known to split exactly: {', '.join(FAMILIES)}"
        raise UnsupportedError(asked, "its layers are not known to split", rule, others)
    sizes: dict[str, int] = {name: getattr(config, name) for name in _SIZES}
    if uneven := [name for name, number in sizes.items() if number % size]:
        fits = [number for number in range(2, size) if not any(each % number for each in sizes.values())]
        found = f"it has {' and '.join(f'{sizes[name]} {_SIZES[name]}' for name in uneven)}"
        nearest = f"a tensor axis of {' or '.join(map(str, fits))} ranks; or {others}" if fits else others
        raise UnsupportedError(asked, found, "Each rank computes as many whole heads and columns as every other", nearest)
    if any(role_of(part) is not None for part, _ in _roles(model)):
        raise RingspanError(asked, "its parameters are split already", "A model is prepared once", "a new model, or a copy made before")
    known = {id(part) for part, _ in _roles(model)}
    for name, part in model.named_modules():
        if next(part.parameters(recurse=False), None) is not None and id(part) not in known:
            found = f"{name or 'the model'} is a {type(part).__name__} with parameters, which this family has not"
            raise UnsupportedError(asked, found, "Every parameter has its place on the tensor axis, or the model is not split", others)
    for part, role in _roles(model):
        if role in ("column", "row") and type(part).forward is not nn.Linear.forward:
            raise UnsupportedError(
                asked, f"a projection is a {type(part).__name__}", "What is split is an nn.Linear and nothing around it", others
            )
        weight: Any = part._parameters["weight"]
        if role == "column" and (weight.shape[0] // size) % num_shards and weight.shape[1] % num_shards:
            raise UnsupportedError(
                f"{asked}, sharded over {num_shards} more",
                f"a projection {tuple(weight.shape)} is left with {weight.shape[0] // size} rows of {weight.shape[1]}",
                "What the tensor axis has split by rows is sharded in equal parts, by rows or by columns",
                "a number of shard × context ranks that divides hidden_size, or shard_parameters=False",
            )


def _roles(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Every part with parameters, and its role."""
    inner: Any = causal_model(model)
    embeddings = (inner.get_input_embeddings(), inner.get_output_embeddings())
    roles: list[tuple[nn.Module, str]] = [(part, "gathered") for part in embeddings if part is not None]
    roles += [(norm, "alike") for norm in norms_of(decoder(model))]
    for layer in decoder_layers(model):
        roles += [(norm, "alike") for norm in norms_of(layer)]
        for whole, known in ((_attention_of(layer), _ATTENTION), (feed_forward_of(layer), _FEED_FORWARD)):
            roles += [(part, known[name]) for name, part in whole.named_children() if name in known]
    return [(part, role) for part, role in roles if next(part.parameters(recurse=False), None) is not None]


def _attention_of(layer: nn.Module) -> nn.Module:
    if (found := attention_of(layer)) is not None:
        return found
    raise UnsupportedError(
        f"the attention of a {type(layer).__name__}", "it has no part named self_attn", "Parts are found as transformers names them"
    )


def split_model(model: nn.Module, mesh: DeviceMesh, device: torch.device) -> TensorGroup:
    """Splits a model that `check_splits` lets through over a tensor axis, in place; nothing is sent.

    Args:
        model: the same on every rank.
        mesh: the tensor axis.
        device: where parameters that have memory go.
    """
    group = tensor_group(mesh)
    split: dict[int, nn.Parameter] = {}
    for part, role in _roles(model):
        set_role(part, Role(role, group))
        for name, parameter in list(part.named_parameters(recurse=False)):
            if id(parameter) not in split:
                split[id(parameter)] = _split(parameter, name, role, mesh, device)
            setattr(part, name, split[id(parameter)])
    inner: Any = causal_model(model)
    replace_forward(inner, _causal_forward, _SLOT)
    replace_forward(decoder(model), _decoder_forward, _SLOT)
    for part in (inner.get_input_embeddings(), *norms_of(decoder(model))):
        replace_forward(part, _own_tokens_forward, _SLOT)
    replace_forward(inner.get_output_embeddings(), _head_forward, _SLOT)
    for layer in decoder_layers(model):
        for norm in norms_of(layer):
            replace_forward(norm, _own_tokens_forward, _SLOT)
        replace_forward(_attention_of(layer), _attention_forward, _SLOT)
        replace_forward(feed_forward_of(layer), _feed_forward_forward, _SLOT)
    return group


def _split(parameter: nn.Parameter, name: str, role: str, mesh: DeviceMesh, device: torch.device) -> nn.Parameter:
    dim = {"column": 0, "row": 1, "gathered": 1}.get(role) if name == "weight" else None
    data = parameter.detach()
    own = data if dim is None else data.chunk(mesh.size(), dim)[mesh.get_local_rank()]
    if not own.is_meta:
        own = own.to(device, copy=dim is not None, memory_format=torch.contiguous_format)
    elif dim is not None:
        own = torch.empty(own.shape, dtype=own.dtype, device="meta")
    placement = Replicate() if dim is None else Shard(dim)
    return nn.Parameter(DTensor.from_local(own, mesh, [placement], run_check=False), requires_grad=parameter.requires_grad)


def _group(module: nn.Module) -> TensorGroup:
    return next(role.group for part in module.modules() if (role := role_of(part)) is not None)


def _sequence(module: nn.Module, keywords: dict[str, Any]) -> Any:
    sequence = keywords.get(SEQUENCE_KEYWORD)
    if sequence is None:
        raise RingspanError(
            f"a forward of a {type(module).__name__} that is split over a tensor axis",
            "it was given no sequence",
            "The batch carries the sequence that it was split by",
            "model(**seq.shard_batch(batch))",
        )
    return sequence


def _decoder_forward(
    self: nn.Module, input_ids: Tensor | None = None, *arguments: Any, inputs_embeds: Tensor | None = None, **keywords: Any
) -> Any:
    """Embeds this rank's piece; positions stay those of all tokens of the shard, since attention has them all."""
    _sequence(self, keywords)
    group = _group(self)
    model: Any = self
    embedded = model.get_input_embeddings()(group.take(input_ids)) if input_ids is not None else None
    if inputs_embeds is not None:
        embedded = group.take(inputs_embeds)
    return original_forward(self, _SLOT)(None, *arguments, inputs_embeds=embedded, **keywords)


def _causal_forward(self: nn.Module, *arguments: Any, **keywords: Any) -> Any:
    token = _LENGTH.set(_sequence(self, keywords).shard_length)
    try:
        return original_forward(self, _SLOT)(*arguments, **keywords)
    finally:
        _LENGTH.reset(token)


def _own_tokens_forward(self: nn.Module, *arguments: Any) -> Tensor:
    with using(plain_parameters(self)):
        return original_forward(self, _SLOT)(*arguments)


def _head_forward(self: nn.Module, hidden: Tensor) -> Tensor:
    group = _group(self)
    with using(plain_parameters(self)):
        logits = original_forward(self, _SLOT)(hidden)
    length = _LENGTH.get()
    if logits.shape[1] != group.piece_length(length):
        asked = f"logits of some tokens of a {type(self).__name__} that is split over a tensor axis"
        found = f"{logits.shape[1]} of this rank's {group.piece_length(length)} were asked for"
        raise RingspanError(asked, found, "Logits are of all tokens of a shard", "logits_to_keep=0")
    # Every rank has those of all tokens of its shard, as without a tensor axis.
    return group.show(logits, length)


def _attention_forward(self: nn.Module, hidden_states: Tensor, *arguments: Any, **keywords: Any) -> Any:
    group = _group(self)
    hidden = group.gather(hidden_states, _sequence(self, keywords).shard_length)
    with using(plain_parameters(self)), bias_apart(self) as bias:
        out, *others = original_forward(self, _SLOT)(hidden, *arguments, **keywords)
    own = group.sum_pieces(out)
    return (own if bias is None else own + bias, *others)


def _feed_forward_forward(self: nn.Module, x: Tensor) -> Tensor:
    group = _group(self)
    with using(plain_parameters(self)), bias_apart(self) as bias:
        # In whatever order: each token is computed by itself.
        own = group.sum_rows(feed_forward(self, original_forward(self, _SLOT), group.gather_rows(x)))
    return own if bias is None else own + bias
