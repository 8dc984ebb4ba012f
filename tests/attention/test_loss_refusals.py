"""A loss that cannot be computed on one rank is refused on every rank, and nobody waits."""

import pytest
import torch

import ringspan


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
        try:
            sequence.loss(logits, torch.zeros(2, rows, dtype=torch.int64))
        except ringspan.RankFailure as error:
            return f"waited: {error}"
        except ringspan.RingspanError as error:
            return str(error)
        return "computed"

    said = ringspan.run_in_process(3, run, timeout_seconds=10.0)
    expected = "rank 1 has" if wrong == "vocabulary" else "a loss of logits"
    assert all(expected in each for each in said), said


def test_equal_shapes_are_agreed_on_once():
    def run(group) -> int:
        sequence = ringspan.ContextParallel(group).sequence(12)
        logits, labels = torch.zeros(2, sequence.shard_length, 5), torch.zeros(2, sequence.shard_length, dtype=torch.int64)
        for _ in range(3):
            torch.testing.assert_close(sequence.loss(logits, labels), torch.log(torch.tensor(5.0)))
        return len(sequence._losses)

    assert ringspan.run_in_process(3, run) == [1, 1, 1]
