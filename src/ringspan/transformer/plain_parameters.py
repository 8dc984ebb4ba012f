"""A module's parameters as plain tensors of this rank, while it computes, where a tensor axis keeps them apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ringspan.transformer.pieces import GatherColumns, SumGradient, TensorGroup

_ROLE = "_ringspan_tensor_role"
ROLES = {
    "column": "a linear map whose outputs are split: rows of its weight, and of its bias, which every rank holds whole",
    "row": "a linear map whose inputs are split: columns of its weight; its bias, which every rank holds whole, is added once",
    "alike": "a norm that every rank computes for its own tokens, or its own heads: its parameters are whole everywhere",
    "gathered": "an embedding that every rank computes for its own tokens: columns of its weight, whole while it is used",
}
"""What a module with split parameters is."""


@dataclass(frozen=True)
class Role:
    """One of `ROLES`, and among which ranks."""

    name: str
    group: TensorGroup


@dataclass(frozen=True)
class Place:
    """A parameter of a module."""

    owner: nn.Module
    name: str


def set_role(module: nn.Module, role: Role) -> None:
    """Says what `module` is."""
    setattr(module, _ROLE, role)


def role_of(module: nn.Module) -> Role | None:
    """What `module` is; None where its parameters are no one's but its own."""
    return vars(module).get(_ROLE)


def plain_parameters(module: nn.Module) -> list[tuple[Place, Tensor]]:
    """What `module` and its parts compute with, for every parameter that a tensor axis keeps apart: plain tensors, differentiable.

    Their gradients arrive at the parameters as these are split. Collective where the module has embeddings.
    """
    found = []
    for owner in module.modules():
        role = role_of(owner)
        if role is not None:
            for name, parameter in owner.named_parameters(recurse=False):
                if hasattr(parameter, "to_local"):
                    found.append((Place(owner, name), _plain(parameter, name, role)))
    return found


def _plain(parameter: Any, name: str, role: Role) -> Tensor:
    local: Tensor = parameter.to_local()
    if role.name == "gathered" and name == "weight":
        return GatherColumns.apply(local, role.group)
    if role.name in ("column", "row") and name == "weight":
        return local
    whole = SumGradient.apply(local, role.group)
    return whole.chunk(role.group.size)[role.group.rank] if role.name == "column" else whole


@contextmanager
def bias_apart(module: nn.Module) -> Iterator[Tensor | None]:
    """Within it, the linear map of `module` whose inputs are split adds no bias: what it adds to the sum of all ranks."""
    rows = [part for part in module.modules() if (role := role_of(part)) is not None and role.name == "row"]
    with_bias = [part for part in rows if part._parameters.get("bias") is not None]
    bias: Any = with_bias[0].bias if with_bias else None
    with using([(Place(part, "bias"), None) for part in with_bias]):
        yield bias


@contextmanager
def using(values: Sequence[tuple[Place, Tensor | None]]) -> Iterator[None]:
    """Within it, modules have these tensors where their parameters are."""
    held = [(place, place.owner._parameters[place.name]) for place, _ in values]
    try:
        for place, value in values:
            _put(place, value)
        yield
    finally:
        for place, parameter in held:
            _put(place, parameter)


def _put(place: Place, value: Any) -> None:
    place.owner._parameters[place.name] = value
