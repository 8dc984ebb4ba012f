"""What kernels read of scores on a device stays where it lies for as long as a captured graph may read it there."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import ringspan
from ringspan.attention import scoring
from ringspan.attention.scoring import Scoring, TileScores
from ringspan.geometry import Tile, make_layout
from tests.support.dense import make_tensors
from tests.support.device import Device, device

__all__ = ["device"]

CPU = torch.device("cpu")


def made(where: torch.device) -> TileScores:
    return TileScores(Scoring(scale=0.5), make_layout("contiguous", 12, 1), where)


def squares(*borders: int) -> tuple[Tile, ...]:
    """Causal documents."""
    ends = [0, *borders]
    return tuple(Tile(start, stop, start, stop, 0) for start, stop in zip(ends[:-1], borders, strict=True))


def ask(scores: TileScores, parts: tuple[Tile, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    return scores(0, 0, Tile(0, parts[-1].q_stop, 0, parts[-1].k_stop), parts).borders(CPU)


def test_borders_count_from_the_first_part_on():
    parts = (Tile(3, 5, 2, 6), Tile(5, 9, 6, 7))
    rows, keys = made(CPU)(0, 0, Tile(3, 9, 2, 7), parts).borders(CPU)
    assert rows.dtype == keys.dtype == torch.int32
    assert (rows.tolist(), keys.tolist()) == ([0, 2, 6], [0, 4, 5])


def test_borders_lie_where_they_lay_however_many_others_came_since():
    """A graph that was captured with them reads them there, and asks for them no more."""
    scores, parts = made(CPU), squares(4, 9, 12)
    before = [tensor.data_ptr() for tensor in ask(scores, parts)]
    others = [made(CPU) for _ in range(3000)]
    for number, other in enumerate(others):
        ask(other, squares(4, 9, 13 + number))
    assert [tensor.data_ptr() for tensor in ask(scores, parts)] == before
    assert [tensor.tolist() for tensor in ask(scores, parts)] == [[0, 4, 9, 12]] * 2


def test_borders_go_with_their_plan():
    scores = made(CPU)
    known = weakref.ref(ask(scores, squares(4, 12))[0])
    del scores
    gc.collect()
    assert known() is None, "a run over many documents keeps those of all its plans"


def test_what_somebody_elses_graph_reads_outlives_the_plan(device: Device, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scoring, "_CAPTURED", set())
    scores = made(torch.device("cuda"))
    known = weakref.ref(scores)
    scores.keep_if_captured()
    del scores
    gc.collect()
    assert (known() is not None) == device.capturing


def test_both_passes_of_a_plan_ask_whether_they_are_captured(monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr(TileScores, "keep_if_captured", lambda scores: asked.append(scores))
    tensors = make_tensors(12, heads=2, kv_heads=1, head_dim=8)
    q, k, v = (tensor.requires_grad_() for tensor in (tensors.q, tensors.k, tensors.v))
    sequence = ringspan.ContextParallel(None).sequence(12)
    out = sequence.attention(q, k, v)
    assert len(asked) == 1
    out.sum().backward()
    assert len(asked) == 2 and asked[0] is asked[1]
