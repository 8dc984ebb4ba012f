"""Kernel calls beside each other on a GPU: the bits of calls in turn, whatever is allocated and freed around them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import ringspan
from ringspan.attention import plan
from ringspan.attention.streams import MOST_ROWS, OneStream, TwoStreams, streams_for
from ringspan.kernels import KERNELS, Problem
from ringspan.kernels import refusal as refusal_of
from ringspan.strategies import MACHINES
from ringspan.transformer import HostStore, Offload, decoder_layers, rematerialise
from ringspan.transformer.offload import CudaCopier
from ringspan.transport.shared_memory import SharedMemory
from tests.support.errors import relative
from tests.support.models import make_batch, tiny_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here: streams are a GPU's"),
]
SHARD, HEADS, KV_HEADS, HEAD_DIM = 8192, 16, 4, 128
ROUNDS = 6


def results(
    kernel: str, strategy: str, transport: str = "peer_memory", stream: Callable[[], torch.cuda.Stream] = torch.cuda.current_stream
) -> list[list[Tensor]]:
    """Of two ranks, out and gradients of several rounds, with memory of other sizes allocated, written and freed between them.

    Args:
        stream: makes a rank's current stream. The first rank's is slow.
    """
    torch.manual_seed(0)
    length = 2 * SHARD
    q, dout = torch.randn(2, 1, length, HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    # As many stages as a rank has key heads.
    kv_heads, stages = (2 * KV_HEADS, {"stages": KV_HEADS}) if strategy == "ulysses" else (KV_HEADS, {})
    k, v = torch.randn(2, 1, length, kv_heads, HEAD_DIM, device="cuda", dtype=torch.bfloat16)

    def run(group: Any) -> list[Tensor]:
        context = ringspan.ContextParallel(group, strategy=strategy, kernel=kernel, deterministic=True, transport=transport, **stages)
        sequence, found = context.sequence(length), []
        for index in range(ROUNDS):
            torch.cuda._sleep((1 - group.rank) * 20_000_000)
            leaves = [sequence.shard(x).detach().requires_grad_() for x in (q * (1 + index), k, v)]
            out = sequence.attention(*leaves)
            found += [out.detach().clone(), *torch.autograd.grad(out, leaves, sequence.shard(dout))]
            del out, leaves
            torch.full((SHARD * (1 + index), HEADS * HEAD_DIM), float("nan"), device="cuda", dtype=torch.bfloat16)
        return found

    def run_on_its_stream(group: Any) -> list[Tensor]:
        with torch.cuda.stream(stream()):
            return run(group)

    torch.cuda.synchronize()
    found = ringspan.run_in_process(2, run_on_its_stream, timeout_seconds=120.0)
    torch.cuda.synchronize()
    return found


@pytest.mark.parametrize("late", [None, 1e-30, math.inf], ids=["at once", "beside the last stage", "after it"])
@pytest.mark.parametrize("kernel", ["flash4", "flash2"])
@pytest.mark.parametrize("strategy", ["ring", "all_gather", "ulysses"])
def test_two_streams_give_the_bits_of_one(kernel: str, strategy: str, late: float | None, monkeypatch: pytest.MonkeyPatch):
    if late is not None and strategy != "ulysses":
        pytest.skip("there are no stages whose results could leave together")
    problem = Problem(device="cuda", dtype=torch.bfloat16, heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, deterministic=True)
    if (reason := refusal_of(KERNELS[kernel], problem)) is not None:
        pytest.skip(f"{kernel}: {reason}")
    assert isinstance(streams_for(torch.empty(1, SHARD, HEADS, HEAD_DIM, device="cuda"), KERNELS[kernel], True), TwoStreams)
    long = torch.empty(1, 1 + MOST_ROWS // HEADS, HEADS, 1, device="cuda")
    assert isinstance(streams_for(long, KERNELS[kernel], True), OneStream)
    assert isinstance(streams_for(long, KERNELS[kernel], True, math.inf), TwoStreams)
    monkeypatch.setattr(SharedMemory, "links_rest", late is not None)
    rests = replace(MACHINES["cuda"], rest_seconds=0.0, rest_saves=0.5, exchange_bytes_per_second=late)
    monkeypatch.setitem(MACHINES, "cuda", rests)
    found = results(kernel, strategy)
    monkeypatch.setattr(SharedMemory, "links_rest", False)
    monkeypatch.setattr(plan, "streams_for", lambda *given, **named: OneStream())
    for ours, right in zip(found, results(kernel, strategy), strict=True):
        assert all(map(torch.equal, ours, right))


@pytest.mark.parametrize("transport", ["process_group", "peer_memory"])
@pytest.mark.parametrize("strategy", ["ring", "ulysses"])
def test_ranks_that_are_threads_may_have_a_stream_each(strategy: str, transport: str):
    """What one sends is not there yet when another thread has it, nor read yet when that thread has done with it."""
    right = results("flash2", strategy, transport)
    for ours, those in zip(results("flash2", strategy, transport, torch.cuda.Stream), right, strict=True):
        assert all(map(torch.equal, ours, those))


def test_what_another_stream_still_reads_is_not_given_out_again():
    """A result in the side's memory is read by a slow stream and dropped, and calls run beside another stream."""
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    q = torch.randn(1, SHARD, HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()

    def beside(call: Callable[[], Tensor]) -> Tensor:
        streams = streams_for(q, KERNELS["flash2"], True)
        assert isinstance(streams, TwoStreams)
        streams.fork(lambda: None)
        found = streams.beside(call)
        streams.join()
        return found

    with torch.cuda.stream(first):
        result = beside(q.clone)
        torch.cuda._sleep(200_000_000)
        read = result.clone()
        del result
    with torch.cuda.stream(second):
        for _ in range(4):
            beside(lambda: torch.zeros_like(q))
    torch.cuda.synchronize()
    assert torch.equal(read, q)


class Slow(CudaCopier):
    """Copies that begin late: what they read lies there long after whoever made it has gone on."""

    def _copy(self, source: Tensor, target: Tensor) -> Any:
        with torch.cuda.stream(self._stream):
            torch.cuda._sleep(30_000_000)
        return super()._copy(source, target)


def of_a_model(device: torch.device, shard: int, kernel: str, make_store: Callable[[], HostStore] | None) -> list[list[Tensor]]:
    """Of two ranks, gradients of a model whose heads are computed in stages; every second layer keeps attention's results alone."""
    model = tiny_llama("ringspan", torch.bfloat16, hidden_size=512, num_attention_heads=16, num_key_value_heads=16, num_hidden_layers=8)

    def run(group: Any) -> list[Tensor]:
        mine = copy.deepcopy(model).to(device)
        rematerialise(decoder_layers(mine), "attention_output", make_store and make_store(), layers_per_checkpoint=2)
        sequence = ringspan.ContextParallel(
            group, strategy="ulysses", stages=2, kernel=kernel, deterministic=device.type == "cuda", transport="peer_memory"
        ).sequence(2 * shard)
        part = sequence.shard_batch({name: each.to(device) for name, each in make_batch(1, 2 * shard).items()})
        sequence.loss(mine(**part, use_cache=False).logits, part["shift_labels"]).backward()
        return [parameter.grad for parameter in mine.parameters() if parameter.grad is not None]

    return ringspan.run_in_process(2, run, timeout_seconds=120.0)


def test_memory_that_leaves_for_the_host_is_not_written_to_by_the_other_stream_of_heads_in_stages():
    device, offload = torch.device("cuda"), Offload(in_flight=1)
    assert isinstance(streams_for(torch.empty(1, SHARD, 16, 32, device="cuda"), KERNELS["flash2"], True, side=1), TwoStreams)
    right = of_a_model(device, SHARD, "flash2", None)
    found = of_a_model(device, SHARD, "flash2", lambda: HostStore(Slow(device), offload))
    # An embedding's gradient may be added up in another order.
    off = [relative(*pair) for rank in zip(found, right, strict=True) for pair in zip(*rank, strict=True)]
    wrong = [each for each in off if not each < 1e-2]
    assert not wrong, f"{len(wrong)} of {len(off)} gradients err: {wrong}"


def test_what_came_back_for_nothing_is_not_written_over_what_is_next_there():
    """A graph is dropped beside another stream than the one that its tensors are of."""
    mine, other = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(mine):
        store = HostStore(Slow(torch.device("cuda")), Offload(in_flight=1))
        parked = [store.put(torch.ones(1 << 20, device="cuda")) for _ in range(3)]
        for _ in range(2):
            parked.pop()()
        assert parked[0].here is not None
        where = parked[0].here.data_ptr()
    with torch.cuda.stream(other):
        parked.clear()
    with torch.cuda.stream(mine):
        there = [torch.zeros(1 << 20, device="cuda") for _ in range(8)]
    torch.cuda.synchronize()
    assert not any(bool(each.any()) for each in there), f"of {[each.data_ptr() for each in there]}, where {where} came back"


def test_a_kernel_that_keeps_tensors_on_the_device_has_one_stream():
    assert isinstance(streams_for(torch.empty(1, SHARD, HEADS, HEAD_DIM, device="cuda"), KERNELS["flex"], True), OneStream)
