"""What the ranks of test_cuda_replay run, each on its own GPU: attention that is replayed beside attention that is launched.

torchrun --nproc-per-node 2 tests/gpu/replay_ranks.py
"""

from __future__ import annotations

import faulthandler
import os
from typing import Any

import pytest
import torch
import torch.distributed as dist

import ringspan
from ringspan.attention.replay import EAGER_CALLS
from ringspan.errors import RingspanError
from tests.gpu.torchrun import PATIENCE

LENGTHS = (1000, 4097)
WAYS: dict[str, dict[str, Any]] = {
    "ring": {},
    "direct": {"strategy": "direct", "shards_at_once": 2},
    "ulysses": {"strategy": "ulysses"},
}
REFUSED: dict[str, dict[str, Any]] = {"ring over NCCL": {"transport": "process_group"}, "two heads at a time": {"kv_heads_per_stage": 2}}


def tensors(length: int, device: torch.device, kv_heads: int = 4) -> list[torch.Tensor]:
    """q, k, v and dO of a shard, new at every call."""
    return [torch.randn(1, length, heads, 64, device=device, dtype=torch.bfloat16) for heads in (8, kv_heads, kv_heads, 8)]


def both(sequence: ringspan.Sequence, given: list[torch.Tensor]) -> list[torch.Tensor]:
    """out and the gradients."""
    *leaves, dout = given
    q, k, v = (x.clone().requires_grad_() for x in leaves)
    out = sequence.attention(q, k, v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]


def exchange(device: torch.device) -> None:
    """Heads are exchanged through peer memory to the bits that NCCL brings, also in a graph: some of q each, and one of k for all."""
    ways = [
        ringspan.ContextParallel(kernel="flash2", deterministic=True, strategy="ulysses", transport=way).sequence(LENGTHS[1])
        for way in ("process_group", "peer_memory")
    ]
    for _ in range(EAGER_CALLS):
        given = tensors(ways[0].shard_length, device, kv_heads=1)
        expected, found = (both(way, given) for way in ways)
        for which, mine, right in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
            assert torch.equal(mine, right), f"ulysses: {which} differs from what NCCL brings"
    graph = torch.cuda.CUDAGraph()
    # A forward alone is another call: nothing is agreed on, and no room is made for it, in a capture.
    with pytest.raises(RingspanError, match="gradients=False"):
        with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
            ways[1].attention(*given[:3])
    ways[1].attention(*given[:3])
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        out = ways[1].attention(*given[:3])
    for _ in range(3):
        out.zero_()
        graph.replay()
        assert torch.equal(out, expected[0]), "ulysses: out of a graph differs from what NCCL brings"


def assert_same(what: str, found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """The same bits, but of dq: how many parts the backward of flash2 adds it up from depends on how many heads it is given.

    It may be a last bit of bfloat16 apart.
    """
    for which, mine, right in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        if which == "dq":
            torch.testing.assert_close(mine, right, rtol=2**-7, atol=1e-3 * right.abs().max().item(), msg=f"{what}: dq differs")
        else:
            assert torch.equal(mine, right), f"{what}: {which} differs from what all heads at once give"


def staged(device: torch.device) -> None:
    """Heads in stages give the bits of all heads at once through NCCL: launched over long shards, in a graph over short ones."""
    plain, stages = (
        ringspan.ContextParallel(kernel="flash2", deterministic=True, strategy="ulysses", transport=way, stages=number)
        for way, number in (("process_group", 1), ("peer_memory", 2))
    )
    # Of short sequences of few heads flash2 sums the keys in parts, and one head differs with the number of others.
    for length in (80_001, 20_001):
        expected, found = plain.sequence(length), stages.sequence(length)
        for _ in range(6):
            given = tensors(found.shard_length, device, kv_heads=8)
            assert_same(f"ulysses in stages, {length} tokens", both(found, given), both(expected, given))
    # After another pass through the same memory, on another stream, and before one.
    ring, stream = ringspan.ContextParallel(kernel="flash2", deterministic=True).sequence(80_001), torch.cuda.Stream()
    given = tensors(ring.shard_length, device, kv_heads=8)
    alone, long = both(ring, given), stages.sequence(80_001)
    right_stages = both(long, given)
    for _ in range(4):
        torch.cuda.synchronize()
        first = both(ring, given)
        with torch.cuda.stream(stream):
            second = both(long, given)
        third = both(ring, given)
        torch.cuda.synchronize()
        for mine, right in zip([*first, *second, *third], [*alone, *right_stages, *alone], strict=True):
            assert torch.equal(mine, right), "passes on two streams meet in one inbox"
    given = tensors(found.shard_length, device, kv_heads=8)
    given = [x.requires_grad_() for x in given[:3]] + given[3:]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        out = found.attention(*given[:3])
        captured = [out.detach(), *torch.autograd.grad(out, given[:3], given[3])]
    for _ in range(5):
        given = [
            kept.copy_(new) for kept, new in zip((x.detach() for x in given), tensors(found.shard_length, device, kv_heads=8), strict=True)
        ]
        graph.replay()
        assert_same("ulysses in stages, of a graph", captured, both(expected, given))


def main() -> None:
    """Raises where a replay differs in a bit from launches, or an exchange of heads from NCCL's."""
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    torch.manual_seed(dist.get_rank())
    aside = torch.cuda.Stream()
    for name, options in WAYS.items():
        # The backward of flash2 gives the same bits where it is asked to.
        launched, replayed = (
            ringspan.ContextParallel(kernel="flash2", deterministic=True, cuda_graphs=graphs, **options) for graphs in (False, True)
        )
        for call in range(EAGER_CALLS + 4):
            # A longer sequence at the end makes the inboxes grow under graphs that use the old ones.
            for length in LENGTHS if call < EAGER_CALLS + 3 else (20_001, *LENGTHS):
                expected, found = launched.sequence(length), replayed.sequence(length)
                given = tensors(found.shard_length, device)
                for stream in (torch.cuda.current_stream(), aside):
                    stream.wait_stream(torch.cuda.current_stream())
                    with torch.cuda.stream(stream):
                        results = both(found, given)
                    torch.cuda.current_stream().wait_stream(stream)
                    for which, mine, right in zip(("out", "dq", "dk", "dv"), results, both(expected, given), strict=True):
                        assert torch.equal(mine, right), f"{name}, {length} tokens, call {call}: {which} differs"
        assert replayed.replays is not None and replayed.replays.number >= 4, name
        if dist.get_rank() == 0:
            print(f"{name}: {replayed.replays.number} graphs", flush=True)
    exchange(device)
    staged(device)
    for options in REFUSED.values():
        sequence = ringspan.ContextParallel(kernel="flash2", cuda_graphs=True, **options).sequence(LENGTHS[0])
        with pytest.raises(RingspanError, match="destroy_process_group"):
            both(sequence, tensors(sequence.shard_length, device))
    # While there are graphs.
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
