"""What a captured graph reads lives as long as its replay: a graph knows addresses alone."""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from ringspan.bench.graph import WARMUP, captured


class Stream:
    """Stands for a stream."""

    def wait_stream(self, other: Any) -> None:
        pass


class Graph:
    """Stands for a CUDA graph, which there is none of on a CPU: counts its replays."""

    replays = 0

    def replay(self) -> None:
        Graph.replays += 1


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Graph, "replays", 0)
    for name, value in {
        "Stream": Stream, "current_stream": Stream, "stream": nullcontext, "synchronize": lambda: None,
        "CUDAGraph": Graph, "graph": lambda graph, **options: nullcontext(),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)


def test_what_only_the_work_knew_is_there_at_every_replay():
    calls = []

    def make() -> tuple[Any, weakref.ref[torch.Tensor]]:
        borders = torch.tensor([0, 4, 9])

        def work() -> tuple[torch.Tensor]:
            calls.append(None)
            return (2 * borders,)

        return captured(work), weakref.ref(borders)

    replay, known = make()
    gc.collect()
    assert known() is not None, "its memory would be given to whoever asks next, and the graph read that"
    assert len(calls) == WARMUP + 1
    (first,), (second,) = replay(), replay()
    assert Graph.replays == 2 and len(calls) == WARMUP + 1
    assert first is second and first.tolist() == [0, 8, 18]
    del replay, first, second
    gc.collect()
    assert known() is None
