"""A loss that cannot be computed on one rank is refused on every rank, and nobody waits."""

from typing import Any

import pytest
import torch

import ringspan


def said_of_loss(sequence: ringspan.Sequence, *arguments: Any) -> str:
    """What a rank is told."""
    try:
        sequence.loss(*arguments)
    except ringspan.RankFailure as error:
        return f"waited: {error}"
    except ringspan.RingspanError as error:
        return str(error)
    return "computed"


@pytest.mark.parametrize("wrong", ["rows", "dims", "vocabulary"])
def test_a_wrong_shape_on_one_rank_is_an_error_on_every_rank(wrong: str):
    def run(group) -> str:
        sequence = ringspan.ContextParallel(group).sequence(12)
        rows, vocabulary = sequence.shard_length, 5
        if group.rank == 1:
            rows += wrong == "rows"
            vocabulary += wrong == "vocabulary"
        logits = torch.zeros(2, rows, vocabulary)
        if group.rank == 1 and wrong == "dims":
            logits = logits[0]
        return said_of_loss(sequence, logits, torch.zeros(2, rows, dtype=torch.int64))

    said = ringspan.run_in_process(3, run, timeout_seconds=10.0)
    expected = "rank 1 has" if wrong == "vocabulary" else "a loss of logits"
    assert all(expected in each for each in said), said


@pytest.mark.parametrize("wrong", ["narrow labels", "no logits", "logits in whole numbers", "a word to ignore"])
def test_what_is_of_another_type_on_one_rank_is_an_error_on_every_rank(wrong: str):
    def run(group) -> str:
        sequence = ringspan.ContextParallel(group).sequence(12)
        logits, labels, ignored = torch.zeros(2, 4, 5), torch.zeros(2, 4, dtype=torch.int64), 3
        # Known by now: labels in another dtype are another call all the same.
        sequence.loss(logits, labels, ignored)
        if group.rank == 1:
            labels = labels.int() if wrong == "narrow labels" else labels
            logits = {"no logits": None, "logits in whole numbers": logits.long()}.get(wrong, logits)
            ignored = "none" if wrong == "a word to ignore" else ignored
        elif wrong != "narrow labels":
            # New to the others too: they agree again.
            logits = torch.zeros(2, 4, 6)
        else:
            labels = labels + 0
            logits = logits.double()
        return said_of_loss(sequence, logits, labels, ignored)

    said = ringspan.run_in_process(3, run, timeout_seconds=10.0)
    assert all("a loss of" in each for each in said), said


def test_the_last_position_of_a_batch_counts_for_nothing_whatever_else_is_ignored():
    """`shard_batch` gives it −100, which is no label of any vocabulary."""

    def run(group) -> torch.Tensor:
        sequence = ringspan.ContextParallel(group).sequence(8)
        batch = sequence.shard_batch({"input_ids": tokens, "labels": tokens})
        sequence.context.use.has_attended = True
        return sequence.loss(sequence.shard(logits), batch["labels"], ignore_index=0)

    tokens, logits = torch.tensor([[1, 2, 0, 3, 0, 4, 1, 2]]), torch.randn(1, 8, 5)
    expected = torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:], ignore_index=0)
    for found in ringspan.run_in_process(2, run, timeout_seconds=10.0):
        torch.testing.assert_close(found, expected)


def test_equal_shapes_are_agreed_on_once():
    def run(group) -> int:
        sequence = ringspan.ContextParallel(group).sequence(12)
        logits, labels = torch.zeros(2, sequence.shard_length, 5), torch.zeros(2, sequence.shard_length, dtype=torch.int64)
        for _ in range(3):
            torch.testing.assert_close(sequence.loss(logits, labels), torch.log(torch.tensor(5.0)))
        return len(sequence._losses)

    assert ringspan.run_in_process(3, run) == [1, 1, 1]
