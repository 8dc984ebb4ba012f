"""CUDA graphs: work captured once and replayed, so that what is timed is the device and not the launches from Python."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Results = tuple[Tensor, ...]
WARMUP = 3
"""Calls on a side stream before the capture, as torch asks for: libraries then have their workspaces, and plans are made."""


@dataclass(frozen=True)
class _Replay:
    """A captured graph. It knows addresses alone: `work`, which holds the tensors that lie there, is kept for that."""

    graph: torch.cuda.CUDAGraph
    results: Results
    work: Callable[[], Results]

    def __call__(self) -> Results:
        self.graph.replay()
        return self.results


def captured(work: Callable[[], Results]) -> Callable[[], Results]:
    """`work` as a replay of its CUDA graph, which writes into the same results each time. What it reads lives as long as the replay.

    The backward runs on the calling thread while it is captured: torch's own threads would capture nothing. Only what this thread calls is
    checked for what a capture forbids, since NCCL's watchdog asks for events all the time.

    Raises:
        RuntimeError: where the work waits for the device, or does something else that cannot be captured.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.autograd.set_multithreading_enabled(False):
        with torch.cuda.stream(side):
            for _ in range(WARMUP):
                work()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            results = work()

    return _Replay(graph, results, work)
