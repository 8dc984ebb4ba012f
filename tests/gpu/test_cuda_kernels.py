"""What runs on a GPU alone: each CUDA kernel and the fused merge beside the reference in plain torch."""

from __future__ import annotations

import pytest
import torch

import ringspan
from ringspan.geometry import Tile
from ringspan.geometry.tile import trimmed
from ringspan.kernels import KERNELS, Problem, Scores, lowered, lse_gradient_refusal
from ringspan.kernels import refusal as refusal_of
from ringspan.kernels.lse_gradient import backward
from ringspan.kernels.partial import merge_

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here: these kernels run on a GPU alone"),
]
CUDA_KERNELS = ("flash4", "cudnn", "flash2", "flex")
BUDGET = 6e-3
"""bfloat16 resolves 4e-3; inputs and results are rounded to it, sums are not."""


def tile_of(queries: int, keys: int, low: int | None = None, high: int | None = None) -> Tile:
    """A trimmed tile of about this size."""
    tile = trimmed(0, queries, 0, keys, low, high)
    assert tile is not None
    return tile


TILES = {
    "full": tile_of(200, 136),
    "causal square": tile_of(256, 256, 0),
    "causal, rows below": tile_of(300, 128, 0),
    "keys before the diagonal": tile_of(128, 300, -172),
    "window": tile_of(300, 300, 0, 64),
    "window off the diagonal": tile_of(200, 260, -100, 30),
}


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    """‖found − exact‖ / ‖exact‖."""
    return float((found.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.parametrize("name", CUDA_KERNELS)
@pytest.mark.parametrize("shape", TILES)
@pytest.mark.parametrize("heads", [(8, 2, 64), (4, 4, 128)])
@pytest.mark.parametrize("through_lse", [False, True], ids=["", "gradient through lse"])
def test_a_kernel_computes_each_tile_as_the_reference_does(name: str, shape: str, heads: tuple[int, int, int], through_lse: bool):
    kernel, tile = KERNELS[name], TILES[shape]
    query_heads, kv_heads, head_dim = heads
    features = frozenset({"window"} if tile.high is not None else ())
    problem = Problem(device="cuda", dtype=torch.bfloat16, heads=query_heads, kv_heads=kv_heads, head_dim=head_dim, features=features)
    if (reason := refusal_of(kernel, problem) or (lse_gradient_refusal(kernel, problem) if through_lse else None)) is not None:
        pytest.skip(f"{name}: {reason}")
    torch.manual_seed(0)
    # The strides of the executor: k and v in one buffer, rows first.
    q, dout = (torch.randn(tile.num_queries, 2, query_heads, head_dim, device="cuda", dtype=torch.bfloat16).movedim(0, 1) for _ in "qd")
    kv = torch.randn(tile.num_keys, 2, 2, kv_heads, head_dim, device="cuda", dtype=torch.bfloat16)
    k, v = kv[:, 0].movedim(0, 1), kv[:, 1].movedim(0, 1)
    exact = KERNELS["reference"]
    wide = [x.double() for x in (q, k, v)]
    out, lse = exact.forward(*wide, Scores(tile, 0.1))
    dlse = torch.randn(lse.shape, device="cuda") * 4 if through_lse else None
    gradients = exact.backward(dout.double(), *wide, out, lse, None if dlse is None else dlse.double(), Scores(tile, 0.1))

    merged = (
        torch.zeros(tile.num_queries, 2, query_heads, head_dim, device="cuda"),
        torch.full((tile.num_queries, 2, query_heads), -torch.inf, device="cuda"),
    )
    parts = lowered(tile, kernel.shapes)
    for part in parts:
        rows, keys = slice(part.q_start, part.q_stop), slice(part.k_start, part.k_stop)
        rows = slice(rows.start - tile.q_start, rows.stop - tile.q_start)
        keys = slice(keys.start - tile.k_start, keys.stop - tile.k_start)
        part_out, part_lse = kernel.forward(q[:, rows], k[:, keys], v[:, keys], Scores(part, 0.1))
        merge_(*merged, [(rows.start, part_out.movedim(0, 1), part_lse.permute(2, 0, 1).float())])
    found_out, found_lse = merged[0].movedim(0, 1), merged[1].permute(1, 2, 0)
    assert relative(found_out, out) < BUDGET
    assert relative(found_lse, lse) < 1e-5
    sums = [torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v)]
    for part in parts:
        rows = slice(part.q_start - tile.q_start, part.q_stop - tile.q_start)
        keys = slice(part.k_start - tile.k_start, part.k_stop - tile.k_start)
        merged_out = found_out[:, rows].to(torch.bfloat16)
        dq, dk, dv = backward(
            kernel, dout[:, rows], q[:, rows], k[:, keys], v[:, keys], merged_out, found_lse[:, :, rows].contiguous(),
            None if dlse is None else dlse[:, :, rows], Scores(part, 0.1),
        )  # fmt: skip
        for total, share, where in zip(sums, (dq, dk, dv), (rows, keys, keys), strict=True):
            total[:, where] += share
    for total, gradient in zip(sums, gradients, strict=True):
        assert relative(total, gradient) < 1.5 * BUDGET


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1, 8), (37, 2, 6, 64), (1000, 1, 8, 128), (5, 3, 7, 80)])
def test_the_fused_merge_is_the_merge(dtype: torch.dtype, shape: tuple[int, int, int, int]):
    rows, batch, heads, head_dim = shape
    torch.manual_seed(1)
    out, lse = torch.randn(shape, device="cuda"), torch.randn(shape[:3], device="cuda") * 5
    part = torch.randn(batch, rows, heads, head_dim, device="cuda", dtype=dtype).movedim(1, 0)
    part_lse = (torch.randn(batch, heads, rows, device="cuda") * 5).permute(2, 0, 1)
    lse[::3], part_lse[::2] = -torch.inf, -torch.inf
    out[::3] = 0
    exact_out, exact_lse = out.cpu(), lse.cpu()
    merge_(exact_out, exact_lse, [(0, part.cpu(), part_lse.cpu())])
    merge_(out, lse, [(0, part, part_lse)])
    assert not out.isnan().any()
    assert torch.equal(torch.isneginf(lse).cpu(), torch.isneginf(exact_lse))
    finite = ~torch.isneginf(exact_lse)
    torch.testing.assert_close(lse.cpu()[finite], exact_lse[finite], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(out.cpu(), exact_out, rtol=2e-5, atol=2e-6)


def test_fused_sums_of_several_parts_and_fused_copies_are_their_specification():
    from tests.kernels import interpreted

    interpreted.main()


@pytest.mark.parametrize("kernel", CUDA_KERNELS)
@pytest.mark.parametrize("strategy", ["ring", "all_gather", "pass_query", "balanced", "two_dimensional"])
def test_attention_over_in_process_ranks_on_one_gpu_equals_one_rank(kernel: str, strategy: str):
    problem = Problem(device="cuda", dtype=torch.bfloat16, heads=8, kv_heads=2, head_dim=64)
    if (reason := refusal_of(KERNELS[kernel], problem)) is not None:
        pytest.skip(f"{kernel}: {reason}")
    torch.manual_seed(2)
    q, dout = (torch.randn(2, 509, 8, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    k, v = (torch.randn(2, 509, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))

    def run(group) -> list[torch.Tensor]:
        sequence = ringspan.ContextParallel(group, strategy=strategy, kernel=kernel).sequence(509)
        leaves = [sequence.shard(x).requires_grad_() for x in (q, k, v)]
        out = sequence.attention(*leaves)
        return [sequence.unshard(x.detach()) for x in (out, *torch.autograd.grad(out, leaves, sequence.shard(dout)))]

    (alone,) = ringspan.run_in_process(1, run)
    for found in ringspan.run_in_process(4, run):
        for ours, wanted in zip(found, alone, strict=True):
            assert relative(ours, wanted) < 1.5 * BUDGET


@pytest.mark.parametrize("into", [None, torch.float32, torch.bfloat16])
def test_the_fused_merge_in_place_reads_everything_before_it_writes(into: torch.dtype | None):
    # Few lse are read by many warps: one that reads late must not see what another has merged. It happened in one run of many.
    torch.manual_seed(3)
    for _ in range(50):
        out, lse = torch.randn(500, 2, 4, 64, device="cuda"), torch.randn(500, 2, 4, device="cuda")
        part, part_lse = torch.randn(300, 2, 4, 64, device="cuda"), torch.randn(300, 2, 4, device="cuda")
        buffers = None if into is None else (torch.full_like(out, torch.nan, dtype=into), torch.full_like(lse, torch.nan))
        exact = (out.cpu(), lse.cpu()) if into is None else tuple(x.cpu() for x in buffers)
        merge_(out.cpu() if into else exact[0], lse.cpu() if into else exact[1], [(100, part.cpu(), part_lse.cpu())],
               into=None if into is None else exact)  # fmt: skip
        merge_(out, lse, [(100, part, part_lse)], into=buffers)
        found = (out, lse) if into is None else buffers
        assert relative(found[0].cpu(), exact[0]) < (1e-2 if into == torch.bfloat16 else 1e-6)
        assert relative(found[1].cpu(), exact[1]) < 1e-6
