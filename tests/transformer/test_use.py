"""A model whose attention is another than ringspan's computes each rank's tokens alone: found before its loss or gradients are used."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import ringspan
from ringspan.errors import RingspanError
from tests.support.models import make_batch, tiny_llama, with_attention

LENGTH = 16


def asked(group: Any, attention: str, what: str) -> str:
    """What `loss` or `sum_gradients` says after a forward and backward of a model with that attention."""
    ringspan.transformers.register()
    context = ringspan.ContextParallel(group, kernel="reference")
    sequence = context.sequence(LENGTH)
    model = with_attention(tiny_llama(), attention)
    part = sequence.shard_batch(make_batch(1, LENGTH))
    labels = part["labels"]
    given = part if attention == "ringspan" else {name: tensor for name, tensor in part.items() if name != "ringspan_sequence"}
    given = {name: tensor for name, tensor in given.items() if "labels" not in name and name != "num_items_in_batch"}
    logits = model(**given).logits
    before = group.bytes_sent.total()
    try:
        if what == "loss":
            sequence.loss(logits, labels).backward()
        else:
            logits.sum().backward()
            context.sum_gradients(model)
    except RingspanError as error:
        assert group.bytes_sent.total() == before
        return str(error)
    return ""


@pytest.mark.parametrize("what", ["loss", "sum_gradients"])
def test_another_attention_is_found_on_every_rank(what: str):
    for said in ringspan.run_in_process(3, lambda group: asked(group, "sdpa", what), timeout_seconds=30.0):
        assert "a batch was cut by shard_batch, and no attention of this context has run" in said
        assert 'attn_implementation="ringspan"' in said
    assert ringspan.run_in_process(3, lambda group: asked(group, "ringspan", what), timeout_seconds=30.0) == [""] * 3
    # Alone it is the whole sequence's.
    assert ringspan.run_in_process(1, lambda group: asked(group, "sdpa", what)) == [""]


def test_ranks_with_other_weights_are_all_refused():
    def run(group: Any, how: str) -> str:
        model = tiny_llama()
        context = ringspan.ContextParallel(group, kernel="reference")
        if group.rank == 2:
            with torch.no_grad():
                model.lm_head.weight += 1e-3
        if how == "broadcast":
            context.broadcast_parameters(model)
        try:
            if how == "parallelize":
                ringspan.parallelize(model, group)
            else:
                context.sum_gradients(model)
        except RingspanError as error:
            return str(error)
        return ""

    for how in ("sum_gradients", "parallelize"):
        for said in ringspan.run_in_process(3, lambda group, how=how: run(group, how), timeout_seconds=30.0):
            assert f"{how} on 3 ranks: the weights of rank 2 are others than those of rank 0" in said
    assert ringspan.run_in_process(3, lambda group: run(group, "broadcast"), timeout_seconds=30.0) == [""] * 3


def test_a_loss_of_logits_that_no_model_of_hugging_face_made_is_nobodys_mistake():
    def run(group: Any) -> torch.Tensor:
        sequence = ringspan.ContextParallel(group).sequence(LENGTH)
        logits = torch.zeros(1, sequence.shard_length, 7)
        return sequence.loss(logits, torch.zeros(1, sequence.shard_length, dtype=torch.int64))

    found = ringspan.run_in_process(2, run)
    assert found[0] == found[1] == pytest.approx(torch.tensor(7.0).log())


def test_a_loop_with_a_loss_of_its_own_is_warned_once():
    def run(group: Any, attends: bool) -> list[str]:
        sequence = ringspan.ContextParallel(group, kernel="reference").sequence(LENGTH)
        batch = make_batch(1, LENGTH)
        if attends:
            x = torch.zeros(1, sequence.shard_length, 2, 4)
            sequence.attention(x, x, x)
        for _ in range(130):
            sequence.shard_batch(batch)
        return []

    for attends in (False, True):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            ringspan.run_in_process(2, lambda group, attends=attends: run(group, attends), timeout_seconds=60.0)
        assert [str(each.message).split(":")[0] for each in said] == [
            "64 batches were cut by shard_batch, and no attention of this context has run"
        ] * (0 if attends else 2)
