"""FlexAttention as a kernel, as far as it goes without a GPU: its blocks, its scores, and the algebra of its backward.

Its compiler for CPUs differentiates nothing, so torch's own eager form of the operator stands in: scores whole, the same mask_mod,
score_mod and blocks. What only a GPU shows is in tests/gpu.
"""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex

from ringspan.geometry import Tile
from ringspan.geometry.tile import trimmed
from ringspan.kernels import KERNELS, Problem, Scores, flex_tiles
from ringspan.kernels.flex import Flex, tile_gradients
from tests.support.errors import relative

F32 = torch.float32


def sieve(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """Depends on the head and leaves rows without any key."""
    return (q_idx % 4 != 0) & ((q_idx + 2 * kv_idx + h) % 3 != 0)


def scores_of(queries: int, keys: int, low: int | None, high: int | None, softcap: float | None, mod: object) -> Scores:
    tile = trimmed(0, queries, 0, keys, low, high)
    assert tile is not None
    if mod is None:
        return Scores(tile, 0.3, softcap)
    q_positions, k_positions = 2 * torch.arange(tile.num_queries) + 1, 3 * torch.arange(tile.num_keys)
    return Scores(tile, 0.3, softcap, mod, q_positions, k_positions, first_head=1)  # type: ignore[arg-type]


CASES = {
    "full": scores_of(37, 53, None, None, None, None),
    "causal": scores_of(131, 131, 0, None, None, None),
    "window with softcap": scores_of(200, 260, -100, 30, 20.0, None),
    "mask_mod": scores_of(257, 131, None, None, None, sieve),
    "mask_mod in a band with softcap": scores_of(131, 200, -20, 50, 2.0, sieve),
    "one row": scores_of(1, 5, None, None, None, sieve),
}


def tensors(scores: Scores, heads: int = 6, kv_heads: int = 2, head_dim: int = 16, dtype: torch.dtype = F32) -> list[Tensor]:
    """q, k, v, dout, dlse, with the strides of the executor: rows first, k and v in one buffer."""
    generator = torch.Generator().manual_seed(7)
    tile = scores.tile
    q, dout = (torch.randn(tile.num_queries, 2, heads, head_dim, generator=generator).to(dtype).movedim(0, 1) for _ in range(2))
    kv = torch.randn(tile.num_keys, 2, 2, kv_heads, head_dim, generator=generator).to(dtype)
    dlse = torch.randn(2, heads, tile.num_queries, generator=generator)
    return [q, kv[:, 0].movedim(0, 1), kv[:, 1].movedim(0, 1), dout, dlse]


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> Flex:
    # Torch refuses gradients on CPUs here, because its compiled form has none there; its eager form has.
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
    return Flex(backend="aot_eager")


@pytest.mark.parametrize("name", CASES)
def test_its_blocks_and_mask_mod_allow_what_the_scores_allow_and_nothing_else(name: str):
    scores, heads = CASES[name], 4
    tile = scores.tile
    expected = scores.allowed(slice(0, tile.num_queries), 1, heads, torch.device("cpu"))
    made = flex_tiles.block_mask(scores, 1, heads, torch.device("cpu"))
    if expected is None:
        assert made is None
        return
    expected = expected.expand(1, heads, tile.num_queries, tile.num_keys)
    assert made is not None
    per_pair = torch_flex.create_mask(made.mask_mod, 1, heads, tile.num_queries, tile.num_keys, device="cpu")
    assert torch.equal(per_pair, expected)
    # Torch builds its own blocks from that function, all of them at once.
    theirs = torch_flex.create_block_mask(made.mask_mod, 1, heads, tile.num_queries, tile.num_keys, device="cpu", BLOCK_SIZE=128)
    assert torch.equal(made.to_dense().expand(1, heads, -1, -1), theirs.to_dense())
    for counts, indices in ((made.kv_num_blocks, made.kv_indices), (made.full_kv_num_blocks, made.full_kv_indices)):
        assert counts is not None and indices is not None and counts.dtype == indices.dtype == torch.int32
    for ours, wanted in ((made.kv_num_blocks, theirs.kv_num_blocks), (made.full_kv_num_blocks, theirs.full_kv_num_blocks)):
        assert ours is not None and wanted is not None
        assert torch.equal(ours.expand(1, heads, -1), wanted.expand(1, heads, -1)), "as many mixed, and as many full"


@pytest.mark.parametrize("name", CASES)
def test_it_agrees_with_the_reference_forward_and_backward_with_merged_statistics(name: str, eager: Flex):
    scores = CASES[name]
    q, k, v, dout, dlse = tensors(scores)
    exact = KERNELS["reference"]
    out, lse = eager.forward(q, k, v, scores)
    wide = [x.double() for x in (q, k, v)]
    exact_out, exact_lse = exact.forward(*wide, scores)
    assert relative(out, exact_out) < 1e-6
    assert torch.equal(torch.isneginf(lse), torch.isneginf(exact_lse)), "rows without keys"
    assert not out.masked_select(torch.isneginf(lse).transpose(1, 2).unsqueeze(-1)).any()
    finite = ~torch.isneginf(exact_lse)
    torch.testing.assert_close(lse[finite], exact_lse[finite].float(), rtol=2e-6, atol=2e-6)
    # Other keys have taken weight since: a merged lse is larger than the tile's own, also where that is −inf.
    merged_lse = torch.logaddexp(exact_lse, torch.full_like(exact_lse, 0.7))
    merged_out = exact_out * 0.5
    for gradient in (None, dlse):
        found = eager.backward(dout, q, k, v, merged_out.float(), merged_lse.float(), gradient, scores)
        wide_gradient = None if gradient is None else gradient.double()
        expected = exact.backward(dout.double(), *wide, merged_out, merged_lse, wide_gradient, scores)
        for ours, wanted in zip(found, expected, strict=True):
            assert ours.shape == wanted.shape and relative(ours, wanted) < 2e-6
    empty = torch.full_like(exact_lse, -math.inf).where(torch.isneginf(exact_lse), exact_lse)
    for ours in eager.backward(dout, q, k, v, exact_out.float(), empty.float(), None, scores):
        assert not ours.isnan().any(), "a row that saw no key in any tile"


def test_bfloat16_stays_within_its_resolution(eager: Flex):
    scores = CASES["mask_mod in a band with softcap"]
    q, k, v, dout, _ = tensors(scores, dtype=torch.bfloat16)
    exact = KERNELS["reference"]
    wide = [x.double() for x in (q, k, v)]
    out, lse = exact.forward(*wide, scores)
    found = eager.backward(dout, q, k, v, out.bfloat16(), lse.float() + 0.7, None, scores)
    for ours, wanted in zip(found, exact.backward(dout.double(), *wide, out, lse + 0.7, None, scores), strict=True):
        assert relative(ours, wanted) < 1e-2


def test_a_row_that_sees_nothing_of_the_tile_asks_nothing_of_it():
    dout, out, tile_out = (torch.randn(1, 2, 3, 4) for _ in range(3))
    lse = torch.tensor([0.3, -math.inf, 1.0]).expand(1, 2, 3)
    tile_lse = torch.tensor([-math.inf, -math.inf, 0.5]).expand(1, 2, 3)
    outer, slope = tile_gradients(dout, out, lse, None, tile_out, tile_lse)
    assert not outer[:, :, :2].any() and not slope[:, :, :2].any()
    assert outer[:, :, 2].all() and not slope.isnan().any()


def test_tiles_are_kept_and_no_more_than_so_many():
    kept = flex_tiles.FlexTiles(limit=2)
    cpu = torch.device("cpu")
    first = kept.get(CASES["causal"], 2, 4, cpu)
    assert kept.get(CASES["causal"], 2, 4, cpu) is first
    moved = CASES["causal"].tile.shifted(5, 5)
    assert kept.get(Scores(moved, 0.3), 2, 4, cpu) is first, "where a tile lies in its shards changes nothing"
    assert kept.get(Scores(moved, 0.4), 2, 4, cpu) is not first
    kept.get(CASES["full"], 2, 4, cpu)
    assert len(kept) == 2 and kept.get(CASES["causal"], 2, 4, cpu) is not first


def test_what_a_captured_graph_reads_of_a_tile_stays(monkeypatch: pytest.MonkeyPatch):
    kept, cpu = flex_tiles.FlexTiles(limit=1), torch.device("cpu")

    def blocks() -> weakref.ref[Tensor]:
        mask = kept.get(CASES["causal"], 2, 4, cpu).block_mask
        assert mask is not None
        return weakref.ref(mask.kv_indices)

    launched = blocks()
    kept.get(CASES["full"], 2, 4, cpu)
    gc.collect()
    assert launched() is None
    blocks()
    monkeypatch.setattr(flex_tiles, "is_captured", lambda device: device == cpu)
    captured = [blocks(), blocks()]
    kept.get(CASES["full"], 2, 4, cpu)
    gc.collect()
    assert captured[0]() is captured[1]() is not None
    assert len(kept) == 1 and len(kept._captured) == 1, "once, however often it is captured"


def test_positions_tell_tiles_apart_and_live_as_long_as_what_was_made_of_them():
    kept, cpu = flex_tiles.FlexTiles(), torch.device("cpu")
    tile, positions = Tile(0, 4, 0, 4), torch.arange(16)

    def first_rows(start: int) -> flex_tiles.FlexTile:
        return kept.get(Scores(tile, 0.3, None, sieve, positions[start : start + 4], positions[:4]), 1, 2, cpu)

    assert first_rows(0) is first_rows(0) and first_rows(0) is not first_rows(4)
    held = first_rows(4).held[0]
    assert held is not None and held.data_ptr() == positions[4:].data_ptr()


def test_it_is_for_cuda_and_says_so():
    problem = Problem(device="cpu", dtype=torch.bfloat16, heads=4, kv_heads=2, head_dim=64)
    assert KERNELS["flex"].refusal(problem) == "it runs on cuda, and the tensors are on cpu"


def test_what_is_kept_from_inference_mode_serves_a_backward(eager: Flex):
    """Autograd saves no tensor that was made in inference mode, and a backward saves a tile's blocks and numbers."""
    scores = CASES["mask_mod in a band with softcap"]
    q, k, v, dout, _ = tensors(scores)
    with torch.inference_mode():
        eager.forward(*(x.clone() for x in (q, k, v)), scores)
    out, lse = eager.forward(q, k, v, scores)
    assert all(torch.isfinite(gradient).all() for gradient in eager.backward(dout, q, k, v, out, lse, None, scores))
