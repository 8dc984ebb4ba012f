"""How a run's model and sequences are spread over its ranks: the axes of a mesh, and `parallelize` from the options of a run.

    ranks = replicate × shard × context × tensor

The ranks of `context` share each sequence, those of `tensor` each layer. `shard` and `replicate` read different sequences; parameters,
gradients and optimizer are sharded over `shard` × `context`, or whole where gathering so small a model costs more than it saves.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Literal

from ringspan.errors import RankFailure, RingspanError
from ringspan.training.config import TrainingConfig, check_name, option

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

    from ringspan.transformer import ParallelModel
    from ringspan.transport import InProcessTransport

SHARD_FROM_PARAMETERS = 10_000_000
"""From so many parameters on they are sharded unless said otherwise; below, a gradient's sum is one message."""
_TOKENS = ("feed_forward_chunk", "loss_tile")


def num_replicas(config: TrainingConfig) -> int:
    """How many groups of ranks read different sequences."""
    return config.shard * config.replicate


def context_ranks(config: TrainingConfig) -> int:
    """How many ranks share a sequence."""
    return config.ranks // (num_replicas(config) * config.tensor)


def shards_parameters(config: TrainingConfig, num_parameters: int) -> bool:
    """Whether parameters, gradients and optimizer are sharded: as asked; else from ten million parameters on where that saves something.

    On one rank that computes in float32 there is nothing to save; in bfloat16 a sharded model needs no second copy of its weights.
    """
    if config.shard_parameters is not None:
        return config.shard_parameters
    saves = config.ranks > 1 or config.dtype != "float32"
    return config.parameters_on_host or (saves and num_parameters >= SHARD_FROM_PARAMETERS)


def check_spread(config: TrainingConfig) -> None:
    """What can be told without the model: that the axes fit the ranks, that every replica has something to read, and the names.

    Raises:
        RingspanError: naming the option and what fits.
    """
    from ringspan.transformer import MODES

    groups, rows = num_replicas(config), config.batch_size * config.accumulate
    given = [f"--{name} {size}" for name in ("shard", "replicate", "tensor") if (size := getattr(config, name)) > 1]
    asked = " ".join((f"--ranks {config.ranks}", *given))
    if config.ranks % (groups * config.tensor):
        found = f"{groups * config.tensor} do not divide {config.ranks} ranks"
        raise RingspanError(asked, found, "ranks = replicate × shard × context × tensor", f"--ranks {groups * config.tensor}")
    if rows < groups:
        raise RingspanError(
            f"{asked} --batch-size {config.batch_size} --accumulate {config.accumulate}",
            f"a step of {rows} sequence{'s' if rows > 1 else ''} leaves some of {groups} groups nothing to read",
            "A step reads batch-size × accumulate sequences, dealt out to the groups that read different ones",
            f"--accumulate {-(-groups // config.batch_size)}",
        )
    check_name("rematerialise", config.rematerialise, ("auto", *MODES))
    if config.offload and config.rematerialise in ("none", "selective"):
        raise RingspanError(
            f"--offload with --rematerialise {config.rematerialise}",
            "no layer checkpoints are made",
            "What is offloaded are the checkpoints of rematerialised layers",
            "--rematerialise full, or attention_output",
        )
    if config.layers_per_checkpoint > 1 and config.rematerialise in ("none", "selective"):
        raise RingspanError(
            f"--layers-per-checkpoint {config.layers_per_checkpoint} with --rematerialise {config.rematerialise}",
            "no layer checkpoints are made",
            "What layers share are the checkpoints of rematerialised layers",
            "--rematerialise full, or attention_output",
        )
    if config.parameters_on_host and config.shard_parameters is False:
        raise RingspanError(
            "--parameters-on-host with --no-shard-parameters",
            "nothing takes whole parameters to the host and back",
            "FSDP keeps the parameters that it shards in host memory",
            "leaving --no-shard-parameters out",
        )
    for name in _TOKENS:
        tokens_of(name, getattr(config, name))


def tokens_of(name: str, value: str) -> int | Literal["auto"] | None:
    """A number of tokens, `"auto"`, or None for `"none"`.

    Raises:
        RingspanError: for anything else.
    """
    if value in ("auto", "none"):
        return "auto" if value == "auto" else None
    if value.isdecimal() and int(value):
        return int(value)
    raise RingspanError(f"{option(name)} {value}", "", f"{option(name)} is a number of tokens, auto or none", f"{option(name)} auto")


def make_mesh(config: TrainingConfig, device: torch.device) -> DeviceMesh:
    """The mesh of a run, the axes with most to say innermost, where links are fastest; those of one rank but `context` are left out."""
    from torch.distributed.device_mesh import init_device_mesh

    sizes = {"replicate": config.replicate, "shard": config.shard, "context": context_ranks(config), "tensor": config.tensor}
    axes = {name: size for name, size in sizes.items() if size > 1 or name == "context"}
    return init_device_mesh(device.type, tuple(axes.values()), mesh_dim_names=tuple(axes))


def replica_of(mesh: DeviceMesh | InProcessTransport) -> int:
    """Which of the groups that read different sequences this rank is in."""
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(mesh, DeviceMesh):
        return 0
    return _place(mesh, ("replicate", "shard"))


def part_of(mesh: DeviceMesh | InProcessTransport, *, sharded: bool) -> int:
    """Which part of the parameters this rank holds; ranks of the same number hold the same.

    Args:
        sharded: whether they are sharded over `shard` and `context`.
    """
    from torch.distributed.device_mesh import DeviceMesh

    axes = ("shard", "context", "tensor") if sharded else ("tensor",)
    return _place(mesh, axes) if isinstance(mesh, DeviceMesh) else 0


def _place(mesh: DeviceMesh, axes: tuple[str, ...]) -> int:
    place = 0
    for name in mesh.mesh_dim_names or ():
        if name in axes:
            place = place * mesh[name].size() + mesh.get_local_rank(name)
    return place


def spread(model: nn.Module, config: TrainingConfig, mesh: DeviceMesh | InProcessTransport, *, sharded: bool) -> ParallelModel:
    """`ringspan.parallelize` as the options say, its refusals in their words.

    Args:
        model: in float32 on the CPU where it is to be sharded; else on its device, in the dtype to compute in.
        sharded: see `shards_parameters`.

    Raises:
        RingspanError: on every rank, for what this model or these ranks cannot do.
    """
    import torch

    from ringspan.transformer import Offload, parallelize

    more: dict[str, Any] = {name: tokens_of(name, getattr(config, name)) for name in _TOKENS}
    try:
        return parallelize(
            model,
            mesh,
            strategy=config.strategy,
            layout=config.layout,
            kernel=config.kernel,
            rematerialise=config.rematerialise,
            offload=Offload() if config.offload else None,
            layers_per_checkpoint=config.layers_per_checkpoint,
            shard_parameters=sharded,
            compute_dtype=getattr(torch, config.dtype) if sharded and config.dtype != "float32" else None,
            parameters_on_host=config.parameters_on_host,
            tokens_per_rank=-(-config.batch_size * config.context // context_ranks(config)),
            # Compared by all their bits where they are there; where parameters are sharded rank 0 alone has them yet.
            same_weights=False,
            **more,
        )
    except RankFailure:
        raise
    except RingspanError as error:
        raise RingspanError(*map(_as_options, (error.asked, error.found, error.rule, error.nearest))) from None


def _as_options(text: str) -> str:
    """`loss_tile=None` as `--loss-tile none`, and the like."""
    names = "|".join((*_TOKENS, "rematerialise", "strategy", "layout", "kernel"))
    return re.sub(rf"\b({names})=['\"]?(\w+)['\"]?", lambda found: f"{option(found[1])} {found[2].replace('None', 'none')}", text or "")
