"""Many tiles in one launch: which may share one, and that nothing changes but the number of launches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ringspan
from ringspan.geometry import Tile, documents, sliding_window
from ringspan.geometry.tile import trimmed
from ringspan.kernels import KERNELS, Scores, packed
from ringspan.kernels.protocol import common_window
from ringspan.kernels.reference import Reference
from tests.support.dense import dense, make_tensors
from tests.support.errors import BUDGETS, assert_close
from tests.support.sizes import examples
from tests.support.split import Split, split_attention


def allowed(queries: int, keys: int, left: int | None, right: int | None) -> torch.Tensor:
    """What flash-attn allows of a part with this window."""
    i, j = torch.arange(queries)[:, None], torch.arange(keys)[None]
    corner = keys - queries
    result = torch.ones(queries, keys, dtype=torch.bool)
    if left is not None:
        result &= j >= i + corner - left
    if right is not None:
        result &= j <= i + corner + right
    return result


def shape_of(tile: Tile) -> torch.Tensor:
    """What the tile allows."""
    found = Scores(tile, 1.0).allowed(slice(0, tile.num_queries), 1, 1, torch.device("cpu"))
    return torch.ones(tile.num_queries, tile.num_keys, dtype=torch.bool) if found is None else found[0, 0]


@examples(60)
@given(data=st.data())
def test_a_common_window_allows_in_each_part_what_its_band_allows(data: st.DataObject):
    parts, row, column = [], 0, 0
    for _ in range(data.draw(st.integers(1, 4))):
        low = data.draw(st.sampled_from([None, 0, 0, -2]))
        tile = trimmed(
            row,
            row + data.draw(st.integers(1, 6)),
            column,
            column + data.draw(st.integers(1, 6)),
            low,
            data.draw(st.sampled_from([None, None, 1, 3])),
        )
        if tile is not None:
            parts.append(tile)
            row, column = tile.q_stop, tile.k_stop
    window = common_window(parts) if parts else None
    if window is not None:
        for part in parts:
            assert torch.equal(allowed(part.num_queries, part.num_keys, *window), shape_of(part))


def test_documents_along_the_diagonal_are_one_run_and_gaps_and_other_bands_are_not():
    squares = [Tile(0, 3, 0, 3, 0), Tile(3, 4, 3, 4), Tile(4, 9, 4, 9, 0)]
    assert packed(squares) == [tuple(squares)], "a document of one token is full under any mask"
    assert len(packed([squares[0], squares[2]])) == 2, "rows between them"
    assert len(packed([Tile(0, 3, 0, 3, 0), Tile(3, 6, 3, 6)])) == 2, "causal and full"
    windows = [Tile(0, 9, 0, 9, 0, 2), Tile(9, 11, 9, 11, 0), Tile(11, 20, 11, 20, 0, 2)]
    assert packed(windows) == [tuple(windows)], "a window binds nothing in a document that is shorter"


class Varlen(Reference):
    """The reference, which takes many parts in one launch and counts launches."""

    can = replace(Reference.can, varlen=True)
    launches = 0

    def forward(self, q, k, v, scores):
        """Part by part."""
        type(self).launches += 1
        if not scores.parts:
            return super().forward(q, k, v, scores)
        assert q.shape[0] == 1
        out, lse = torch.full_like(q, torch.nan), q.new_full((1, q.shape[2], q.shape[1]), torch.nan)
        for rows, keys, each in _each(scores):
            out[:, rows], lse[:, :, rows] = super().forward(q[:, rows], k[:, keys], v[:, keys], each)
        return out, lse

    def backward(self, dout, q, k, v, out, lse, dlse, scores):
        """Part by part."""
        if not scores.parts:
            return super().backward(dout, q, k, v, out, lse, dlse, scores)
        dq, dk, dv = (torch.full_like(x, torch.nan) for x in (q, k, v))
        for rows, keys, each in _each(scores):
            dlse_rows = None if dlse is None else dlse[:, :, rows]
            dq[:, rows], dk[:, keys], dv[:, keys] = super().backward(
                dout[:, rows], q[:, rows], k[:, keys], v[:, keys], out[:, rows], lse[:, :, rows], dlse_rows, each
            )
        return dq, dk, dv


def _each(scores: Scores):
    left, right = common_window(scores.parts) or (None, None)
    for part in scores.parts:
        corner = part.num_keys - part.num_queries
        # As flash-attn would see it: one window for all.
        tile = Tile(
            0, part.num_queries, 0, part.num_keys, None if right is None else -right - corner, None if left is None else left - corner
        )
        rows = slice(part.q_start - scores.tile.q_start, part.q_stop - scores.tile.q_start)
        keys = slice(part.k_start - scores.tile.k_start, part.k_stop - scores.tile.k_start)
        yield rows, keys, replace(scores, tile=tile, parts=())


BORDERS = [0, 5, 6, 14, 23, 24, 25, 40, 61]


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "auto"])
@pytest.mark.parametrize("strategy", ["ring", "direct", "all_gather"])
@pytest.mark.parametrize("window", [False, True])
def test_documents_in_one_launch_are_exact(layout: str, strategy: str, window: bool, monkeypatch: pytest.MonkeyPatch):
    mask = ringspan.causal() & documents(BORDERS)
    mask = mask & sliding_window(4) if window else mask
    tensors = make_tensors(61, batch=1, heads=4, kv_heads=2, head_dim=8, seed=4)
    i, j = torch.arange(61)[:, None], torch.arange(61)[None]
    document = torch.bucketize(torch.arange(61), torch.tensor(BORDERS[1:]), right=True)
    visible = (j <= i) & (document[:, None] == document[None])
    visible = visible & (i - j <= 4) if window else visible
    split = Split(num_ranks=3, mask=mask, strategy=strategy, layout=layout)
    counts = []
    for kernel in (Varlen(), Reference()):
        monkeypatch.setitem(KERNELS, "reference", kernel)
        monkeypatch.setattr(Varlen, "launches", 0)
        found, _ = split_attention(split, tensors)
        assert_close(found, dense(tensors, visible), BUDGETS[torch.float64], str(split))
        counts.append(Varlen.launches)
    if layout == "contiguous":
        assert counts[0] <= 3 + 3, "one for each shard's documents, and one for each that a border cuts"


def test_a_batch_of_several_sequences_is_launched_tile_by_tile(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(KERNELS, "reference", Varlen())
    tensors = make_tensors(61, batch=2, heads=4, kv_heads=2, head_dim=8, seed=4)
    split = Split(num_ranks=2, mask=ringspan.causal() & documents(BORDERS), layout="contiguous")
    document = torch.bucketize(torch.arange(61), torch.tensor(BORDERS[1:]), right=True)
    visible = (torch.arange(61)[None] <= torch.arange(61)[:, None]) & (document[:, None] == document[None])
    found, _ = split_attention(split, tensors)
    assert_close(found, dense(tensors, visible), BUDGETS[torch.float64], str(split))
