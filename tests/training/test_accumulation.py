"""Law 6 for a step in several passes: it is the step of one large batch, weighted by tokens, on any number of ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ringspan.attention.loss import IGNORE_INDEX
from ringspan.geometry import causal, documents
from ringspan.training import optimizer as optimizer_room
from ringspan.training.batches import cut_into_passes, deal, document_borders_of
from ringspan.training.model import build_model
from ringspan.training.optimizer import Optimizer
from ringspan.training.trainer import Trainer
from ringspan.transformer import ParallelModel
from ringspan.transformer.parallel_model import TOTAL_KEYWORD
from tests.training.support import write_text
from tests.training.trainers import assert_same_steps, take_steps

BUDGETS = (3e-6, 2e-4)
"""Of the first step and of later ones, as in test_masked_runs: float32 weights and sums, and AdamW divides by the gradients' size."""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt", num_words=2000)


@pytest.fixture(scope="module")
def folder_of_texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of 3 to 60 bytes, so that contexts of 61 hold one document or many."""
    folder = tmp_path_factory.mktemp("texts")
    words = write_text(folder / ".words", num_words=2000).read_text()
    start = 0
    for number in range(160):
        length = 3 + (number * 37) % 58
        (folder / f"{number:03d}.txt").write_text(words[start : start + length])
        start += length
    return folder


def test_passes_make_the_step_of_one_large_batch_on_one_and_on_three_ranks(text: Path, tmp_path: Path):
    whole, _ = take_steps(tmp_path / "whole", 1, data=str(text), batch_size=6)[0]
    for ranks, batch_size, accumulate in ((1, 2, 3), (3, 2, 3), (3, 1, 6)):
        for rank, (steps, _) in enumerate(
            take_steps(tmp_path / f"{ranks}-{accumulate}", ranks, data=str(text), batch_size=batch_size, accumulate=accumulate)
        ):
            assert_same_steps(steps, whole, BUDGETS, f"{accumulate} passes of {batch_size} on {ranks} ranks, rank {rank}")


def test_packed_documents_in_passes_are_weighted_by_their_labels(folder_of_texts: Path, tmp_path: Path):
    given = {"data": str(folder_of_texts), "documents": "packed"}
    whole, trainer = take_steps(tmp_path / "whole", 1, batch_size=6, **given)[0]
    (passes,) = trainer._deal(trainer.windows.starts(1), batch_size=1)
    counts = {int((each.labels[:, 1:] != IGNORE_INDEX).sum()) for each in passes}
    assert len(counts) > 1, "passes of equal weight would not tell the mean of means from the mean"
    for rank, (steps, _) in enumerate(take_steps(tmp_path / "split", 3, batch_size=2, accumulate=3, **given)):
        assert_same_steps(steps, whole, BUDGETS, f"packed, rank {rank} of 3")


def test_the_mean_of_the_passes_means_would_be_noticed(folder_of_texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    given = {"data": str(folder_of_texts), "documents": "packed", "batch_size": 6}
    right, _ = take_steps(tmp_path / "right", 1, **given)[0]
    count = ParallelModel.shard_batches

    def evenly(self, batches, masks):
        parts = count(self, batches, masks)
        return [{**part, TOTAL_KEYWORD: int(part["num_items_in_batch"]) * len(parts)} for part in parts]

    monkeypatch.setattr(ParallelModel, "shard_batches", evenly)
    wrong, _ = take_steps(tmp_path / "wrong", 1, **given)[0]
    with pytest.raises(AssertionError, match="step 1"):
        assert_same_steps(wrong, right, BUDGETS, "evenly weighted")


def test_gradients_of_bfloat16_passes_are_summed_in_float32(text: Path, tmp_path: Path):
    taken, trainer = take_steps(tmp_path / "run", 1, data=str(text), batch_size=1, accumulate=4, dtype="bfloat16", steps=1)[0]
    assert {gradient.dtype for gradient in taken[0].gradients.values()} == {torch.float32}
    summed = taken[0].gradients["lm_head.weight"]
    assert not torch.equal(summed, summed.bfloat16().float()), "four sums in bfloat16 would be bfloat16 numbers"
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.bfloat16}


def test_masters_begin_with_the_first_weights_and_not_with_what_bfloat16_leaves_of_them(text: Path, tmp_path: Path):
    """As they do where parameters are sharded: else what is trained would be another model, by as much as many steps move it."""

    def keep(trainer: Trainer, taken: int) -> None:
        first.update({name: master.detach().clone() for name, master in trainer.optimizer.masters.items()})

    first: dict[str, torch.Tensor] = {}
    _, trainer = take_steps(tmp_path / "run", 1, data=str(text), dtype="bfloat16", steps=1, before=keep)[0]
    expected = dict(build_model("pico", vocabulary_size=256, context=61, seed=trainer.config.seed).named_parameters())
    assert not torch.equal(expected["lm_head.weight"], expected["lm_head.weight"].bfloat16().float())
    assert first.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(first[name], weight), name


def test_a_row_is_cut_into_its_documents():
    row = torch.tensor([5, 6, 0, 7, 0, 0, 8, 9])
    assert document_borders_of(row, 0) == [0, 3, 5, 6, 8]
    (part,) = cut_into_passes(row.unsqueeze(0), batch_size=4, mask=causal(), separator=0)
    assert part.position_ids is not None
    assert part.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 0, 1]]
    assert part.labels.tolist() == [[5, 6, 0, IGNORE_INDEX, 0, IGNORE_INDEX, IGNORE_INDEX, 9]]
    assert part.mask == causal() & documents([0, 3, 5, 6, 8])


def test_a_separator_at_the_end_of_a_row_begins_no_document():
    assert document_borders_of(torch.tensor([5, 6, 0]), 0) == [0, 3]


def test_rows_are_dealt_to_replicas_which_all_have_as_many_passes():
    rows = torch.tensor([[row, 0, 5, 6] for row in range(1, 6)])
    hands = deal(rows, num_replicas=2, batch_size=2, mask=causal())
    assert [[each.ids[:, 0].tolist() for each in hand] for hand in hands] == [[[1, 3], [5]], [[2, 4], [1, 3]]]
    assert [[each.is_blank for each in hand] for hand in hands] == [[False, False], [False, True]]
    assert bool((hands[1][1].labels == IGNORE_INDEX).all())
    assert [len(hand) for hand in deal(rows[:1], num_replicas=3, batch_size=1, mask=causal(), separator=0)] == [1, 1, 1]


def test_gradients_that_are_moved_to_their_masters_are_known_to_be_read(monkeypatch: pytest.MonkeyPatch):
    """They are FSDP's memory where parameters are sharded, and dropped as soon as they have been moved."""
    model, seen = torch.nn.Linear(2, 2).bfloat16(), []
    optimizer = Optimizer(model, weight_decay=0.0, gradient_clip=1.0)
    monkeypatch.setattr(optimizer, "_is_sharded", True)
    monkeypatch.setattr(optimizer_room, "take_over", lambda parameters: seen.extend(each.grad is not None for each in parameters))
    model(torch.ones(1, 2, dtype=torch.bfloat16)).sum().backward()
    optimizer.collect()
    assert seen == [True, True] and model.weight.grad is None
