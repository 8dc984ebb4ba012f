"""Acceptance: a real pretrained model split over ranks gives the logits and the loss that it has whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import ringspan
from tests.support import smollm2
from tests.support.errors import relative

LENGTH = 4096
BUDGET = 1e-5
"""Relative, in the Frobenius norm and for the loss. float32 resolves 6e-8; thirty layers pass rounding errors on and let them grow about
tenfold (5e-7 was measured for 2 and for 3 ranks), and a wrong position is off by 0.1 and more."""


def whole(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        output = model(input_ids=ids, labels=ids)
    return output.logits, output.loss


def off_by(found: Tensor, exact: Tensor) -> float:
    """‖found − exact‖ / ‖exact‖ without a float64 copy of two hundred million logits; NaN where one is found."""
    return float(torch.linalg.vector_norm(found - exact) / torch.linalg.vector_norm(exact))


def split(model: Any, ids: Tensor, ranks: int, **how: Any) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """For each rank its positions, its logits, the whole's loss as `seq.loss` has it, and its share of it as the model has it."""

    def run(group: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        sequence = ringspan.ContextParallel(group, **how).sequence(ids.shape[1])
        part = sequence.shard_batch({"input_ids": ids, "labels": ids})
        with torch.no_grad():
            output = model(**part)
        return sequence.positions, output.logits, sequence.loss(output.logits, part["shift_labels"]), output.loss

    return ringspan.run_in_process(ranks, run)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_smollm2_over_2_and_3_ranks_gives_the_logits_and_the_loss_that_it_has_whole_on_4096_tokens_of_real_text():
    model, tokenizer = smollm2.load("sdpa")
    ringspan.transformers.register()
    ids = tokenizer(smollm2.real_text(), return_tensors="pt").input_ids[:, :LENGTH]
    assert ids.shape == (1, LENGTH)
    logits, loss = whole(model, ids)
    assert 0.5 < float(loss) < 4.0, "the model knows such text: nobody's would be near ln 49152 = 10.8"
    model.set_attn_implementation("ringspan")
    for ranks in (2, 3):
        parts = split(model, ids, ranks)
        assert sum(len(positions) for positions, *_ in parts) == LENGTH
        for rank, (positions, ours, loss_of_all, _) in enumerate(parts):
            error = off_by(ours, logits[:, positions])
            assert error <= BUDGET, f"logits of rank {rank} of {ranks} are off by {error:.1e}"
            assert relative(loss_of_all, loss) <= BUDGET
        assert relative(torch.stack([share for *_, share in parts]).sum(), loss) <= BUDGET

    # The test can fail: with positions counted from each shard's own start (1, since 0 is refused) the logits are others altogether.
    few = ids[:, :64]
    model.set_attn_implementation("sdpa")
    logits, _ = whole(model, few)
    model.set_attn_implementation("ringspan")

    def from_the_shards_own_start(group: Any) -> Tensor:
        sequence = ringspan.ContextParallel(group, layout="contiguous").sequence(64)
        part = {**sequence.shard_batch({"input_ids": few}), "position_ids": torch.arange(1, 33).unsqueeze(0)}
        with torch.no_grad():
            return model(**part).logits

    assert relative(ringspan.run_in_process(2, from_the_shards_own_start)[1], logits[:, 32:]) > 1000 * BUDGET
