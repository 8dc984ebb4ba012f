"""Gradients of parameters that are split: summed where they are whole, and measured and scaled together."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ringspan.attention.gradients import sum_gradients
from ringspan.attention.observe import Observer
from ringspan.attention.streams import give_away
from ringspan.transport import Transport


def sum_local_gradients(parameters: Iterable[nn.Parameter], transport: Transport, observer: Observer | None = None) -> None:
    """Sums what this rank has of the gradients over ranks that have the same, in place, an `observer` looking on. Collective."""
    parameters = list(parameters)
    if not any(_is_split(parameter) for parameter in parameters):
        sum_gradients(parameters, transport, observer)
        return
    stand_ins = []
    for parameter in parameters:
        stand_in = nn.Parameter(_local(parameter.detach()), requires_grad=parameter.requires_grad)
        stand_in.grad = None if parameter.grad is None else _local(parameter.grad)
        stand_ins.append(stand_in)
    sum_gradients(stand_ins, transport, observer)
    for parameter, stand_in in zip(parameters, stand_ins, strict=True):
        if parameter.grad is None and stand_in.grad is not None:
            parameter.grad = _like(parameter, stand_in.grad)


def take_over(parameters: Iterable[nn.Parameter]) -> None:
    """The current stream reads the gradients that FSDP2 has made in memory of streams of its own, until they are dropped."""
    give_away(*(_local(parameter.grad) for parameter in parameters if parameter.grad is not None))


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, transport: Transport, is_counted: bool) -> Tensor:
    """See `ParallelModel.clip_gradients`.

    Args:
        parameters: with their gradients.
        max_norm: above 0.
        transport: of everyone.
        is_counted: whether this rank's parts count, or are another rank's too.
    """
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    # Of the same dtype on every rank, whatever it has gradients of.
    dtype = torch.float32
    for parameter in parameters:
        dtype = torch.promote_types(dtype, parameter.dtype)
    total = torch.zeros((), dtype=dtype, device=parameters[0].device if parameters else None)
    for gradient in gradients:
        if is_counted and _is_first(gradient):
            total += torch.linalg.vector_norm(_local(gradient), dtype=dtype).square()
    if total.device.type in transport.devices or total.is_cuda:
        transport.all_reduce(total)
    else:
        # Gradients in host memory, of ranks whose group carries the GPU's tensors alone: their numbers go as objects, by what it has.
        total.fill_(math.fsum(transport.gather_objects(total.item())))
    norm = total.sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        _local(gradient).mul_(factor)
    return norm


def _is_split(tensor: Tensor) -> bool:
    return hasattr(tensor, "to_local")


@torch.no_grad()
def _local(tensor: Any) -> Tensor:
    """This rank's part, in the same memory."""
    return tensor.to_local() if _is_split(tensor) else tensor


def _is_first(tensor: Any) -> bool:
    """Whether this rank is the first of those that hold the same part."""
    if not _is_split(tensor):
        return True
    place = tensor.device_mesh.get_coordinate()
    return all(at == 0 for at, placement in zip(place, tensor.placements, strict=True) if placement.is_replicate())


def _like(parameter: Any, local: Tensor) -> Any:
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(local, parameter.device_mesh, parameter.placements, run_check=False)
