"""Training on packed documents and under a sliding window: over 3 ranks the losses and gradients of every step are those of 1 rank.

A tiny Llama with float64 weights, trained with AdamW on another packing at every step; and the trainer of `ringspan train` itself. The
yardstick beside one rank is Hugging Face's own eager attention under a dense mask, with which ringspan has nothing to do.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ringspan
from tests.support.errors import relative
from tests.support.models import VOCABULARY, gradients, tiny_llama, with_attention
from tests.training.support import write_text
from tests.training.trainers import take_steps

LENGTH, STEPS, RANKS, WINDOW = 47, 5, 3, 9
BETWEEN_RANKS = 1e-12
"""Measured: 9e-16 over five steps. What is computed in float32, norms and rotations, is computed of the same numbers on every rank."""

BESIDE_EAGER = 3e-6
"""Hugging Face's eager softmax is float32 whatever the weights; measured: 8e-7."""

IN_FLOAT32 = (3e-6, 2e-4)
"""Of the trainer's first step and of later ones: its weights and all its sums are float32, and AdamW divides gradients by their size, the
smallest too. Measured: 7e-7 and 4e-5."""


@dataclass(frozen=True)
class Batch:
    """One step: tokens with labels, their positions, and what they see."""

    inputs: dict[str, Tensor]
    mask: ringspan.Mask
    allowed: Tensor


def packed(step: int) -> Batch:
    """Documents of other lengths at every step; positions begin again in each, and a document's first token is nobody's next."""
    draw = random.Random(step)
    cuts = sorted(draw.sample(range(1, LENGTH), 4 + step % 3))
    lengths = [stop - start for start, stop in pairwise([0, *cuts, LENGTH])]
    borders = [0, *accumulate(lengths)]
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    inputs = _tokens(step)
    inputs["labels"][:, borders[:-1]] = -100
    inputs["position_ids"] = torch.cat([torch.arange(length) for length in lengths]).expand(2, -1)
    allowed = _causal() & (document[:, None] == document[None, :])
    return Batch(inputs, ringspan.causal() & ringspan.documents(borders), allowed)


def windowed(step: int) -> Batch:
    """Every token sees the nine before it and itself."""
    positions = torch.arange(LENGTH)
    inputs = {**_tokens(step), "position_ids": positions.expand(2, -1)}
    return Batch(inputs, ringspan.sliding_window(WINDOW), _causal() & (positions[:, None] - positions[None, :] <= WINDOW))


def windowed_documents(step: int) -> Batch:
    """Both."""
    one, other = packed(step), windowed(step)
    return Batch(one.inputs, one.mask & other.mask, one.allowed & other.allowed)


def _tokens(step: int) -> dict[str, Tensor]:
    ids = torch.randint(0, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(step))
    return {"input_ids": ids, "labels": ids.clone()}


def _causal() -> Tensor:
    return torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()


Step = tuple[float, dict[str, Tensor]]
"""The loss, and the gradients after they were summed."""


def _optimizer(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1)


def _snapshot(model: Any) -> dict[str, Tensor]:
    return {name: gradient.clone() for name, gradient in gradients(model).items()}


def run_eager(batches: Callable[[int], Batch]) -> list[Step]:
    """The whole model with Hugging Face's eager attention under the dense mask."""
    model = with_attention(tiny_llama(), "eager")
    optimizer, steps = _optimizer(model), []
    for step in range(STEPS):
        batch = batches(step)
        bias = torch.zeros(LENGTH, LENGTH, dtype=torch.float64).masked_fill(~batch.allowed, float("-inf"))
        loss = model(**batch.inputs, attention_mask=bias.expand(2, 1, -1, -1)).loss
        loss.backward()
        steps.append((float(loss.detach()), _snapshot(model)))
        optimizer.step()
        optimizer.zero_grad()
    return steps


def run_ranks(batches: Callable[[int], Batch], ranks: int, **how: Any) -> list[list[Step]]:
    """The same run split over `ranks`; what each rank saw."""
    whole = tiny_llama()

    def run(group: Any) -> list[Step]:
        context = ringspan.ContextParallel(group, **how)
        model = with_attention(whole, "ringspan")
        optimizer, steps = _optimizer(model), []
        for step in range(STEPS):
            batch = batches(step)
            sequence = context.sequence(LENGTH, batch.mask)
            part = sequence.shard_batch(batch.inputs)
            labels = part.pop("shift_labels")
            del part["labels"], part["num_items_in_batch"]
            loss = sequence.loss(model(**part).logits, labels)
            loss.backward()
            context.sum_gradients(model)
            steps.append((float(loss.detach()), _snapshot(model)))
            optimizer.step()
            optimizer.zero_grad()
        return steps

    return ringspan.run_in_process(ranks, run)


def assert_same_run(found: list[Step], expected: list[Step], budget: float, what: str) -> None:
    """Losses and every gradient of every step."""
    for number, ((loss, ours), (wanted, theirs)) in enumerate(zip(found, expected, strict=True), start=1):
        assert abs(loss - wanted) <= budget * wanted, f"{what}, step {number}: loss {loss} beside {wanted}"
        errors = {name: relative(ours[name], theirs[name]) for name in theirs}
        worst = max(errors, key=lambda name: errors[name])
        assert errors[worst] <= budget, f"{what}, step {number}: the gradient of {worst} is off by {errors[worst]:.1e}"


RUNS: dict[str, tuple[Callable[[int], Batch], dict[str, Any]]] = {
    "packed documents": (packed, {"layout": "auto", "strategy": "direct"}),
    "a sliding window": (windowed, {"layout": "contiguous", "strategy": "balanced"}),
    "a window within documents": (windowed_documents, {"layout": "striped", "strategy": "ulysses"}),
}
"""The batches, and a way to split them besides the usual one."""


@pytest.mark.parametrize("name", RUNS)
def test_a_run_over_three_ranks_is_that_of_one_rank_and_of_the_whole_model(name: str):
    batches, other = RUNS[name]
    (alone,) = run_ranks(batches, 1)
    assert_same_run(alone, run_eager(batches), BESIDE_EAGER, f"{name}, 1 rank beside Hugging Face")
    assert alone[-1][0] != alone[0][0]
    for how in ({}, other):
        for rank, steps in enumerate(run_ranks(batches, RANKS, **how)):
            assert_same_run(steps, alone, BETWEEN_RANKS, f"{name}, {how}, rank {rank}")


def test_the_comparison_fails_where_a_run_sees_across_documents():
    def without_borders(step: int) -> Batch:
        batch = packed(step)
        del batch.inputs["position_ids"]
        return Batch({**batch.inputs}, ringspan.causal(), batch.allowed)

    with pytest.raises(AssertionError, match="step 1"):
        assert_same_run(run_ranks(without_borders, RANKS)[0], run_eager(packed), BESIDE_EAGER, "causal beside packed")


# ---- the trainer of `ringspan train` ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["window:9", "causal&documents:20,5,1,35", "window:5&documents:40,21"])
def test_the_trainer_takes_the_same_steps_on_three_ranks_as_on_one(mask: str, tmp_path: Path):
    text = write_text(tmp_path / "text.txt", num_words=2000)

    def steps(ranks: int) -> list[list[Step]]:
        found = take_steps(tmp_path / f"{ranks}", ranks, data=str(text), mask=mask, steps=STEPS)
        return [[(taken.record.loss or 0.0, taken.gradients) for taken in steps] for steps, _ in found]

    (alone,) = steps(1)
    for rank, taken in enumerate(steps(RANKS)):
        for budget, steps_taken in zip(IN_FLOAT32, (slice(1), slice(1, None)), strict=True):
            assert_same_run(taken[steps_taken], alone[steps_taken], budget, f"{mask}, rank {rank}, {steps_taken}")
