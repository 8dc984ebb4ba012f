"""Parameters that are whole on every rank: sums, broadcasts, and a loss that is the whole's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ringspan
from ringspan.attention import gradients
from ringspan.errors import RingspanError, UnsupportedError


def test_gradients_are_summed_over_the_ranks_and_a_missing_one_counts_as_zero(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gradients, "BUCKET_BYTES", 60)  # several buckets, of one and of more parameters

    def run(group: Any) -> list[Any]:
        shapes = [(3,), (4, 2), (), (5, 5), (2,)]
        parameters = [
            nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16 if index == 3 else torch.float32)) for index, shape in enumerate(shapes)
        ]
        parameters[4].requires_grad_(False)
        for index, parameter in enumerate(parameters[:4]):
            if not (index == 0 and group.rank == 1) and index != 2:
                parameter.grad = torch.full_like(parameter, group.rank + 1.0 + index)
        ringspan.ContextParallel(group).sum_gradients(iter(parameters))
        return [None if parameter.grad is None else (parameter.grad.dtype, parameter.grad.unique().tolist()) for parameter in parameters]

    expected = [(torch.float32, [4.0]), (torch.float32, [9.0]), None, (torch.bfloat16, [15.0]), None]
    assert ringspan.run_in_process(3, run) == [expected] * 3


def test_half_precision_gradients_are_summed_in_float32():
    def run(group: Any) -> float:
        parameter = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
        parameter.grad = torch.tensor([256.0 if group.rank == 0 else 0.75], dtype=torch.bfloat16)
        ringspan.ContextParallel(group).sum_gradients([parameter])
        assert parameter.grad is not None
        return float(parameter.grad)

    # Summed one after the other in bfloat16, 256 swallows each 0.75.
    assert ringspan.run_in_process(5, run) == [float(torch.tensor(259.0, dtype=torch.bfloat16))] * 5


def test_every_rank_gets_the_parameters_and_buffers_of_rank_0():
    def run(group: Any) -> list[float]:
        model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.fill_(group.rank + 7)
            model[0].weight = nn.Parameter(model[0].weight.t())  # not contiguous
        ringspan.ContextParallel(group).broadcast_parameters(model)
        return sorted({float(value) for tensor in (*model.parameters(), *model.buffers()) for value in tensor.detach().flatten()})

    assert ringspan.run_in_process(3, run) == [[7.0]] * 3


@pytest.mark.parametrize("wrong", ["shape", "dtype", "name", "type"])
def test_models_that_are_others_are_not_broadcast_into_each_other(wrong: str):
    def run(group: Any) -> str:
        odd = group.rank == 1
        model: Any = nn.Linear(2, 2 + (odd and wrong == "shape")).to(torch.float64 if odd and wrong == "dtype" else torch.float32)
        model = nn.Sequential(model) if odd and wrong == "name" else model
        model = [model] if odd and wrong == "type" else model
        with pytest.raises(RingspanError) as caught:
            ringspan.ContextParallel(group).broadcast_parameters(model)
        return str(caught.value)

    expected = {"shape": "(3, 2)", "dtype": "float64", "name": "not there", "type": "of type list"}[wrong]
    assert all(expected in said for said in ringspan.run_in_process(3, run, timeout_seconds=10.0))


@pytest.mark.parametrize("ignored", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_the_loss_is_the_mean_over_all_labelled_positions_and_its_gradients_are_those_of_the_whole(ranks: int, ignored: float):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 13, 7, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 7, (2, 13), generator=generator)
    labels[torch.rand(2, 13, generator=generator) < ignored] = -100
    whole = logits.clone().requires_grad_()
    expected = F.cross_entropy(whole.flatten(0, 1), labels.flatten(), reduction="sum") / max(1, int((labels != -100).sum()))
    expected.backward()
    assert whole.grad is not None

    def run(group: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        sequence = ringspan.ContextParallel(group, layout="striped").sequence(13)
        mine = sequence.shard(logits).requires_grad_()
        loss = sequence.loss(mine, sequence.shard(labels))
        loss.backward()
        assert mine.grad is not None
        return loss.detach(), mine.grad, sequence.positions

    for loss, gradient, positions in ringspan.run_in_process(ranks, run):
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-14, atol=0.0)
        torch.testing.assert_close(gradient, whole.grad[:, positions], rtol=1e-13, atol=1e-16)


def test_another_index_to_ignore_is_ignored():
    sequence = ringspan.ContextParallel().sequence(4)
    logits, labels = torch.randn(1, 4, 5), torch.tensor([[0, 3, 3, 1]])
    torch.testing.assert_close(sequence.loss(logits, labels, ignore_index=3), F.cross_entropy(logits[0, [0, 3]], torch.tensor([0, 1])))


@pytest.mark.parametrize("through", ["ring", "ulysses", "ring_self_attention", "unshard"])
def test_a_gradient_of_a_gradient_is_refused_and_not_made_up(through: str):
    """What the other ranks sent has no graph here: a part of the second gradient would be missing."""

    def run(group: Any) -> None:
        strategy = "ring" if through == "unshard" else through
        sequence = ringspan.ContextParallel(group, strategy=strategy).sequence(12)
        x = torch.randn(1, sequence.shard_length, 2, 8, requires_grad=True)
        y = sequence.unshard(x) if through == "unshard" else sequence.attention(x, x, x)
        before = group.bytes_sent.total()
        # Of a sum the gradient comes as a constant: torch would say nothing of what the second one lacks.
        for loss in (y.pow(3).sum(), y.sum()):
            with pytest.raises(UnsupportedError, match="create_graph=True"):
                torch.autograd.grad(loss, x, create_graph=True, retain_graph=True)
        assert group.bytes_sent.total() == before, "refused before anything is sent"

    ringspan.run_in_process(2, run)


def test_after_an_evaluation_in_inference_mode_training_goes_on():
    """What is kept from the one is used in the other, and autograd saves no tensor that was made in inference mode."""

    def run(group: Any) -> None:
        seen: list[torch.Tensor] = []

        def evens(b: torch.Tensor, h: torch.Tensor, q_idx: torch.Tensor, kv_idx: torch.Tensor) -> torch.Tensor:
            seen.extend((q_idx, kv_idx))
            return (q_idx + kv_idx) % 2 == 0

        sequence = ringspan.ContextParallel(group).sequence(12, ringspan.causal() & ringspan.mask_mod(evens))
        tokens = torch.arange(12).unsqueeze(0)
        with torch.inference_mode():
            sequence.shard_batch({"input_ids": tokens})
            sequence.attention(*torch.randn(3, 1, sequence.shard_length, 2, 4).unbind())
            seen.clear()
        positions = sequence.shard_batch({"input_ids": tokens})["position_ids"]
        torch.nn.Embedding(12, 4)(positions).sum().backward()
        q, k, v = (torch.randn(1, sequence.shard_length, 2, 4, requires_grad=True) for _ in range(3))
        sequence.attention(q, k, v).sum().backward()
        assert seen and not any(each.is_inference() for each in seen)

    ringspan.run_in_process(2, run)


@pytest.mark.parametrize("stage", [None, 1])
def test_positions_for_a_mask_mod_are_made_once_and_found_again(stage: int | None):
    """FlexAttention's blocks are kept by where the positions lie: new ones at every call would be new blocks at every call."""
    seen: list[torch.Tensor] = []

    def evens(b: torch.Tensor, h: torch.Tensor, q_idx: torch.Tensor, kv_idx: torch.Tensor) -> torch.Tensor:
        seen.append(q_idx)  # and so keeps its memory from being used again
        return (q_idx + kv_idx) % 2 == 0

    sequence = ringspan.ContextParallel(kv_heads_per_stage=stage).sequence(12, ringspan.mask_mod(evens))
    q, k, v = torch.randn(3, 1, 12, 2, 4).unbind()
    sequence.attention(q, k, v)
    seen.clear()
    sequence.attention(q, k, v)
    first = {each.data_ptr() for each in seen}
    sequence.attention(q, k, v)
    assert first == {each.data_ptr() for each in seen}


@pytest.mark.parametrize("strategy", ["ring", "ulysses", "ring_self_attention"])
def test_autocast_rounds_nothing_of_attention(strategy: str):
    """The dtype is that of q, k and v: sums in float32 are not made of products in bfloat16, forward or backward."""

    def run(group: Any) -> None:
        context = ringspan.ContextParallel(group, strategy=strategy, kernel="reference")
        sequence, x = context.sequence(12), torch.randn(3, 1, 6, 2, 8)
        found = []
        for enabled in (False, True):
            q, k, v = (part.clone().requires_grad_() for part in x)
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                out, lse = sequence.attention(q, k, v, return_lse=True)
                torch.autograd.backward((out, lse), (torch.ones_like(out), torch.ones_like(lse)))
                found.append([out, lse, q.grad, k.grad, v.grad, *context.decode(*x)])
        assert all(map(torch.equal, *found))

    ringspan.run_in_process(2, run)
