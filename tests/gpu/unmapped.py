"""What test_cuda_unmapped runs, where segments are expandable: they are unmapped once the stream of their memory is done.

PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True python tests/gpu/unmapped.py [forget]     # forget: without letting go, which must fail
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ringspan.attention.streams import TwoStreams
from tests.gpu.test_cuda_streams import results

SIZE = 1 << 26


def read_late() -> None:
    """Memory of the side, read by a slow stream, is freed and unmapped."""
    streams = TwoStreams(torch.cuda.Stream())
    streams.fork(lambda: torch.cuda._sleep(1_000_000_000))
    made = streams.beside(lambda: torch.ones(SIZE, device="cuda"))
    streams.join()
    total = made.sum()
    streams.let_go()
    del made
    torch.cuda.empty_cache()
    assert float(total) == SIZE


@contextmanager
def unmapping() -> Iterator[None]:
    """All that is free is unmapped, again and again."""
    over = threading.Event()

    def unmap() -> None:
        while not over.is_set():
            torch.cuda.empty_cache()
            time.sleep(1e-4)

    thread = threading.Thread(target=unmap)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def main() -> None:
    """Both, and whole passes beside an empty_cache that never ends."""
    if sys.argv[1:] == ["forget"]:
        TwoStreams.let_go = lambda self: None
    read_late()
    print("memory that is read late is there", flush=True)
    for strategy in ("ring", "all_gather", "ulysses"):
        right = results("flash2", strategy)
        with unmapping():
            found = results("flash2", strategy)
        assert all(torch.equal(*pair) for ranks in zip(found, right, strict=True) for pair in zip(*ranks, strict=True)), strategy
        print(f"{strategy} has the same bits", flush=True)


if __name__ == "__main__":
    main()
