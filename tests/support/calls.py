"""Functions that take this rank's shards, called on every rank, and their results put together by positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import ringspan
from ringspan.errors import RingspanError
from ringspan.transport import InProcessTransport
from tests.support.dense import Outcome, Tensors
from tests.support.split import Part, assemble

Call = Callable[[Tensor, Tensor, Tensor, Any], tuple[Tensor, Tensor]]
"""From q, k, v `[batch, shard, heads, head_dim]` and a group to `out` and `lse [batch, heads, shard]`."""


def split_call(num_ranks: int, tensors: Tensors, positions: Callable[[int], list[int]], call: Call) -> Outcome:
    """Forward and backward of `call` on in-process ranks, of which each holds `positions(rank)`, as one whole."""

    def run(group: Any) -> Part:
        own = torch.tensor(positions(group.rank), dtype=torch.int64)
        q, k, v = (whole[:, own].detach().requires_grad_() for whole in (tensors.q, tensors.k, tensors.v))
        out, lse = call(q, k, v, group)
        loss = (out * tensors.dout[:, own]).sum()
        if tensors.dlse is not None:
            loss = loss + (lse * tensors.dlse[:, :, own]).masked_fill(torch.isneginf(lse), 0.0).sum()
        loss.backward()
        gradients = [leaf.grad for leaf in (q, k, v)]
        assert None not in gradients
        return Part(own, Outcome(out.detach(), lse.detach(), *gradients), {}, {})

    return assemble(ringspan.run_in_process(num_ranks, run, timeout_seconds=60.0), tensors.q.shape[1])


def every_rank_refuses(num_ranks: int, call: Callable[[Any], object], error: type[RingspanError], *words: str) -> None:
    """That `call(group)` raises `error` on every rank, each of `words` said by one of them, and that no rank sends a tensor."""

    def run(group: Any) -> str:
        with pytest.raises(RingspanError) as caught:
            call(group)
        assert not any(group.bytes_sent.values()), "a tensor was sent before the refusal"
        assert isinstance(caught.value, error)
        return str(caught.value)

    said = ringspan.run_in_process(num_ranks, run, timeout_seconds=20.0)
    for word in words:
        assert any(word in message for message in said), f"{word!r} is not in {said}"


def count_meetings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets a rank's number whenever that rank asks all ranks something."""
    seen: list[int] = []
    right = InProcessTransport.gather_objects

    def counted(self: InProcessTransport, mine: object) -> list:
        seen.append(self.rank)
        return right(self, mine)

    monkeypatch.setattr(InProcessTransport, "gather_objects", counted)
    return seen


def meetings(num_ranks: int, seen: list[int], calls: Callable[[Any], object]) -> list[tuple[int, int]]:
    """For each rank, how often it met the others in `calls(group)` at first, and in three more times."""

    def run(group: Any) -> tuple[int, int]:
        calls(group)
        first = seen.count(group.rank)
        for _ in range(3):
            calls(group)
        return first, seen.count(group.rank) - first

    return ringspan.run_in_process(num_ranks, run)
