"""Real processes over gloo give what in-process ranks give, count the same bytes, and end when one of them dies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ringspan
from tests.distributed import ranks
from tests.support.dense import dense, make_tensors
from tests.support.errors import BUDGETS, assert_close, relative
from tests.support.models import make_batch, tiny_llama, whole_loss
from tests.support.once import once
from tests.support.processes import results, run_processes
from tests.support.split import assemble

pytestmark = pytest.mark.slow

MODEL_BUDGET = 2e-6  # as in law 6: Hugging Face computes norms and its loss in float32


@pytest.fixture(scope="module", params=[2, 3, 4])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, list[Any], list[Any]]:
    """(ranks, what processes returned, what in-process ranks returned); one start of the processes for all tests."""
    count = request.param
    function = "tests.distributed.ranks:" + ("four" if count == 4 else "everything")

    def run(folder: Path) -> tuple[list[Any], list[Any]]:
        before = torch.get_num_threads()
        # As many as each process has: sums are cut by threads.
        torch.set_num_threads(1)
        try:
            return results(run_processes(count, function, folder)), ringspan.run_in_process(count, ranks.everything)
        finally:
            torch.set_num_threads(before)

    return count, *once(tmp_path_factory, f"gloo-{count}", run)


def test_processes_compute_bit_for_bit_what_in_process_ranks_compute(both: tuple[int, list[Any], list[Any]]):
    count, real, threads = both
    for index, (split, tensors) in enumerate(ranks.cases(count)):
        for rank in range(count):
            ours, theirs = real[rank]["attend"][index], threads[rank]["attend"][index]
            assert torch.equal(ours.positions, theirs.positions)
            for name, tensor in ours.outcome.named().items():
                assert torch.equal(tensor, theirs.outcome.named()[name]), f"{name} of rank {rank}: {split}, {tensors}"


def test_what_processes_compute_is_dense_attention(both: tuple[int, list[Any], list[Any]]):
    from tests.support.masks import EXAMPLES

    by_mask = {str(EXAMPLES[name].make(29)): EXAMPLES[name] for name in EXAMPLES}
    count, real, _ = both
    for index, (split, given) in enumerate(ranks.cases(count)):
        tensors = make_tensors(**given)
        if given["length"] != 29 or tensors.q.dtype not in BUDGETS:
            continue
        found = assemble([real[rank]["attend"][index] for rank in range(count)], 29)
        assert_close(found, dense(tensors, by_mask[str(split.mask)].allowed(29)), BUDGETS[tensors.q.dtype], f"{split}, {given}")


def test_processes_send_the_bytes_that_the_schedule_promised(both: tuple[int, list[Any], list[Any]]):
    count, real, _ = both
    for index, (split, tensors) in enumerate(ranks.cases(count)):
        parts = [real[rank]["attend"][index] for rank in range(count)]
        sent = {link: size for part in parts for link, size in part.sent.items()}
        assert sent == parts[0].promised, f"{split}, {tensors}"


def test_a_model_on_processes_has_the_loss_and_gradients_of_the_whole(both: tuple[int, list[Any], list[Any]]):
    _, real, _ = both
    expected_loss, expected = whole_loss(tiny_llama(), make_batch(2, 19, padded=(0, 4)))
    for result in real:
        loss, gradients = result["train"]
        assert relative(loss, expected_loss) <= MODEL_BUDGET
        assert max(relative(gradients[name], expected[name]) for name in expected) <= MODEL_BUDGET


def test_numbers_that_gloo_does_not_carry_are_broadcast_too(both: tuple[int, list[Any], list[Any]]):
    _, real, _ = both
    assert [result["broadcast"] for result in real] == [[1.0, 1.0, 1.0, 1.0, 0.0]] * len(real)


def test_processes_that_disagree_are_all_told_and_go_on_together(both: tuple[int, list[Any], list[Any]]):
    _, real, threads = both
    for result, beside in zip(real, threads, strict=True):
        assert result["refuse"] == beside["refuse"]
        assert "went on" not in result["refuse"]


def test_replicas_that_are_split_have_the_loss_and_gradients_of_the_whole_batch(both: tuple[int, list[Any], list[Any]]):
    count, real, _ = both
    if count != 4:
        return
    expected_loss, expected = whole_loss(tiny_llama(), make_batch(4, 17))
    for result in real:
        loss, gradients = result["replicas"]
        assert relative(loss, expected_loss) <= MODEL_BUDGET
        assert max(relative(gradients[name], expected[name]) for name in expected) <= MODEL_BUDGET
        assert "one axis" in result["two_axes"][0]


@pytest.mark.parametrize(("function", "group_timeout", "within"), [("die", 90.0, 30.0), ("hang", 4.0, 30.0)])
def test_when_a_rank_dies_or_stops_answering_the_others_end_with_a_failure_that_names_it(
    function: str, group_timeout: float, within: float, tmp_path: Path
):
    outcomes = run_processes(3, f"tests.distributed.ranks:{function}", tmp_path, group_timeout=group_timeout, awaited=(0, 2))
    assert outcomes[1].result is None or function == "hang"
    for rank in (0, 2):
        outcome = outcomes[rank]
        assert outcome.status == 0, f"rank {rank}: {outcome.result!r}\n{outcome.errors}"
        seconds, _, message = outcome.result.partition(" s: ")
        assert message and float(seconds) < within, outcome.result
        assert "rank 1 died or did not answer" in message, message
