"""What attention held is free as soon as it has ended, not when Python next looks for cycles: nothing waits for its garbage collector."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from threading import Barrier
from typing import Any

import pytest
import torch

import ringspan
from ringspan.attention import executor
from ringspan.transformer import parallelize
from tests.strategies.combinations import VARIANTS
from tests.support.models import make_batch, tiny_llama


@contextmanager
def uncollected() -> Iterator[None]:
    """The garbage collector sleeps, and keeps what `left_over` finds of what is made from here on: a test before may let go of more."""
    gc.collect()
    gc.disable()
    gc.freeze()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        yield
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.unfreeze()
        gc.enable()


def left_over() -> list[torch.Size]:
    """Of tensors that nobody can reach, and that only the garbage collector would have freed."""
    gc.collect()
    return [each.shape for each in gc.garbage if isinstance(each, torch.Tensor)]


def attend(group: Any, variant: str, transport: str, ended: Barrier | None = None) -> list[torch.Size]:
    """A forward and a backward; what they left over, looked for while all ranks, with their peer memory, are still there."""
    strategy, options = VARIANTS[variant]
    ranks: dict[str, Any] = options(1 if group is None else group.size)
    sequence = ringspan.ContextParallel(group, kernel="reference", strategy=strategy, transport=transport, **ranks).sequence(32)
    q, k, v = (sequence.shard(torch.randn(1, 32, 4, 4)).requires_grad_() for _ in range(3))
    out, lse = sequence.attention(q, k, v, return_lse=True)
    torch.autograd.grad(out.sum() + lse.sum(), (q, k, v))
    if ended is None:
        return left_over()
    ended.wait()
    found = left_over() if group.rank == 0 else []
    ended.wait()
    return found


@pytest.mark.parametrize("transport", ["process_group", "peer_memory"])
@pytest.mark.parametrize(
    "variant", ["ring", "direct, several at once", "all_gather in stages", "pass_query", "tree", "ulysses", "two_dimensional"]
)
def test_a_pass_leaves_no_tensor_to_the_garbage_collector(variant: str, transport: str):
    with uncollected():
        found = ringspan.run_in_process(4, partial(attend, variant=variant, transport=transport, ended=Barrier(4)))
    assert found == [[]] * 4


@pytest.mark.parametrize("mode", ["none", "selective", "attention_output", "full"])
def test_a_step_of_training_leaves_no_tensor_to_the_garbage_collector(mode: str):
    model = tiny_llama(dtype=torch.float32, num_hidden_layers=2)
    parallel = parallelize(model, feed_forward_chunk=16, loss_tile=16, rematerialise=mode)
    part = parallel.shard_batch(make_batch(1, 64))
    parallel.loss(part).backward()
    with uncollected():
        parallel.loss(part).backward()
        assert not left_over()


def test_a_pass_that_its_sums_keep_alive_is_found(monkeypatch: pytest.MonkeyPatch):
    begin = executor.Pass.__init__

    def wrong(self: Any, *args: Any) -> None:
        begin(self, *args)
        self.turns.owner = self

    monkeypatch.setattr(executor.Pass, "__init__", wrong)
    with uncollected():
        assert attend(None, "ring", "auto")
