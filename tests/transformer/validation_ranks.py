"""What the processes of test_parallelize run about validations between the steps of a training."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from ringspan.transformer import parallelize
from tests.support.models import make_batch
from tests.transformer.parallel_ranks import MODELS, SMALL, whole_gradients


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter, put together where it is sharded. Collective."""
    named = model.named_parameters()
    return {name: (weight.full_tensor() if isinstance(weight, DTensor) else weight).detach().clone() for name, weight in named}


def validated(group: Any) -> list[tuple[list[str], list[str], float, bool]]:
    """What a validation leaves, for several ways of keeping parameters: those that are gathered, those that an optimizer made then does not
    step, the loss of weights that became 0 in place, and whether one between a loss and its backward leaves the gradients as they are."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("context",))
    found = []
    for name, how in (
        ("llama", SMALL), ("llama", {**SMALL, "reshard_after_forward": False}), ("tied llama", SMALL), ("llama", {"loss_tile": None}),
    ):  # fmt: skip
        model = copy.deepcopy(MODELS[name]())
        parallel = parallelize(model, mesh, **how)
        part = parallel.shard_batch(make_batch(1, 9))
        gradients = []
        for interrupted in (False, True):
            loss = parallel.loss(part)
            if interrupted:
                parallel.losses_by_position([part], [0, 9])
            loss.backward()
            gradients.append(whole_gradients(model))
            model.zero_grad()
        same = all(gradient is not None and torch.equal(gradient, gradients[1][key]) for key, gradient in gradients[0].items())
        gathered: list[str] = []
        for validate in (lambda: parallel.loss(part), lambda: parallel.losses_by_position([part], [0, 9])):  # noqa: B023
            with torch.no_grad():
                validate()
            gathered += [key for key, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        before = whole_weights(model)
        parallel.loss(part).backward()
        optimizer.step()
        still = [key for key, weight in whole_weights(model).items() if torch.equal(weight, before[key])]
        with torch.no_grad():
            parameters = list(model.parameters())
            parallel.loss(part)
            for parameter in parameters:
                parameter.zero_()
            found.append((gathered, still, float(parallel.loss(part)), same))
    return found
