"""Law 6: the loss and every parameter gradient of a model on N ranks equal those on one, whatever the mix of padding, packing and so on.

The yardstick is the same model, whole, with float64 weights and Hugging Face's eager attention. Data parallelism: see tests/distributed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import ringspan
from ringspan.attention import batch as batch_module
from ringspan.attention import context_parallel
from ringspan.attention import sequence as sequence_module
from tests.support.errors import relative
from tests.support.models import gradients, make_batch, tiny_llama, whole_loss, with_attention

BUDGET = 2e-6
"""The model's matrices are float64, but Hugging Face computes norms, rotations, eager softmax and its loss in float32 whatever the dtype:
a few dozen roundings of 6e-8, taken in another order on shards."""

LOSSES = {
    "seq.loss": lambda sequence, output, part: sequence.loss(output.logits, part["shift_labels"]),
    "the model's own": lambda sequence, output, part: output.loss,
}


def split_loss(
    model: Any, batches: list[dict[str, Tensor]], ranks: int, loss_of: str, mask: ringspan.Mask | None = None, **how: Any
) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """For each rank the loss, as `loss_of` has it, and the gradients after `sum_gradients`."""

    def run(group: Any) -> tuple[Tensor, dict[str, Tensor]]:
        context = ringspan.ContextParallel(group, **how)
        mine = with_attention(model, "ringspan")
        losses = []
        for batch in batches:
            sequence = context.sequence(batch["input_ids"].shape[1], mask)
            part = sequence.shard_batch(batch)
            loss = LOSSES[loss_of](sequence, mine(**part), part) / len(batches)
            loss.backward()
            losses.append(loss.detach())
        context.sum_gradients(mine)
        return torch.stack(losses).sum(), gradients(mine)

    return ringspan.run_in_process(ranks, run)


def check_model(model: Any, batches: list[dict[str, Tensor]], ranks: int, loss_of: str, **how: Any) -> None:
    """The law."""
    expected_loss, expected = whole_loss(model, *batches)
    found = split_loss(model, batches, ranks, loss_of, **how)
    losses = [float(loss) for loss, _ in found]
    for loss in [sum(losses)] if loss_of == "the model's own" else losses:
        assert abs(loss - float(expected_loss)) <= BUDGET * float(expected_loss), f"loss {loss}, whole {float(expected_loss)}"
    for rank, (_, ours) in enumerate(found):
        errors = {name: relative(ours[name], gradient) for name, gradient in expected.items()}
        worst = max(errors, key=lambda name: errors[name])
        assert errors[worst] <= BUDGET, f"rank {rank}: the gradient of {worst} is off by {errors[worst]:.1e}"


BATCHES: dict[str, Callable[[], list[dict[str, Tensor]]]] = {
    "one sequence of a prime length": lambda: [make_batch(1, 23)],
    "three sequences": lambda: [make_batch(3, 20)],
    "padding on the right": lambda: [make_batch(3, 19, padded=(0, 5, 11))],
    "two micro-batches of unlike lengths": lambda: [make_batch(2, 17, seed=1), make_batch(1, 24, seed=2, padded=(3,))],
    "as many tokens as ranks": lambda: [make_batch(2, 3)],
}


@pytest.mark.parametrize("loss_of", LOSSES)
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("batches", BATCHES)
def test_loss_and_gradients_on_many_ranks_are_those_of_the_whole_model(batches: str, ranks: int, loss_of: str):
    check_model(tiny_llama(), BATCHES[batches](), ranks, loss_of)


@pytest.mark.parametrize(
    "how",
    [{"layout": "contiguous"}, {"layout": "striped"}, {"layout": "weighted", "weights": (1.0, 0.5, 2.0)}]
    + [{"strategy": strategy} for strategy in ("all_gather", "pass_query", "balanced", "ulysses")],
    ids=str,
)
def test_layouts_and_strategies_make_no_difference_to_a_model(how: dict[str, Any]):
    check_model(tiny_llama(), [make_batch(2, 13)], 3, "seq.loss", **how)


def test_a_whole_micro_batch_without_labels_adds_nothing():
    batches = [make_batch(2, 11), make_batch(2, 11, seed=3)]
    batches[1]["labels"].fill_(-100)
    found = split_loss(tiny_llama(), batches, 2, "seq.loss")
    alone = split_loss(tiny_llama(), batches[:1], 2, "seq.loss")
    for (loss, ours), (single, expected) in zip(found, alone, strict=True):
        assert loss == single / 2
        assert all(relative(ours[name], expected[name] / 2) <= BUDGET for name in expected)


@pytest.mark.parametrize("ranks", [2, 3])
def test_documents_packed_into_one_sequence_have_the_loss_and_gradients_that_they_have_apart(ranks: int):
    lengths = (7, 1, 11, 4)
    documents = [make_batch(2, length, seed=length) for length in lengths]
    for document in documents:
        document["labels"][:, 0] = -100  # the first token of a document is nobody's next token
    packed = {key: torch.cat([document[key] for document in documents], 1) for key in ("input_ids", "labels")}
    packed["position_ids"] = torch.cat([torch.arange(length) for length in lengths]).expand(2, -1)
    borders = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    model = tiny_llama()
    apart = with_attention(model, "eager")
    counts = [int((document["labels"][:, 1:] != -100).sum()) for document in documents]
    expected = 0.0
    for document, count in zip(documents, counts, strict=True):
        if count:
            loss = apart(**document).loss * count / sum(counts)
            loss.backward()
            expected += float(loss.detach())
    for loss, ours in split_loss(model, [packed], ranks, "seq.loss", mask=ringspan.causal() & ringspan.documents(borders)):
        assert abs(float(loss) - expected) <= BUDGET * expected
        errors = {name: relative(ours[name], gradient) for name, gradient in gradients(apart).items()}
        assert max(errors.values()) <= BUDGET


def test_a_frozen_parameter_stays_without_a_gradient():
    model = tiny_llama()
    model.model.embed_tokens.requires_grad_(False)
    for _, ours in split_loss(model, [make_batch(1, 9)], 2, "seq.loss"):
        assert ours["model.embed_tokens.weight"] is None and ours["lm_head.weight"] is not None


def _labels_shifted_on_each_rank_alone(sequence: Any, batch: Any) -> dict[str, Tensor]:
    part = right_shard_batch(sequence, batch)
    part["shift_labels"] = part["labels"] = batch_module.shift_labels(sequence.shard(batch["labels"]))
    return part


right_shard_batch = sequence_module.shard_batch
BREAKAGES = {
    "gradients that are not summed": (context_parallel, "sum_gradients", lambda parameters, transport, observer: None),
    "labels that are not shifted across shards": (sequence_module, "shard_batch", _labels_shifted_on_each_rank_alone),
    "a mean over this rank's labels": (
        sequence_module,
        "mean_cross_entropy",
        lambda logits, labels, transport, ignore, observer: torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=ignore
        ),
    ),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_law_6_fails_with(breakage: str, monkeypatch: pytest.MonkeyPatch):
    target, name, wrong = BREAKAGES[breakage]
    monkeypatch.setattr(target, name, wrong)
    with pytest.raises(AssertionError, match=r"off by|loss"):
        check_model(tiny_llama(), [make_batch(2, 13)], 2, "seq.loss")
