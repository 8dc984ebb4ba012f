"""Angles that depend on the longest position are the whole sequence's on every rank, whatever came before."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import ringspan
from ringspan.transformer import prepare_rotary
from tests.support.errors import relative
from tests.support.models import make_batch, tiny_llama

OWN = 16
ROPE: dict[str, dict[str, Any]] = {
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e2, "factor": 3.0},
    "longrope": {
        "rope_type": "longrope", "rope_theta": 1e2, "factor": 4.0, "original_max_position_embeddings": OWN,
        "short_factor": [1.0, 1.5], "long_factor": [2.0, 5.0],
    },
}  # fmt: skip
LENGTHS = (47, 31, 11, 23, 10)
"""Longer and shorter than before, and shorter than the model's own: transformers remembers the first until the third."""


def model_of(kind: str, attention: str = "ringspan") -> Any:
    return tiny_llama(attention, max_position_embeddings=OWN, rope_parameters=ROPE[kind])


def whole(model: Any, length: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of a forward of the unsplit model."""
    loss = model(**make_batch(2, length, seed=length)).loss
    model.zero_grad()
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_a_forward_after_others_is_a_new_models_first_on_any_number_of_ranks():
    # In one start, all that transformers' memory could spoil.
    def run(group: Any) -> None:
        for kind, model in models.items():
            # Copied after it has been prepared: what is prepared goes with the copy.
            mine = copy.deepcopy(model)
            cp = ringspan.ContextParallel(group, layout="contiguous")
            for length in LENGTHS:
                sequence = cp.sequence(length)
                batch = sequence.shard_batch(make_batch(2, length, seed=length))
                inputs = {name: batch[name] for name in ("input_ids", "position_ids", "ringspan_sequence")}
                loss = sequence.loss(mine(**inputs, use_cache=False).logits, batch["labels"])
                mine.zero_grad()
                loss.backward()
                cp.sum_gradients(mine)
                expected, gradients = news[kind, length]
                assert relative(loss.detach(), expected) < 1e-6, (kind, length)
                for name, parameter in mine.named_parameters():
                    assert relative(parameter.grad, gradients[name]) < 1e-5, (kind, length, name)

    models = {kind: model_of(kind) for kind in ROPE}
    for model in models.values():
        prepare_rotary(model)
        prepare_rotary(model)
    news = {(kind, length): whole(model_of(kind, "eager"), length) for kind in ROPE for length in LENGTHS}
    for ranks in (1, 3):
        ringspan.run_in_process(ranks, run)


def test_transformers_own_dynamic_model_remembers_and_so_would_a_rank():
    # What the law above would miss if lengths did not matter.
    eager = model_of("dynamic", "eager")
    whole(eager, LENGTHS[0])
    remembered, new = whole(eager, LENGTHS[1])[0], whole(model_of("dynamic", "eager"), LENGTHS[1])[0]
    plain = whole(tiny_llama(max_position_embeddings=OWN, rope_parameters={"rope_type": "default", "rope_theta": 1e2}), LENGTHS[1])[0]
    assert abs(remembered - new) > 1e-4 and abs(plain - new) > 1e-4


@pytest.mark.parametrize("kind", ROPE)
def test_parallelize_prepares_it(kind: str):
    batch = make_batch(2, 29, seed=3)
    expected = model_of(kind, "eager")(**batch).loss.detach()

    def run(group: Any) -> Tensor:
        parallel = ringspan.parallelize(model_of(kind), group)
        return parallel.loss(parallel.shard_batch(batch)).detach()

    for loss in ringspan.run_in_process(2, run):
        assert relative(loss, expected) < 1e-6


def test_packed_documents_are_measured_by_the_longest_of_them():
    borders = [0, 25, 30, 41]
    positions = torch.cat([torch.arange(stop - start) for start, stop in pairwise(borders)])[None]
    batch = {**make_batch(1, 41, seed=4), "position_ids": positions}
    batch["labels"][:, borders[:-1]] = -100
    parts = [whole_logits({key: batch[key][:, start:stop] for key in batch}) for start, stop in pairwise(borders)]

    def run(group: Any) -> Tensor:
        cp = ringspan.ContextParallel(group)
        sequence = cp.sequence(41, ringspan.causal() & ringspan.documents(borders))
        model = model_of("dynamic")
        prepare_rotary(model)
        part = sequence.shard_batch(batch)
        logits = model(**{name: part[name] for name in ("input_ids", "position_ids", "ringspan_sequence")}, use_cache=False).logits
        return sequence.unshard(logits.detach())

    for logits in ringspan.run_in_process(2, run):
        assert relative(logits, torch.cat(parts, 1)) < 1e-6


def whole_logits(batch: dict[str, Tensor]) -> Tensor:
    """Of a document, by a model whose angles are those of a document of 25 tokens."""
    model = model_of("dynamic", "eager")
    model(input_ids=torch.zeros(1, 25, dtype=torch.int64))
    # Below the model's own length transformers would forget it.
    rotary = model.model.rotary_emb
    rotary.original_max_seq_len = 0
    return model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits.detach()


def test_a_model_without_such_angles_is_left_as_it_is():
    model = tiny_llama("ringspan")
    before = model.model.rotary_emb.forward
    prepare_rotary(model)
    assert model.model.rotary_emb.forward == before
    assert not model.model._forward_pre_hooks


def test_a_forward_without_a_sequence_is_transformers_own():
    ids = torch.arange(40)[None]
    model = model_of("dynamic", "eager")
    expected = model(input_ids=ids).logits
    other = model_of("dynamic", "eager")
    prepare_rotary(other)
    assert torch.equal(other(input_ids=ids).logits, expected)
