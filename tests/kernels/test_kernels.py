"""Kernels tile by tile: the reference beside dense attention, the others beside the reference, and what each refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ringspan.errors import UnsupportedError
from ringspan.geometry import Tile
from ringspan.geometry.tile import trimmed
from ringspan.kernels import KERNELS, Problem, Scores, lowered, reference, select_kernel
from tests.support.dense import Tensors, dense
from tests.support.errors import relative
from tests.support.laws import tile_pairs
from tests.support.sizes import HEADS, examples

F64 = torch.float64
BANDS = [(None, None), (0, None), (-3, None), (2, None), (None, 1), (-2, 3), (0, 0), (5, None), (None, -4), (1, 2)]
"""Full, causal, causal with keys before the diagonal, and windows; the last ones leave rows without any key on a 7 × 9 rectangle."""


def rectangle(queries: int, keys: int, heads: int = 4, kv_heads: int = 2, batch: int = 2, dtype: torch.dtype = F64) -> Tensors:
    generator = torch.Generator().manual_seed(queries * 100 + keys)

    def normal(rows: int, count: int) -> Tensor:
        return torch.randn(batch, rows, count, 8, generator=generator, dtype=F64).to(dtype)

    return Tensors(normal(queries, heads), normal(keys, kv_heads), normal(keys, kv_heads), normal(queries, heads))


def band(tile: Tile) -> Tensor:
    allowed = torch.zeros(tile.num_queries, tile.num_keys, dtype=torch.bool)
    pairs = tile_pairs(tile)
    allowed[pairs[:, 0] - tile.q_start, pairs[:, 1] - tile.k_start] = True
    return allowed


@pytest.mark.parametrize(("low", "high"), BANDS)
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_the_reference_is_dense_attention_on_any_band_rows_without_keys_included(low, high, heads: int, kv_heads: int):
    tile, tensors = Tile(0, 7, 0, 9, low, high), rectangle(7, 9, heads, kv_heads)
    exact = dense(tensors, band(tile))
    scores = Scores(tile, 8**-0.5)
    kernel = KERNELS["reference"]
    out, lse = kernel.forward(tensors.q, tensors.k, tensors.v, scores)
    grads = kernel.backward(tensors.dout, tensors.q, tensors.k, tensors.v, out, lse, None, scores)
    for found, expected in zip((out, lse, *grads), (exact.out, exact.lse, exact.dq, exact.dk, exact.dv), strict=True):
        assert relative(found, expected) <= 1e-13
    empty = ~band(tile).any(-1)
    assert not out[:, empty].any() and torch.isneginf(lse[:, :, empty]).all() and not grads[0][:, empty].any()


def test_the_reference_gives_the_same_in_blocks_of_queries(monkeypatch: pytest.MonkeyPatch):
    tile, tensors = Tile(0, 23, 0, 17, -2, 5), rectangle(23, 17)
    kernel, scores = KERNELS["reference"], Scores(tile, 0.3)

    def both() -> list[Tensor]:
        out, lse = kernel.forward(tensors.q, tensors.k, tensors.v, scores)
        return [out, lse, *kernel.backward(tensors.dout, tensors.q, tensors.k, tensors.v, out, lse, None, scores)]

    whole = both()
    monkeypatch.setattr(reference, "SCORES_IN_MEMORY", 2 * 4 * 17 * 4)
    for in_blocks, at_once in zip(both(), whole, strict=True):
        assert relative(in_blocks, at_once) <= 1e-14


def test_the_reference_never_rounds_partials_below_float32():
    tensors = rectangle(5, 6, dtype=torch.bfloat16)
    out, lse = KERNELS["reference"].forward(tensors.q, tensors.k, tensors.v, Scores(Tile(0, 5, 0, 6), 0.3))
    assert out.dtype == lse.dtype == torch.float32


@pytest.mark.parametrize(("low", "high"), BANDS)
@pytest.mark.parametrize(("queries", "keys"), [(7, 9), (9, 7), (8, 8), (1, 5), (600, 40)])
def test_the_cpu_kernel_agrees_with_the_reference_on_every_tile_that_it_is_given(low, high, queries: int, keys: int):
    whole = trimmed(0, queries, 0, keys, low, high)
    fast, slow = KERNELS["torch_cpu"], KERNELS["reference"]
    for tile in () if whole is None else lowered(whole, fast.shapes):
        tensors = rectangle(tile.num_queries, tile.num_keys, heads=6, kv_heads=2)
        scores = Scores(tile, 0.25)
        expected = slow.forward(tensors.q, tensors.k, tensors.v, scores)
        for found, wanted in zip(fast.forward(tensors.q, tensors.k, tensors.v, scores), expected, strict=True):
            assert relative(found, wanted) <= 1e-13
        # A merged lse is larger than the tile's own: other keys have taken weight.
        merged_out, merged_lse = expected[0] * 0.5, expected[1] + 0.7
        arguments = (tensors.dout, tensors.q, tensors.k, tensors.v, merged_out, merged_lse, None, scores)
        for found, wanted in zip(fast.backward(*arguments), slow.backward(*arguments), strict=True):
            assert relative(found, wanted) <= 1e-13


@examples(200)
@given(queries=st.integers(1, 9), keys=st.integers(1, 9), low=st.one_of(st.none(), st.integers(-9, 9)))
def test_a_lowered_tile_covers_the_same_pairs_once_in_shapes_that_the_kernel_has(queries: int, keys: int, low: int | None):
    tile = trimmed(3, 3 + queries, 4, 4 + keys, low, None)
    if tile is None:
        return
    for shapes in ({"causal", "square"}, {"square"}, {"causal", "square", "band"}):
        parts = lowered(tile, frozenset(shapes))
        covered = torch.cat([tile_pairs(part) for part in parts]).tolist()
        assert sorted(covered) == sorted(tile_pairs(tile).tolist())
        for part in parts:
            square = part.num_queries == part.num_keys
            assert part.kind == "full" or "band" in shapes or (part.kind == "causal" and ("causal" in shapes or square))


def test_a_kernel_without_windows_is_never_handed_one():
    with pytest.raises(NotImplementedError, match="no window"):
        lowered(Tile(0, 4, 0, 4, 0, 1), frozenset({"causal", "square"}))


# ---- selection ---------------------------------------------------------------------------------------------------------------------


def problem(**changes: object) -> Problem:
    return Problem(**{"device": "cpu", "dtype": torch.float32, "heads": 4, "kv_heads": 2, "head_dim": 64, **changes})  # type: ignore[arg-type]


def test_auto_takes_the_fastest_kernel_that_computes_the_problem():
    assert select_kernel("auto", problem()).name == "torch_cpu"
    assert select_kernel("auto", problem(features=frozenset({"softcap"}))).name == "reference"
    assert select_kernel("auto", problem(dtype=torch.float32, device="cuda")).name == "reference"


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("cudnn", {}, "it runs on cuda, and the tensors are on cpu"),
        ("flash2", {}, "it runs on cuda"),
        ("torch_cpu", {"device": "cuda"}, "it runs on cpu, and the tensors are on cuda"),
        ("cudnn", {"device": "cuda"}, "it computes float16, bfloat16, not float32"),
        ("cudnn", {"device": "cuda", "dtype": torch.bfloat16, "head_dim": 12}, "multiples of 8 up to 128, not 12"),
        ("flash2", {"device": "cuda", "dtype": torch.bfloat16, "head_dim": 264}, "multiples of 8 up to 256, not 264"),
        ("torch_cpu", {"features": frozenset({"softcap"})}, "it computes no softcap"),
        ("fastest", {}, "the kernels are auto, "),
    ],
    ids=str,
)
def test_a_kernel_that_was_asked_for_is_given_or_refused_with_the_reason_and_never_replaced(name: str, changes: dict, reason: str):
    with pytest.raises(UnsupportedError, match=reason) as caught:
        select_kernel(name, problem(**changes))
    assert "kernel=" in caught.value.nearest


@pytest.mark.parametrize("name", ["torch_cpu", "reference"])
def test_a_kernel_that_was_asked_for_and_can_is_given(name: str):
    assert select_kernel(name, problem()).name == name
