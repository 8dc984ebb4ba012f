"""Parameters that are whole on every rank: the same values everywhere, and gradients summed over the ranks."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from ringspan.attention.observe import AFTER, Observer, watch
from ringspan.errors import RingspanError
from ringspan.transport import Transport, agree

BUCKET_BYTES = 1 << 25
"""Gradients are summed in buckets of this size: large enough for the link, small beside the model."""


def sum_gradients(parameters: Iterable[nn.Parameter], transport: Transport, observer: Observer | None = None) -> None:
    """Sums `.grad` over the ranks, in place, in float32 (float64 where it is): a parameter without one counts as zero on this rank.

    An `observer` is told when ranks sum.
    """
    for bucket in _buckets([parameter for parameter in parameters if parameter.requires_grad]):
        # Whether any rank has a gradient is one more element: where none has, none appears.
        flags = torch.tensor([float(parameter.grad is not None) for parameter in bucket], device=bucket[0].device)
        wide = torch.promote_types(bucket[0].dtype, torch.float32)
        flat = torch.cat([_gradient(parameter).to(wide).flatten() for parameter in bucket] + [flags.to(wide)])
        with watch(observer, AFTER, "reduce"):
            transport.all_reduce(flat)
        offset = 0
        present = flat[flat.numel() - len(bucket) :].tolist()
        for parameter, anywhere in zip(bucket, present, strict=True):
            summed = flat[offset : offset + parameter.numel()].view_as(parameter).to(parameter.dtype)
            offset += parameter.numel()
            if not anywhere:
                continue
            if parameter.grad is None:
                parameter.grad = summed
            else:
                parameter.grad.copy_(summed)


def check_whole(parameters: Iterable[object]) -> None:
    """That these are parameters whose gradients lie whole and dense on this rank.

    Raises:
        RingspanError: where one of them is none, is sharded, or has a sparse gradient.
    """
    for parameter in parameters:
        if not isinstance(parameter, Tensor):
            found = f"one of its parameters is of type {type(parameter).__name__}"
            raise RingspanError("sum_gradients", found, "A model has parameters", "the model")
        if hasattr(parameter, "device_mesh"):
            raise RingspanError(
                "sum_gradients of sharded parameters",
                "they are DTensors",
                "FSDP sums their gradients in the backward",
                "parallel.sum_gradients()",
            )
        if parameter.grad is not None and parameter.grad.layout != torch.strided:
            raise RingspanError("sum_gradients of sparse gradients", "", "Gradients are summed as they lie in memory", "sparse=False")


def check_same_weights(parameters: Iterable[nn.Parameter], transport: Transport, asked: str) -> None:
    """That all ranks have the same weights, as far as a few of each parameter tell. Collective: one gathering of a number.

    Reads `SAMPLED` elements of each parameter, evenly spread, and copies them to the host. A rank that has some on `meta` is not compared.

    Raises:
        RingspanError: on every rank, naming one whose weights are others than those of the first.
    """
    if transport.size == 1:
        return
    said = transport.gather_objects(_sampled_checksum(list(parameters)))
    known = [(rank, theirs) for rank, theirs in enumerate(said) if theirs is not None]
    if others := [rank for rank, theirs in known if theirs != known[0][1]]:
        raise RingspanError(
            asked,
            f"the weights of rank {others[0]} are others than those of rank {known[0][0]}",
            "Ranks that share a sequence compute with the same weights",
            "torch.manual_seed(0) on every rank before a new model is made, one folder that all load, or cp.broadcast_parameters(model)",
        )


SAMPLED = 16
"""Elements of a parameter that are compared."""


def _sampled_checksum(parameters: list[nn.Parameter]) -> int | None:
    if any(parameter.is_meta for parameter in parameters):
        return None
    samples: dict[torch.device, list[Tensor]] = {}
    for parameter in parameters:
        flat = parameter.detach().reshape(-1)
        samples.setdefault(flat.device, []).append(flat[:: max(1, flat.numel() // SAMPLED)][:SAMPLED].double())
    found = 0
    for parts in samples.values():
        found = zlib.crc32(torch.cat(parts).cpu().numpy().tobytes(), found)
    return found


def broadcast_parameters(model: nn.Module, transport: Transport) -> None:
    """Copies parameters and buffers of rank 0 to every rank, in place.

    Raises:
        RingspanError: on every rank and before anything is sent, where they are not the same ones of the same shapes and dtypes on all.
    """
    wrong = None if isinstance(model, nn.Module) else f"a model of type {type(model).__name__}"
    problem = None if wrong is None else RingspanError(wrong, "", "A model is a torch.nn.Module", "the model itself")
    agree(transport, "broadcast_parameters", "a model", problem)
    named = dict([*model.named_parameters(), *model.named_buffers()])
    first, *others = transport.gather_objects({name: _described(tensor) for name, tensor in named.items()})
    for rank, theirs in enumerate(others, 1):
        for name in first | theirs:
            if first.get(name) != theirs.get(name):
                raise RingspanError(
                    f"broadcast_parameters on {transport.size} ranks",
                    f"{name} is {first.get(name, 'not there')} on rank 0, {theirs.get(name, 'not there')} on rank {rank}",
                    "Every rank has the same model, whatever its values",
                    "the model of one configuration on every rank",
                )
    with torch.no_grad():
        for tensor in named.values():
            contiguous = tensor.detach().contiguous()
            # Bytes: no backend carries every dtype.
            transport.broadcast(contiguous.view(-1).view(torch.uint8))
            tensor.copy_(contiguous)


def _described(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} of {tensor.dtype} on {tensor.device.type}"


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _buckets(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        if bucket and (
            size + parameter.numel() * 4 > BUCKET_BYTES or (parameter.dtype, parameter.device) != (bucket[0].dtype, bucket[0].device)
        ):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.numel() * 4
    if bucket:
        yield bucket
