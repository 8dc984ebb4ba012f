"""A script's default device, which every new tensor that names none lands on, is not where ringspan's own are."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ringspan
from ringspan.transformer import Offload
from tests.support.families import family
from tests.support.models import make_batch


@pytest.mark.parametrize(
    "options",
    [{}, {"rematerialise": "full", "offload": Offload()}, {"rematerialise": "attention_output", "loss_tile": 4, "feed_forward_chunk": 4}],
    ids=["plain", "offload", "in pieces"],
)
def test_a_training_step_is_the_same_under_any_default_device(options: dict[str, Any]):
    """`meta` stands for a GPU: a tensor that lands there cannot be read."""

    def run(group: Any, device: str) -> tuple[float, dict[str, torch.Tensor]]:
        parallel = ringspan.parallelize(family("llama"), group, **options)
        with torch.device(device):
            part = parallel.shard_batch(make_batch_on_cpu())
            loss = parallel.loss(part)
            loss.backward()
            parallel.sum_gradients()
        return loss.item(), {name: each.grad for name, each in parallel.model.named_parameters() if each.grad is not None}

    expected, found = (ringspan.run_in_process(2, lambda group, where=device: run(group, where)) for device in ("cpu", "meta"))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def make_batch_on_cpu() -> dict[str, torch.Tensor]:
    with torch.device("cpu"):
        return make_batch(1, 9)


@pytest.mark.parametrize("strategy", ["ring", "direct", "all_gather", "ulysses", "pass_query"])
def test_attention_is_the_same_under_any_default_device(strategy: str):
    whole = torch.randn(1, 64, 4, 16, generator=torch.Generator().manual_seed(0))

    def run(group: Any, device: str) -> list[torch.Tensor]:
        with torch.device(device):
            context = ringspan.ContextParallel(group, strategy=strategy)
            sequence = context.sequence(64, ringspan.causal() & ringspan.documents([0, 10, 40, 64]))
            q, k, v = (sequence.shard(whole).requires_grad_() for _ in range(3))
            out = sequence.attention(q, k, v)
            out.square().sum().backward()
            return [out.detach(), *(x.grad for x in (q, k, v) if x.grad is not None), sequence.positions]

    expected, found = (ringspan.run_in_process(4, lambda group, where=device: run(group, where)) for device in ("cpu", "meta"))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
