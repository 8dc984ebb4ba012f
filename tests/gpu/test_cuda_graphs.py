"""What a captured graph reads besides its inputs, such as where documents begin, is there as long as it may be replayed."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import ringspan
from ringspan.bench.case import Shape
from ringspan.bench.graph import captured
from ringspan.bench.one_device import one_device
from ringspan.bench.passes import whole_inputs
from ringspan.kernels import KERNELS, refusal

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here: CUDA graphs are a GPU's"),
]
SHAPE = Shape(tokens=16384, num_ranks=1, documents="realistic:1", heads=8, kv_heads=2)


def overwritten() -> list[Tensor]:
    """Whatever was freed, given out again and written to: small blocks, as a few integers are."""
    gc.collect()
    return [torch.full((size,), 2**30, dtype=torch.int32, device="cuda") for size in (1, 64, 129, 200, 400, 1000) for _ in range(2000)]


def check(make: Callable[[], tuple[Callable[[], Tensor], Tensor]]) -> None:
    """`make()`: a replay, and what it is to give."""
    replay, expected = make()
    kept = overwritten()
    torch.testing.assert_close(replay(), expected, rtol=0, atol=0)
    del kept


@pytest.mark.parametrize("kernel", ["flash4", "flash2"])
def test_the_baseline_of_the_bench_is_replayed_when_nobody_else_knows_its_documents(kernel: str):
    if reason := refusal(KERNELS[kernel], SHAPE.problem(torch.device("cuda"))):
        pytest.skip(f"{kernel}: {reason}")
    inputs = whole_inputs(SHAPE, torch.device("cuda"))

    def make() -> tuple[Callable[[], Tensor], Tensor]:
        passes, how = one_device(kernel, SHAPE, inputs)
        assert "varlen" in how
        replay = captured(passes.forward)
        return lambda: replay()[0], passes.forward()[0].clone()

    check(make)


def test_a_users_graph_is_replayed_when_the_sequence_is_gone():
    if reason := refusal(KERNELS["flash4"], SHAPE.problem(torch.device("cuda"))):
        pytest.skip(f"flash4, the kernel that takes documents in one launch: {reason}")
    inputs = whole_inputs(SHAPE, torch.device("cuda"))

    def make() -> tuple[Callable[[], Tensor], Tensor]:
        sequence = ringspan.ContextParallel(None, kernel="flash4", layout="contiguous").sequence(SHAPE.length, SHAPE.made_mask)
        with torch.no_grad():
            expected = [sequence.attention(inputs.q, inputs.k, inputs.v) for _ in range(3)][-1].clone()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = sequence.attention(inputs.q, inputs.k, inputs.v)

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay, expected

    check(make)
