"""What the processes of test_parallelize run about loops that are not the usual one, and steps that are given up."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

from ringspan.transformer import Offload, parallelize
from tests.support.interruptions import interrupted
from tests.transformer.parallel_ranks import MODELS, SMALL, Case, step, whole_gradients

INTERRUPTED = [
    Case({"context": 2}, how={**SMALL, "rematerialise": "full"}),
    Case({"shard": 2}, how={**SMALL, "rematerialise": "none"}),
    Case({"replicate": 2}, "qwen 3", how={**SMALL, "rematerialise": "full"}),
    Case({"context": 2}, "tied llama", how={**SMALL, "reshard_after_forward": False}),
    Case({"context": 2}, "deep llama", how={**SMALL, "layers_per_checkpoint": 2, "offload": Offload(in_flight=1)}),
]


def after_interruptions(group: Any) -> list[tuple[Tensor, dict[str, Tensor | None]]]:
    """Of each case a step after two that an error has ended on every rank."""
    found = []
    for case in INTERRUPTED:
        (name,) = case.mesh
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=(name,))
        parallel = parallelize(copy.deepcopy(MODELS[case.model]()), mesh, **case.how)
        batches = case.batches(0 if name == "context" else mesh.get_rank())
        optimizer = torch.optim.SGD(parallel.model.parameters())
        # Gradients are there already when it happens, as of an earlier micro-batch.
        step(parallel, batches)
        for _ in interrupted(parallel.model.model.layers[1].mlp, partial(step, parallel, batches)):
            optimizer.zero_grad()
        loss = step(parallel, batches)
        found.append((loss, whole_gradients(parallel.model)))
    return found


LOOPS = ("one backward for all", "all forwards first", "a forward without a gradient between", "the whole model computed again")


def by_other_loops(group: Any) -> list[tuple[Tensor, dict[str, Tensor | None]]]:
    """A step of the last of `INTERRUPTED` by each of `LOOPS`."""
    case = INTERRUPTED[-1]
    parallel = parallelize(copy.deepcopy(MODELS[case.model]()), init_device_mesh("cpu", (2,), mesh_dim_names=("context",)), **case.how)
    optimizer = torch.optim.SGD(parallel.model.parameters())

    def all_forwards_first(parts: list[Any]) -> Tensor:
        losses = [parallel.loss(part) for part in parts]
        for loss in losses:
            loss.backward()
        return torch.stack(losses).sum()

    def one_backward(parts: list[Any], compute: Any = parallel.loss) -> Tensor:
        loss = torch.stack([compute(part) for part in parts]).sum()
        loss.backward()
        return loss

    def with_validations(parts: list[Any]) -> Tensor:
        losses = []
        for part in parts:
            losses.append(parallel.loss(part))
            with torch.no_grad():
                parallel.loss(part)
            losses[-1].backward()
        return torch.stack(losses).sum()

    loops = (
        one_backward,
        all_forwards_first,
        with_validations,
        # The second forward of the model within the backward finds gradients of the first.
        lambda parts: one_backward(parts, lambda part: checkpoint(parallel.loss, part, use_reentrant=False)),
    )
    found = []
    for loop in loops:
        loss = loop(parallel.shard_batches([batch for batch, _ in case.batches(0)])).detach()
        found.append((loss, whole_gradients(parallel.model)))
        optimizer.zero_grad()
    return found
