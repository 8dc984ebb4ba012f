"""The axes of a mesh by what they are for: replicas, shards of the parameters, parts of the sequence, and parts of the layers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import prod

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ringspan.errors import RingspanError
from ringspan.transport import InProcessTransport

Names = str | tuple[str, ...]
Group = DeviceMesh | dist.ProcessGroup | InProcessTransport | None


@dataclass(frozen=True)
class Axes:
    """Groups that a model is spread over.

    Attributes:
        context: the ranks that share a sequence, as `ContextParallel` takes them.
        everyone: all ranks, whose shares of the loss add up.
        sharding: the mesh of `fully_shard`: (shards,) or (replicas, shards); None where parameters stay whole.
        num_replicas: how many different batches there are at a time.
        tensor: the ranks that share heads, columns and the tokens of a context shard; None where there is one.
        sharing: the ranks that are given the same batches: those of `context` and `tensor`.
        copies: the ranks that compute with the same parameters on different tokens: everyone but along `tensor`.
    """

    context: Group
    everyone: Group
    sharding: DeviceMesh | None
    num_replicas: int
    tensor: DeviceMesh | None
    sharing: Group
    copies: Group


def find_axes(mesh: Group, *, context: Names, shard: Names, replicate: Names, tensor: Names, shard_parameters: bool) -> Axes:
    """The groups that `parallelize` needs.

    Raises:
        RingspanError: for a mesh without names, or with an axis that none of the arguments names.
    """
    if not isinstance(mesh, DeviceMesh):
        return Axes(mesh, mesh, None, 1, None, mesh, mesh)
    names = tuple(mesh.mesh_dim_names or ())
    roles = {"context": _tuple(context), "shard": _tuple(shard), "replicate": _tuple(replicate), "tensor": _tuple(tensor)}
    named = [name for each in roles.values() for name in each]
    strange = [name for name in names if name not in named]
    if not names or strange or len(set(named)) < len(named):
        found = f"{', '.join(map(repr, strange))} is none of them" if strange else "an axis has no name of its own"
        rule = "Every axis of the mesh is named: context=, shard=, replicate= or tensor= say which is which"
        example = "init_device_mesh('cuda', (2, 4), mesh_dim_names=('shard', 'context'))"
        raise RingspanError(f"parallelize over a mesh {names or tuple(mesh.shape)} with {_said(roles)}", found, rule, example)
    present = {role: tuple(name for name in names if name in wanted) for role, wanted in roles.items()}
    sizes = dict(zip(names, mesh.shape, strict=True))
    _check_order(names, present)
    # Each once: a flattened axis has communicators of its own.
    joined = cache(lambda ordered: _join(mesh, ordered))

    def join(some: tuple[str, ...]) -> DeviceMesh | None:
        return joined(tuple(name for name in names if name in some))

    is_split = prod(sizes[name] for name in present["tensor"]) > 1
    shards, replicas = join(present["shard"] + present["context"]), join(present["replicate"])
    sharding = mesh[_name(replicas), _name(shards)] if shards is not None and replicas is not None else shards
    # A mesh without an axis for the sequence leaves it whole on every rank.
    context_axis = join(present["context"]) or _alone()
    copies = join(present["replicate"] + present["shard"] + present["context"])
    return Axes(
        context=context_axis,
        everyone=join(names) if is_split else copies,
        sharding=sharding if shard_parameters else None,
        num_replicas=prod(sizes[name] for name in present["replicate"] + present["shard"]),
        tensor=join(present["tensor"]) if is_split else None,
        sharing=join(present["context"] + present["tensor"]) if is_split else context_axis,
        copies=copies or _alone(),
    )


def _check_order(names: tuple[str, ...], present: dict[str, tuple[str, ...]]) -> None:
    inner = present["shard"] + present["context"]
    if late := [name for name in present["replicate"] if any(names.index(name) > names.index(each) for each in inner)]:
        rule = "FSDP takes the axis of copies before those that it shards over, and a mesh its axes in one order"
        order = (*present["replicate"], *(name for name in names if name not in present["replicate"]))
        raise RingspanError(f"parallelize over a mesh {names}", f"{late[0]!r} comes after {inner[0]!r}", rule, f"mesh_dim_names={order}")


def _tuple(names: Names) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _said(roles: dict[str, tuple[str, ...]]) -> str:
    return ", ".join(f"{role}={names[0] if len(names) == 1 else names!r}" for role, names in roles.items())


def _join(mesh: DeviceMesh, names: tuple[str, ...]) -> DeviceMesh | None:
    """One axis of these, which come in the mesh's order, the first the slowest to change; None for no names."""
    if not names:
        return None
    return mesh[names[0]] if len(names) == 1 else mesh[names]._flatten()


def _name(mesh: DeviceMesh) -> str:
    assert mesh.mesh_dim_names is not None
    return mesh.mesh_dim_names[0]


def _alone() -> dist.ProcessGroup:
    group = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup)
    return group
