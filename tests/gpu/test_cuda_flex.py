"""FlexAttention on a GPU beside the reference in float64, and which backwards give the same bits twice."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import ringspan
from ringspan.geometry.tile import trimmed
from ringspan.kernels import KERNELS, Problem, Scores, lowered

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here: these kernels run on a GPU alone"),
]
BUDGET = 6e-3
"""bfloat16 resolves 4e-3; inputs and results are rounded to it, sums are not."""


def sieve(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """Depends on the head and leaves rows without any key."""
    return (q_idx % 4 != 0) & ((q_idx + 2 * kv_idx + h) % 3 != 0)


def relative(found: Tensor, exact: Tensor) -> float:
    """‖found − exact‖ / ‖exact‖."""
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def scores_of(queries: int, keys: int, low: int | None, high: int | None, softcap: float | None, mod: object) -> Scores:
    tile = trimmed(0, queries, 0, keys, low, high)
    assert tile is not None
    if mod is None:
        return Scores(tile, 0.1, softcap)
    q_positions = 2 * torch.arange(tile.num_queries, device="cuda") + 1
    return Scores(tile, 0.1, softcap, mod, q_positions, 3 * torch.arange(tile.num_keys, device="cuda"), first_head=1)  # type: ignore[arg-type]


CASES = {
    "full": (257, 131, None, None, None, None),
    "causal, prime": (509, 509, 0, None, None, None),
    "window": (600, 600, 0, 64, None, None),
    "window with softcap": (300, 391, -100, 30, 20.0, None),
    "mask_mod": (257, 131, None, None, None, sieve),
    "mask_mod, causal": (509, 509, 0, None, None, sieve),
    "mask_mod in a band with softcap": (131, 311, -20, 50, 2.0, sieve),
    "few rows": (3, 700, None, None, None, sieve),
    "one row": (1, 5, None, None, None, sieve),
}


@pytest.mark.parametrize("heads", [(8, 2, 64), (4, 4, 128), (6, 2, 96)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_flex_agrees_with_the_reference_with_merged_statistics(name: str, heads: tuple[int, int, int]):
    scores = scores_of(*CASES[name])
    query_heads, kv_heads, head_dim = heads
    tile = scores.tile
    torch.manual_seed(0)
    q, dout = (torch.randn(tile.num_queries, 2, query_heads, head_dim, device="cuda").bfloat16().movedim(0, 1) for _ in range(2))
    kv = torch.randn(tile.num_keys, 2, 2, kv_heads, head_dim, device="cuda").bfloat16()
    k, v = kv[:, 0].movedim(0, 1), kv[:, 1].movedim(0, 1)
    exact, kernel = KERNELS["reference"], KERNELS["flex"]
    wide = [x.double() for x in (q, k, v)]
    exact_out, exact_lse = exact.forward(*wide, scores)
    out, lse = kernel.forward(q, k, v, scores)
    assert relative(out, exact_out) < BUDGET and lse.dtype == torch.float32
    assert torch.equal(torch.isneginf(lse), torch.isneginf(exact_lse)), "rows without keys"
    assert not out.masked_select(torch.isneginf(lse).transpose(1, 2).unsqueeze(-1)).any()
    finite = ~torch.isneginf(exact_lse)
    torch.testing.assert_close(lse[finite], exact_lse[finite].float(), rtol=1e-4, atol=1e-4)
    merged_lse = torch.logaddexp(exact_lse, torch.full_like(exact_lse, 0.7))
    merged_out = (exact_out * 0.5).bfloat16()
    dlse = torch.randn(exact_lse.shape, device="cuda")
    for gradient in (None, dlse):
        found = kernel.backward(dout, q, k, v, merged_out, merged_lse.float(), gradient, scores)
        wide_gradient = None if gradient is None else gradient.double()
        expected = exact.backward(dout.double(), *wide, merged_out.double(), merged_lse, wide_gradient, scores)
        for ours, wanted in zip(found, expected, strict=True):
            assert ours.shape == wanted.shape and relative(ours, wanted) < 2 * BUDGET


@pytest.mark.parametrize("strategy", ["ring", "all_gather", "pass_query"])
def test_a_mask_mod_over_in_process_ranks_equals_one_rank(strategy: str):
    torch.manual_seed(2)
    q, dout = (torch.randn(1, 509, 8, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    k, v = (torch.randn(1, 509, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    mask = ringspan.causal() & ringspan.mask_mod(sieve)

    def run(group) -> list[Tensor]:
        sequence = ringspan.ContextParallel(group, strategy=strategy, kernel="flex").sequence(509, mask)
        leaves = [sequence.shard(x).requires_grad_() for x in (q, k, v)]
        out = sequence.attention(*leaves, softcap=20.0)
        return [sequence.unshard(x.detach()) for x in (out, *torch.autograd.grad(out, leaves, sequence.shard(dout)))]

    (alone,) = ringspan.run_in_process(1, run)
    for found in ringspan.run_in_process(3, run):
        for ours, wanted in zip(found, alone, strict=True):
            assert relative(ours, wanted) < 2 * BUDGET


@pytest.mark.parametrize("name", [name for name, kernel in KERNELS.items() if kernel.can.device == "cuda"])
def test_a_backward_that_promises_the_same_bits_gives_them(name: str):
    kernel = KERNELS[name]
    problem = Problem(device="cuda", dtype=torch.bfloat16, heads=16, kv_heads=4, head_dim=128, deterministic=True)
    if (reason := kernel.refusal(problem)) is not None:
        pytest.skip(f"{name}: {reason}")
    tile = trimmed(0, 4096, 0, 4096, 0, None)
    assert tile is not None
    torch.manual_seed(3)
    q, dout = (torch.randn(1, 4096, 16, 128, device="cuda").bfloat16() for _ in range(2))
    k, v = (torch.randn(1, 4096, 4, 128, device="cuda").bfloat16() for _ in range(2))
    (part,) = lowered(tile, kernel.shapes)
    scores = Scores(part, 128**-0.5, deterministic=True)
    out, lse = kernel.forward(q, k, v, scores)
    runs = [kernel.backward(dout, q, k, v, out, lse, None, scores) for _ in range(8)]
    for again in runs[1:]:
        assert all(torch.equal(ours, first) for ours, first in zip(again, runs[0], strict=True))
    assert not torch.are_deterministic_algorithms_enabled()
