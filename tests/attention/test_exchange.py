"""Positions are exchanged for heads through peer memory as by messages: the same bits, and a pass is three meetings and three launches."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch

import ringspan
from ringspan.attention import peer_swapper, reshard
from ringspan.attention.landing import make_rooms
from ringspan.geometry import head_shares, make_layout
from ringspan.kernels import copy_all
from ringspan.strategies import make_schedules
from ringspan.transport import peer_memory
from ringspan.transport.shared_memory import SharedMemory
from tests.support.poison import poisoned

__all__ = ["poisoned"]


@pytest.mark.parametrize("strategy", [{"strategy": "ulysses"}, {"strategy": "two_dimensional", "ulysses": 2}])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(8, 4, 16), (6, 1, 3), (3, 3, 8)])
def test_heads_are_exchanged_to_the_same_bits_by_whatever_carries_them(strategy: dict, heads: int, kv_heads: int, head_dim: int):
    torch.manual_seed(0)
    q, dout = torch.randn(2, 2, 45, heads, head_dim).bfloat16()
    k, v = torch.randn(2, 2, 45, kv_heads, head_dim).bfloat16()

    def run(group, transport: str):
        sequence = ringspan.ContextParallel(group, transport=transport, kernel="reference", **strategy).sequence(45)
        leaves = [sequence.shard(x).detach().requires_grad_() for x in (q, k, v)]
        out, lse = sequence.attention(*leaves, return_lse=True)
        loss = (out * sequence.shard(dout)).float().sum() + lse.sum()
        return [out, lse, *torch.autograd.grad(loss, leaves)], group.bytes_sent

    parts = zip(
        *(ringspan.run_in_process(4, lambda group, way=way: run(group, way)) for way in ("process_group", "peer_memory")), strict=True
    )
    for (expected, sent), (found, sent_too) in parts:
        assert all(torch.equal(ours, right) for ours, right in zip(found, expected, strict=True))
        assert sent == sent_too


def exchanged(group, transport: str, strategy: str = "ulysses") -> list[torch.Tensor]:
    """out and gradients of a rank of four, whose heads are exchanged four times."""
    same = torch.Generator().manual_seed(0)
    sequence = ringspan.ContextParallel(group, transport=transport, kernel="reference", strategy=strategy).sequence(45)
    leaves = [sequence.shard(torch.randn(1, 45, heads, 8, generator=same).bfloat16()).requires_grad_() for heads in (8, 4, 4)]
    out = sequence.attention(*leaves)
    return [out, *torch.autograd.grad(out.float().square().sum(), leaves)]


@pytest.mark.parametrize("late", [peer_swapper, reshard], ids=["writes", "reads"])
def test_nobody_reads_before_all_is_there_or_writes_before_all_have_read(monkeypatch: pytest.MonkeyPatch, late: Any):
    expected = ringspan.run_in_process(4, lambda group: exchanged(group, "process_group"))
    right, slow = late.copy_all, threading.local()

    def copy_all(copies, few=False):
        time.sleep(0.1 if vars(slow) else 0.0)
        right(copies, few)

    def run(group):
        vars(slow).update(here=True) if group.rank == 0 else None
        return exchanged(group, "peer_memory")

    monkeypatch.setattr(late, "copy_all", copy_all)
    for found, wanted in zip(ringspan.run_in_process(4, run), expected, strict=True):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))


@pytest.mark.parametrize("strategy", ["ulysses", "two_dimensional"])
def test_a_pass_is_three_meetings_and_three_launches_of_copies(monkeypatch: pytest.MonkeyPatch, strategy: str):
    done = threading.local()

    def count(owner: Any, name: str) -> None:
        right = getattr(owner, name)

        def counted(*arguments, few=False):
            vars(done).setdefault("names", []).append(f"{name} by few" if few else name)
            right(*arguments)

        monkeypatch.setattr(owner, name, counted)

    for owner, name in ((peer_swapper, "copy_all"), (reshard, "copy_all"), (SharedMemory, "meet")):
        count(owner, name)

    def run(group):
        exchanged(group, "peer_memory", strategy)
        return done.names

    for names in ringspan.run_in_process(4, run):
        pass_ = ["meet", "copy_all", "meet", "copy_all", "meet", "copy_all"]
        # May be written; to where it is computed; is there; back, and what is kept; is there; from the inbox. And the same backward.
        assert names == pass_ * 2


@pytest.mark.parametrize("stages", [1, 2])
def test_what_a_backward_needs_outlives_the_passes_after_its_forward(stages: int):
    """What lands is overwritten by the next pass: two layers, and forwards whose backward never comes."""

    def run(group, transport: str) -> list[torch.Tensor]:
        same = torch.Generator().manual_seed(0)
        context = ringspan.ContextParallel(group, transport=transport, kernel="reference", strategy="ulysses", stages=stages)
        sequence = context.sequence(45)
        leaves = [sequence.shard(torch.randn(1, 45, heads, 8, generator=same)).requires_grad_() for heads in (8, 8, 8)]
        first = sequence.attention(*leaves)
        with torch.no_grad():
            alone = sequence.attention(*(2 * x for x in leaves))
        second = sequence.attention(first, *leaves[1:])
        sequence.attention(*(3 * x.detach() for x in leaves))
        return [first, alone, second, *torch.autograd.grad(second.square().sum(), leaves)]

    ways = (ringspan.run_in_process(2, lambda group, way=way: run(group, way)) for way in ("process_group", "peer_memory"))
    for expected, found in zip(*ways, strict=True):
        assert all(torch.equal(ours, right) for ours, right in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("strategy", "heads"), [({"strategy": "ring"}, 4), ({"strategy": "ulysses"}, 4), ({"strategy": "two_dimensional"}, 1)]
)
def test_a_sequence_tells_how_large_its_inbox_is_also_where_heads_are_exchanged_and_where_there_are_none(strategy: dict, heads: int):
    def run(group):
        sequence = ringspan.ContextParallel(group, transport="peer_memory", **strategy).sequence(64)
        x = torch.randn(1, sequence.shard_length, heads, 8)
        sequence.attention(x, x, x)
        return sequence.peer_bytes, peer_memory(group, x.device).inbox(group.rank).numel()

    for told, size in ringspan.run_in_process(4, run):
        assert told == size > 0


@pytest.mark.parametrize(
    ("strategy", "heads", "grows"),
    [({"strategy": "ring"}, 4, True), ({"strategy": "two_dimensional"}, 4, True), ({"strategy": "ulysses", "stages": 2}, 8, False)],
)
def test_peer_memory_is_for_a_forward_alone_until_a_gradient_is_wanted(strategy: dict, heads: int, grows: bool):
    """Where heads are exchanged, and each rank has its own, a backward brings less than a forward."""
    same = torch.Generator().manual_seed(0)
    whole = [torch.randn(1, 64, heads, 8, generator=same) for _ in range(3)]

    def run(group, transport: str):
        sequence = ringspan.ContextParallel(group, transport=transport, **strategy).sequence(64)
        leaves = [sequence.shard(x).requires_grad_() for x in whole]
        with torch.no_grad():
            first = sequence.attention(*leaves)
        alone = sequence.peer_bytes
        out = sequence.attention(*leaves)
        gradients = torch.autograd.grad(out.square().sum(), leaves)
        taken = sequence.peer_bytes
        with torch.no_grad():
            last = sequence.attention(*leaves)
        assert sequence.peer_bytes == taken, "what is there stays"
        return (alone, taken), [first, out.detach(), last, *gradients]

    for (sizes, found), (_, right) in zip(
        *(ringspan.run_in_process(4, lambda group, way=way: run(group, way)) for way in ("peer_memory", "process_group")), strict=True
    ):
        assert 0 < sizes[0] <= sizes[1] and (sizes[0] < sizes[1]) is grows
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
        assert all(map(torch.equal, found, right))


@pytest.mark.parametrize(("kv_heads", "wide"), [(8, 2), (2, 4)], ids=["each its own", "shared"])
def test_an_inbox_is_no_larger_than_what_a_pass_brings(kv_heads: int, wide: int):
    layout, q = make_layout("zigzag", 1024, 4), torch.empty(1, 256, 8, 64, dtype=torch.bfloat16)
    schedules = make_schedules("ulysses", layout, ringspan.causal())
    assert schedules.grid is not None
    _, nbytes = make_rooms(schedules.grid, layout, schedules.layout, q, [head_shares(8, kv_heads, 4)])
    query, keys = 2, 2 * max(1, kv_heads // 4)
    forward = 64 * 2 * (1024 * (query + keys) + 3 * 256 * query) + 3 * 256 * query * 4
    backward = 64 * (1024 * query * 2 + 3 * 256 * (query * 2 + keys * wide)) + 1024 * query * 4
    assert nbytes == max(forward, backward)
    assert make_rooms(schedules.grid, layout, schedules.layout, q, [head_shares(8, kv_heads, 4)], differentiable=False)[1] == forward


def test_what_is_copied_in_eights_is_what_is_copied():
    whole = torch.arange(2 * 6 * 8 * 12, dtype=torch.int16).view(torch.bfloat16).view(2, 6, 8, 12)
    for heads, columns in (
        (slice(2, 4), slice(None)),
        (slice(1, 8), slice(0, 4)),
        (slice(0, 8, 2), slice(1, 5)),
        (slice(0, 1), slice(0, 3)),
    ):
        source = whole[:, 1:5, heads, columns]
        for target in (torch.zeros(source.shape, dtype=torch.bfloat16), torch.zeros(2, 4, 9, 24, dtype=torch.bfloat16)):
            target = target[:, :, : source.shape[2], : source.shape[3]]
            copy_all([(target, source)])
            assert torch.equal(target.view(torch.int16), source.contiguous().view(torch.int16))
