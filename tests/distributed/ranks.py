"""What the processes of tests/distributed run: the same functions that in-process ranks run beside them."""

from __future__ import annotations

import os
import time
from typing import Any

import torch
import torch.distributed as dist

import ringspan
from ringspan.errors import RingspanError
from ringspan.kernels import KERNELS
from tests.support.attempts import said_of
from tests.support.dense import make_tensors
from tests.support.masks import EXAMPLES
from tests.support.models import gradients, make_batch, tiny_llama, with_attention
from tests.support.split import Part, Split, run_rank

LENGTHS = (1, 3, 29, 64)
BASE: tuple[dict[str, Any], ...] = (
    *({"layout": layout, "mask": mask} for layout in ("contiguous", "zigzag", "striped", "weighted") for mask in ("causal", "full")),
    *({"strategy": strategy} for strategy in ("all_gather", "pass_query", "balanced", "double_ring", "direct", "ulysses", "tree")),
    {"mask": "window"},
    {"mask": "documents", "layout": "contiguous"},
    {"mask": "blocks"},
    {"mask": "mask_mod"},
    {"kernel": "torch_cpu"},
    {"kernel": "torch_cpu", "dtype": torch.bfloat16},
    {"dtype": torch.float32, "heads": 9, "kv_heads": 3},
    {"with_dlse": True},
)


def cases(num_ranks: int) -> list[tuple[Split, dict[str, Any]]]:
    """(how to split, arguments of `make_tensors`) of everything that is compared, one length after the other."""
    found = []
    for index, given in enumerate(BASE):
        tensors = {key: given[key] for key in ("dtype", "heads", "kv_heads", "with_dlse") if key in given}
        split = {key: given[key] for key in ("layout", "strategy", "kernel") if key in given}
        length = LENGTHS[index % len(LENGTHS)]
        for size in {length, 29}:
            mask = EXAMPLES[given.get("mask", "causal")].make(size)
            found.append((Split(num_ranks=num_ranks, mask=mask, **split), {"length": size, **tensors}))
    return found


def attend(group: Any) -> list[Part]:
    """Every case, forward and backward."""
    size = group.size if hasattr(group, "exchange") else dist.get_world_size(group)
    parts = []
    for split, tensors in cases(size):
        parts.append(run_rank(split, make_tensors(**tensors), group))
    return parts


def train(group: Any) -> list[Any]:
    """Loss and gradients of a tiny Llama."""
    context = ringspan.ContextParallel(group)
    sequence = context.sequence(19)
    model = with_attention(tiny_llama(), "ringspan")
    context.broadcast_parameters(model)
    part = sequence.shard_batch(make_batch(2, 19, padded=(0, 4)))
    loss = sequence.loss(model(**part).logits, part["shift_labels"])
    loss.backward()
    context.sum_gradients(model)
    return [loss.detach(), gradients(model)]


def broadcast(group: Any) -> list[float]:
    """Buffers of dtypes that gloo does not carry, as rank 0 has them."""
    rank = group.rank if hasattr(group, "exchange") else dist.get_rank(group)
    model = torch.nn.Module()
    for dtype in (torch.int16, torch.bool, torch.float8_e4m3fn, torch.complex64):
        model.register_buffer(str(dtype).replace(".", "_"), torch.full((3,), 1 - min(rank, 1)).to(dtype))
    model.register_buffer("scalar", torch.tensor(rank, dtype=torch.int16))
    ringspan.ContextParallel(group).broadcast_parameters(model)
    return [float(buffer.flatten()[0].real) for buffer in model.buffers()]


def refuse(group: Any) -> list[str]:
    """Disagreements, each of which every rank is told about; the group goes on working."""
    rank = group.rank if hasattr(group, "exchange") else dist.get_rank(group)
    context = ringspan.ContextParallel(group)
    sequence = context.sequence(12)
    rows = sequence.shard_length
    attempts = (
        lambda: context.sequence(20 + rank),
        lambda: context.sequence(20, ringspan.full() if rank else ringspan.causal()),
        lambda: ringspan.ContextParallel(group, strategy="ring" if rank else "all_gather"),
        lambda: sequence.attention(*(torch.zeros(1 + (rank == 1), rows, heads, 8) for heads in (4, 2, 2))),
        lambda: sequence.attention(*(torch.zeros(1, rows + (rank == 1), heads, 8) for heads in (4, 2, 2))),
    )
    said = said_of(attempts)
    sequence.attention(*(torch.zeros(1, rows, heads, 8) for heads in (4, 2, 2)))
    return said


def everything(group: Any) -> dict[str, Any]:
    """All of the above in one start of the processes, which is what takes long."""
    return {"attend": attend(group), "train": train(group), "broadcast": broadcast(group), "refuse": refuse(group)}


def replicas(group: Any) -> list[Any]:
    """Two replicas of a model, each split over two ranks: loss and gradients of a batch of which each replica has half."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "context"))
    context = ringspan.ContextParallel(mesh["context"])
    sequence = context.sequence(17)
    model = with_attention(tiny_llama(), "ringspan")
    whole = make_batch(4, 17)
    replica = mesh.get_local_rank("data")
    part = sequence.shard_batch({key: tensor[2 * replica : 2 * replica + 2] for key, tensor in whole.items()})
    loss = sequence.loss(model(**part).logits, part["shift_labels"])
    # The replicas' losses are means over unlike numbers of labels: weighted by them, they are the mean over the whole batch.
    total = int((whole["labels"][:, 1:] != -100).sum())
    loss = loss * (part["num_items_in_batch"] / total)
    loss.backward()
    context.sum_gradients(model)
    loss = loss.detach()
    dist.all_reduce(loss, group=mesh["data"].get_group())
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad, group=mesh["data"].get_group())
    return [loss, gradients(model)]


def two_axes(group: Any) -> list[str]:
    """A mesh of two axes is no axis to split a sequence over."""
    from torch.distributed.device_mesh import init_device_mesh

    try:
        ringspan.ContextParallel(init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "context")))
    except RingspanError as error:
        return [str(error)]
    return ["went on"]


def four(group: Any) -> dict[str, Any]:
    """What needs four ranks beside `everything`."""
    return {**everything(group), "replicas": replicas(group), "two_axes": two_axes(group)}


def _attention_of_a_rank_that(does: Any, group: Any) -> str:
    """Rank 1 `does` something in the middle of a forward; what the others raise, and how long after."""
    kernel, calls = KERNELS["reference"], []
    forward = type(kernel).forward

    def forward_of_rank_1(self: Any, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            does()
        return forward(self, *arguments)

    context = ringspan.ContextParallel(group, kernel="reference")
    sequence = context.sequence(24, ringspan.full())
    tensors = [torch.zeros(1, sequence.shard_length, heads, 8) for heads in (4, 2, 2)]
    sequence.attention(*tensors)
    if context.rank == 1:
        type(kernel).forward = forward_of_rank_1  # type: ignore[method-assign]
    began = time.monotonic()
    try:
        # What was sent before lets some ranks end this attention; none can end the next but one.
        for _ in range(3):
            sequence.attention(*tensors)
    except ringspan.RankFailure as failure:
        return f"{time.monotonic() - began:.1f} s: {failure}"
    return "went on"


def die(group: Any) -> str:
    """Rank 1 ends as if it had been killed."""
    return _attention_of_a_rank_that(lambda: os._exit(9), group)


def hang(group: Any) -> str:
    """Rank 1 stops answering."""
    return _attention_of_a_rank_that(lambda: time.sleep(120.0), group)
