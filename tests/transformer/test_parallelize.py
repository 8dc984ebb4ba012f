"""Law 6 under `parallelize`: context × shards × replicas × accumulation × padding × packing, over real processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.support.errors import relative
from tests.support.once import once
from tests.support.processes import results, run_processes
from tests.transformer.parallel_ranks import CASES, Case, whole

BUDGET = 2e-6  # as in law 6: Hugging Face computes norms and its loss in float32

Result = tuple[Tensor, dict[str, Tensor | None]]


def _run(ranks: int, function: str, folder: Path) -> list[Any]:
    # Most of it is importing, which on a busy machine takes minutes.
    return results(run_processes(ranks, function, folder, group_timeout=240.0, timeout=280.0))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What every rank has, by number of ranks and case; one start of the processes for all cases of a number."""

    def of(ranks: int) -> list[list[Result]]:
        function = "tests.transformer.parallel_ranks:every_case"
        return once(tmp_path_factory, f"parallelize-{ranks}", lambda folder: _run(ranks, function, folder))

    return of


def check(ours: Result, expected: Result) -> None:
    loss, gradients = ours
    assert abs(float(loss) - float(expected[0])) <= BUDGET * float(expected[0]), f"loss {float(loss)}, whole {float(expected[0])}"
    assert gradients.keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        mine = gradients[name]
        assert (mine is None) == (gradient is None), name
        if gradient is not None and mine is not None:
            error = relative(mine, gradient)
            assert error <= BUDGET, f"the gradient of {name} is off by {error:.1e}"


def said(case: Case) -> str:
    how = ", ".join(f"{name}={value}" for name, value in case.how.items())
    return f"{case.model}, {case.data}, {case.mesh}, {how}"


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "index"), [(ranks, index) for ranks, cases in CASES.items() for index in range(len(cases))])
def test_loss_and_gradients_are_those_of_the_unsplit_model(ranks: int, index: int, found: Any):
    case = CASES[ranks][index]
    expected = whole(case)
    for rank, each in enumerate(found(ranks)):
        try:
            check(each[index], expected)
        except AssertionError as error:
            raise AssertionError(f"rank {rank}, {said(case)}: {error}") from error


BREAKAGES = ("averaged gradients", "averaged averages", "tokens of this replica alone")


@pytest.mark.slow
@pytest.mark.parametrize("breakage", BREAKAGES)
def test_the_law_fails_with(breakage: str, tmp_path: Path):
    function = f"tests.transformer.parallel_ranks:broken_by_{breakage.replace(' ', '_')}"
    broken = _run(2, function, tmp_path)
    case = Case({"shard": 2})
    with pytest.raises(AssertionError, match=r"off by|loss"):
        check(broken[0], whole(case))
