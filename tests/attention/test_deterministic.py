"""`deterministic=True`: the same bits at every run, or refused on every rank with the reason."""

from __future__ import annotations

import random
import time

import pytest
import torch
from torch import Tensor

import ringspan
from ringspan.errors import RingspanError, UnsupportedError
from ringspan.geometry import Mask, documents
from ringspan.kernels import KERNELS, Capabilities, Problem, select_kernel
from ringspan.kernels.reference import Reference
from ringspan.kernels.torch_kernels import torchs_deterministic_mode
from ringspan.strategies import STRATEGIES
from ringspan.transport import InProcessTransport

LENGTH = 307
MASK = ringspan.causal() & documents([0, 100, 307])


def run(strategy: str, kernel: str, mask: Mask, seed: int, dtype: torch.dtype) -> list[list[Tensor]]:
    """Every rank's out, lse and gradients; ranks begin apart, by another few milliseconds with each seed."""
    generator = torch.Generator().manual_seed(0)
    q, dout = (torch.randn(2, LENGTH, 6, 16, generator=generator).to(dtype) for _ in range(2))
    k, v = (torch.randn(2, LENGTH, 3, 16, generator=generator).to(dtype) for _ in range(2))
    late = random.Random(seed)
    pauses = [late.random() * 0.02 for _ in range(8)]

    def rank(group: InProcessTransport) -> list[Tensor]:
        context = ringspan.ContextParallel(group, strategy=strategy, kernel=kernel, deterministic=True)
        sequence = context.sequence(LENGTH, mask)
        leaves = [sequence.shard(x).requires_grad_() for x in (q, k, v)]
        time.sleep(pauses[group.rank])
        out, lse = sequence.attention(*leaves, return_lse=True)
        time.sleep(pauses[4 + group.rank])
        return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, sequence.shard(dout))]

    return ringspan.run_in_process(4, rank)


@pytest.mark.parametrize("kernel", ["torch_cpu", "reference"])
@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "ring_self_attention"])
def test_gradients_are_the_same_bits_at_every_run(strategy: str, kernel: str):
    runs = [run(strategy, kernel, MASK, seed, torch.bfloat16 if kernel == "torch_cpu" else torch.float32) for seed in range(3)]
    for again in runs[1:]:
        for found, first in zip(again, runs[0], strict=True):
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, first, strict=True))


def test_so_are_those_of_ring_self_attention():
    first, again = (run("ring_self_attention", "auto", MASK, seed, torch.float32) for seed in range(2))
    for found, wanted in zip(again, first, strict=True):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))


class Unsteady(Reference):
    """The reference, without the promise."""

    name = "unsteady"
    can = Capabilities(shapes=frozenset({"band"}), features=Reference.can.features, lse_gradient=True, determinism="never")


@pytest.fixture
def unsteady(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KERNELS, "unsteady", Unsteady())


@pytest.mark.usefixtures("unsteady")
def test_a_kernel_that_promises_nothing_is_refused_on_every_rank_with_the_reason():
    said = ringspan.run_in_process(2, _refused)
    for message in said:
        assert "kernel 'unsteady': its backward does not promise the same bits at every run" in message
        assert "kernel='torch_cpu'" in message


def _refused(group: InProcessTransport) -> str:
    x = torch.zeros(1, 8, 2, 8)
    ringspan.ContextParallel(group, kernel="unsteady").sequence(16).attention(x, x, x)
    before = group.bytes_sent.total()
    sequence = ringspan.ContextParallel(group, kernel="unsteady", deterministic=True).sequence(16)
    with pytest.raises(UnsupportedError) as caught:
        sequence.attention(x, x, x)
    assert before and group.bytes_sent.total() == before, "refused before anything is sent"
    return str(caught.value)


@pytest.mark.usefixtures("unsteady")
def test_the_functions_keep_or_refuse_it_too():
    x, packed = torch.zeros(1, 8, 2, 8), torch.zeros(8, 2, 8)
    calls = (
        lambda **more: ringspan.attention(x, x, x, **more),
        lambda **more: ringspan.attention_varlen(packed, packed, packed, [0, 8], [0, 8], **more),
    )
    for call in calls:
        call(kernel="unsteady", deterministic=False)
        call(kernel="torch_cpu", deterministic=True)
        with pytest.raises(UnsupportedError, match="does not promise the same bits"):
            call(kernel="unsteady", deterministic=True)


def test_auto_passes_over_a_kernel_that_promises_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ringspan.kernels.KERNELS", {"unsteady": Unsteady(), **KERNELS})
    problem = {"device": "cpu", "dtype": torch.float32, "heads": 2, "kv_heads": 2, "head_dim": 8}
    assert select_kernel("auto", Problem(**problem)).name == "unsteady"
    assert select_kernel("auto", Problem(**problem, deterministic=True)).name == "torch_cpu"


def test_ranks_that_disagree_about_it_are_told():
    def rank(group: InProcessTransport) -> str:
        with pytest.raises(RingspanError) as caught:
            ringspan.ContextParallel(group, deterministic=group.rank == 0)
        return str(caught.value)

    assert all("deterministic=True" in said and "deterministic=False" in said for said in ringspan.run_in_process(2, rank))


def test_anything_but_yes_or_no_is_refused():
    with pytest.raises(RingspanError, match="deterministic='yes'"):
        ringspan.ContextParallel(deterministic="yes")  # type: ignore[arg-type]


@pytest.mark.parametrize("before", [(False, False), (True, True), (True, False)])
def test_torchs_mode_is_afterwards_what_it_was(before: tuple[bool, bool]):
    here = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        with pytest.raises(KeyError), torchs_deterministic_mode():
            assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
            raise KeyError
        assert (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()) == before
    finally:
        torch.use_deterministic_algorithms(here[0], warn_only=here[1])
