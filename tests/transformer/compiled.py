"""A model compiled by torch.compile, on one rank or as one of several processes, beside itself uncompiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.utils import counters

import ringspan
from tests.support.models import make_batch, tiny_llama, with_attention

LENGTH = 23


class Counting:
    """A backend that runs graphs as they are, forward and backward traced ahead, and counts those made and how often one is run."""

    def __init__(self) -> None:
        self.made, self.ran = 0, 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable:
        self.made += 1
        compiled = torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

        def run(*arguments: Any) -> Any:
            self.ran += 1
            return compiled(*arguments)

        return run


def step(context: ringspan.ContextParallel, sequence: ringspan.Sequence, model: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    """The loss, and every gradient."""
    model.zero_grad()
    part = sequence.shard_batch(batch)
    loss = sequence.loss(model(**part, use_cache=False).logits, part["shift_labels"])
    loss.backward()
    context.sum_gradients(model)
    return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


def beside_itself(group: dist.ProcessGroup | None, how: str = "model", layers: int = 2) -> dict[str, Any]:
    """How far loss and gradients of a compiled model are from its own uncompiled, at the first step and the second; its graph breaks.

    Args:
        group: the ranks.
        how: `model` compiles it whole, `layers` one layer at a time.
        layers: how many it has.
    """
    torch._dynamo.reset()
    context = ringspan.ContextParallel(group)
    sequence = context.sequence(LENGTH)
    batch, backend = make_batch(2, LENGTH), Counting()
    model = with_attention(tiny_llama(num_hidden_layers=layers), "ringspan")
    expected = step(context, sequence, model, batch)
    counters.clear()
    compiled = torch.compile(model, backend=backend) if how == "model" else model
    if how == "layers":
        for layer in model.model.layers:
            layer.compile(backend=backend)
    worst = 0.0
    for _ in range(2):
        backend.ran = 0
        found = step(context, sequence, compiled, batch)
        errors = [float((ours - wanted).norm() / wanted.norm()) for ours, wanted in zip(found, expected, strict=True)]
        worst = max(worst, *errors)
    return {"worst": worst, "made": backend.made, "ran": backend.ran, "breaks": list(counters["graph_break"])}


def on_two_ranks(group: dist.ProcessGroup) -> dict[str, Any]:
    """See `beside_itself`, for processes."""
    return beside_itself(group)
