"""A process group ends where the user ends it: nothing here holds it, its lanes or their threads any longer."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ringspan
from ringspan.errors import RingspanError
from ringspan.transport import make_transport


@pytest.fixture
def threads_without() -> Iterator[int]:
    """This process as the one rank of a default group over gloo, and how many threads of gloo it had before that."""
    before = gloo_threads()
    join()
    yield before
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def uncollected() -> Iterator[None]:
    """What is held in a circle stays."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def join() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def gloo_threads() -> int:
    """Of this process, as Linux names them."""
    names = (Path(f"{thread}/comm").read_text().strip() for thread in Path("/proc/self/task").iterdir())
    return sum(name in ("pt_gloo_runloop", "gloo_tcp_loop") for name in names)


def use(context: ringspan.ContextParallel) -> torch.Tensor:
    """All ways in which ranks communicate, and what is kept of each."""
    q, k, v = (torch.randn(1, 13, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    sequence = context.sequence(13)
    out = sequence.unshard(sequence.attention(q, k, v)) + ringspan.attention(q, k, v, causal=True)
    out.sum().backward()
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    context.sum_gradients([weight])
    context.broadcast_parameters(nn.Linear(2, 2))
    return out


def test_threads_of_a_destroyed_group_end_while_a_context_lives(threads_without: int, uncollected: None):
    joined = gloo_threads()
    context = ringspan.ContextParallel()
    out = use(context)
    assert gloo_threads() > joined > threads_without, "a lane has threads of its own"
    dist.destroy_process_group()
    # One that lets go of a tensor only while Python ends aborts the process.
    assert gloo_threads() == threads_without
    assert out.isfinite().all()
    with pytest.raises(RingspanError, match=r"group has been destroyed.*another ContextParallel"):
        context.sequence(14)


def test_a_group_has_one_transport_as_long_as_it_lives(threads_without: int):
    first = ringspan.ContextParallel()
    assert make_transport(None) is ringspan.ContextParallel().transport is first.transport
    dist.destroy_process_group()
    join()
    second = ringspan.ContextParallel()
    assert second.transport is not first.transport
    assert use(second).shape == (1, 13, 4, 8)
