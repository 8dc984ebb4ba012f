"""What verification measures with: its dense attention beside another one, its errors, its budgets, its poison, its choice of cases."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from ringspan.errors import RingspanError
from ringspan.geometry import parse_mask
from ringspan.verify import Budget, Error, Grid, dense_attention, make_inputs, measure, open_world, poisoned_memory
from ringspan.verify.budget import budgets
from ringspan.verify.compare import error
from tests.support.dense import Tensors, dense
from tests.support.errors import relative
from tests.support.masks import EXAMPLES


@pytest.mark.parametrize("mask", [name for name in EXAMPLES if name != "mask_mod"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
def test_dense_attention_by_formula_is_dense_attention_by_autograd(mask: str, heads: int, kv_heads: int):
    inputs = make_inputs(2, 19, heads, kv_heads, 8, torch.float32, seed=3)
    found = dense_attention(inputs, EXAMPLES[mask].make(19))
    exact = dense(Tensors(inputs.q, inputs.k, inputs.v, inputs.dout), EXAMPLES[mask].allowed(19))
    for name, tensor in vars(found).items():
        assert tensor.dtype == torch.float64 and relative(tensor, exact.named()[name]) <= 1e-13, name


def test_dense_attention_is_torchs_own():
    inputs = make_inputs(2, 19, 6, 2, 8, torch.float64, seed=0)
    heads_first = (tensor.transpose(1, 2) for tensor in (inputs.q, inputs.k, inputs.v))
    out = F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True).transpose(1, 2)
    assert relative(dense_attention(inputs, parse_mask("causal")).out, out) <= 1e-14


def test_the_same_seed_gives_the_same_tensors_in_every_dtype_but_for_rounding():
    wide, narrow = (make_inputs(1, 5, 2, 1, 4, dtype, seed=7) for dtype in (torch.float64, torch.bfloat16))
    assert torch.equal(wide.k.bfloat16(), narrow.k)
    assert not torch.equal(wide.q, make_inputs(1, 5, 2, 1, 4, torch.float64, seed=8).q)


# ---- errors ------------------------------------------------------------------------------------------------------------------------


def test_an_error_is_a_ratio_of_norms_and_the_largest_difference():
    found = error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0]))
    assert found == Error(pytest.approx(0.1), pytest.approx(0.5), 2)


def test_an_exact_zero_is_measured_by_the_size_of_the_inputs():
    assert error(torch.full((4,), 1e-7), torch.full((4,), 1e-18)).relative == pytest.approx(1e-7)


def test_infinities_count_where_they_differ_and_nan_always():
    both = torch.tensor([float("-inf"), 1.0])
    assert error(both, both).relative == 0.0
    assert error(torch.tensor([0.0, 1.0]), both).relative == math.inf
    assert math.isnan(error(torch.tensor([float("nan"), 1.0]), torch.ones(2)).relative)
    assert math.isnan(error(torch.tensor([float("nan"), 1.0]), both).relative)


def test_tensors_of_other_shapes_are_a_mistake():
    inputs = make_inputs(1, 4, 1, 1, 2, torch.float64, seed=0)
    exact = dense_attention(inputs, parse_mask("full"))
    with pytest.raises(AssertionError, match="compared with"):
        measure(dense_attention(make_inputs(1, 5, 1, 1, 2, torch.float64, seed=0), parse_mask("full")), exact)


# ---- budgets -----------------------------------------------------------------------------------------------------------------------


def single(relative_error: float, elements: int = 10**5) -> dict[str, Error]:
    return {name: Error(relative_error, 0.1, elements) for name in ("out", "lse", "dq", "dk", "dv")}


def test_float32_and_float64_have_fixed_budgets_and_no_kernel_is_asked():
    def never() -> dict[str, Error]:
        raise AssertionError("no kernel is asked")

    assert {budget.limit for budget in budgets("float32", torch.float32, never).values()} == {2e-5}
    assert {budget.limit for budget in budgets("float64", torch.float64, never).values()} == {1e-12}


def test_half_precision_is_allowed_half_as_much_again_as_one_kernel():
    found = budgets("bfloat16", torch.bfloat16, lambda: single(2e-3))
    assert found["dq"] == Budget(3e-3, "1.5× the error that one kernel in bfloat16 makes over the same tensors on one rank")
    assert found["lse"].limit == 3e-3


def test_lse_is_held_to_float32_where_the_kernel_is_that_good():
    found = budgets("bfloat16", torch.bfloat16, lambda: single(1e-7))["lse"]
    assert found.limit == 2e-5 and "float32" in found.reason


def test_few_numbers_get_a_few_roundings():
    found = budgets("bfloat16", torch.bfloat16, lambda: single(0.0, elements=12))["out"]
    assert found.limit == 4 * 2.0**-8 and "so few" in found.reason


@pytest.mark.parametrize("wrong", [0.5, math.inf, math.nan])
def test_a_kernel_that_is_wrong_itself_buys_its_ring_no_budget(wrong: float):
    found = budgets("float16", torch.float16, lambda: single(wrong))["out"]
    assert found.limit == 8 * 2.0**-11 and "too much in itself" in found.reason


# ---- poison, worlds, and the choice of cases ---------------------------------------------------------------------------------------


def test_memory_that_nobody_wrote_is_nan_inside_and_as_before_outside():
    assert not torch.are_deterministic_algorithms_enabled()
    with poisoned_memory():
        assert all(torch.empty(5, dtype=dtype).isnan().all() for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16))
        assert torch.ones(3).new_empty(4).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_device_that_there_is_not_is_refused():
    with pytest.raises(RingspanError, match="there are auto, cpu and cuda"):
        open_world("tpu").__enter__()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_is_refused_and_auto_takes_the_cpu():
    with pytest.raises(RingspanError, match="sees 0 CUDA GPUs"):
        open_world("cuda").__enter__()
    with open_world("auto") as world:
        assert world.device.type == "cpu" and world.transport is None and world.name == "in-process" and world.is_first


def test_all_combinations_are_taken_where_they_are_few():
    grid = Grid(num_ranks=(2, 3), strategies=("ring",), layouts=("zigzag",), lengths=(5, 6), masks=("causal",), dtypes=("float32",))
    assert len(grid.cases()) == grid.size == 4 == len(set(grid.cases(most=600)))


@pytest.mark.parametrize("most", [100, 333, 600, 1500])
def test_an_even_choice_of_many_combinations_has_every_entry_of_every_list(most: int):
    grid = Grid()
    cases = grid.cases(most)
    assert 0.4 * most <= len(cases) <= most and len(set(cases)) == len(cases)
    for name, values in {"num_ranks": grid.num_ranks, "strategy": grid.strategies, "layout": grid.layouts, "mask": grid.masks,
                         "length": grid.lengths, "dtype": grid.dtypes}.items():  # fmt: skip
        counts = [sum(getattr(case, name) == value for case in cases) for value in values]
        assert min(counts) > 0 and max(counts) - min(counts) <= max(3, 0.2 * max(counts)), f"{name}: {counts}"


def test_six_hundred_cases_have_every_strategy_with_every_layout_mask_and_number_of_ranks():
    grid = Grid()
    cases = grid.cases(600)
    for other in ("layout", "mask", "num_ranks", "dtype", "length"):
        wanted = len(grid.strategies) * len({getattr(case, other) for case in cases})
        assert len({(case.strategy, getattr(case, other)) for case in cases}) == wanted, other


def test_uneven_weights_leave_every_third_rank_with_nothing():
    (case,) = Grid(num_ranks=(6,), strategies=("ring",), layouts=("weighted",), masks=("full",), lengths=(9,), dtypes=("float32",)).cases()
    assert case.weights == (1.0, 2.0, 0.0, 1.0, 2.0, 0.0)
