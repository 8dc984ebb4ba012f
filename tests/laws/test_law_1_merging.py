"""Law 1: merging partial results is associative and commutative, with an identity; masked-out rows stay zero, never NaN."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ringspan.kernels import partial
from tests.support.laws import Partial, check_merging, identity, merged
from tests.support.sizes import examples

# Products and one logarithm of numbers around 1: a few roundings each, of which a row has up to three.
BUDGETS = {torch.float64: 1e-13, torch.float32: 1e-5}


def random_partials(dtype: torch.dtype, seed: int, spread: float = 3.0, rows: int = 6) -> list[Partial]:
    """Three partials of which row 0 is empty in all, row 1 in all but the last, row 2 in the first alone."""
    generator = torch.Generator().manual_seed(seed)
    partials = []
    for index in range(3):
        out = torch.randn(rows, 2, 3, 4, generator=generator, dtype=torch.float64).to(dtype)
        lse = (torch.randn(rows, 2, 3, generator=generator, dtype=torch.float64) * spread).to(dtype)
        empty = [0] + [1] * (index < 2) + [2] * (index == 0)
        out[empty], lse[empty] = 0.0, float("-inf")
        partials.append((out, lse))
    return partials


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@examples(20)
@given(seed=st.integers(0, 1000))
def test_merging_is_associative_and_commutative_with_an_identity_and_keeps_empty_rows_zero(dtype: torch.dtype, seed: int):
    check_merging(random_partials(dtype, seed), BUDGETS[dtype])


@pytest.mark.parametrize("far", [0.0, 80.0, 5e4])
def test_merging_neither_overflows_nor_loses_the_larger_part_however_far_two_lse_are_apart(far: float):
    partials = random_partials(torch.float32, seed=1)
    partials[1][1][3:] += far
    partials[2][1][3:] -= far
    out, _ = merged(*partials)
    check_merging(partials, BUDGETS[torch.float32] * max(1.0, far))  # lse is of that size, and resolved to 1e-7 of it
    assert torch.isfinite(out).all()
    if far:
        torch.testing.assert_close(out[3:], partials[1][0][3:], rtol=1e-5, atol=1e-5)


def test_merging_the_halves_of_a_softmax_gives_the_softmax_of_the_whole():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(5, 1, 1, 9, generator=generator, dtype=torch.float64)
    values = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    parts = [
        (torch.softmax(part, -1) @ block, torch.logsumexp(part, -1))
        for part, block in zip(scores.split(4, -1), values.split(4), strict=True)
    ]
    out, lse = merged(*parts)
    torch.testing.assert_close(out, torch.softmax(scores, -1) @ values, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(lse, torch.logsumexp(scores, -1), rtol=1e-14, atol=1e-14)


def test_a_row_without_keys_on_any_rank_is_the_identity_itself():
    nothing = identity(2, 1, 1, 3)
    out, lse = merged(nothing, nothing, nothing)
    assert not out.any() and torch.isneginf(lse).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("start", [0, 2, 4])
def test_merging_some_rows_into_other_buffers_is_merging_them_in_place(dtype: torch.dtype, start: int):
    (out, lse), (other_out, other_lse), _ = random_partials(torch.float64, seed=2)
    other_out, other_lse = other_out[: 6 - start], other_lse[: 6 - start]
    expected_out, expected_lse = out.clone(), lse.clone()
    partial.merge_(expected_out, expected_lse, [(start, other_out, other_lse)])
    into = (torch.full_like(out, torch.nan, dtype=dtype), torch.full_like(lse, torch.nan))
    before = out.clone(), lse.clone()
    partial.merge_(out, lse, [(start, other_out, other_lse)], into=into)
    assert torch.equal(out, before[0]) and torch.equal(lse, before[1]), "what is merged into other buffers stays as it is"
    assert torch.equal(into[0], expected_out.to(dtype)), "rounded once"
    assert torch.equal(into[1], expected_lse)


def _without_the_guard(out, lse, others):
    ((_, other_out, other_lse),) = others
    total = torch.logaddexp(lse, other_lse)
    out.mul_(torch.exp(lse - total).unsqueeze(-1)).addcmul_(other_out, torch.exp(other_lse - total).unsqueeze(-1))
    lse.copy_(total)


def _larger_lse_wins(out, lse, others):
    ((_, other_out, other_lse),) = others
    wins = (other_lse > lse).unsqueeze(-1)
    out.copy_(torch.where(wins, other_out, out))
    torch.maximum(lse, other_lse, out=lse)
    lse.add_(0.1)


@pytest.mark.parametrize("broken", [_without_the_guard, _larger_lse_wins])
def test_law_1_fails_where_the_merge_is_broken(broken, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tests.support.laws.merge_", broken)
    with pytest.raises(AssertionError):
        check_merging(random_partials(torch.float64, 0), BUDGETS[torch.float64])


def test_the_merge_that_the_executor_uses_is_the_one_that_is_tested_here():
    from ringspan.attention import accumulate
    from tests.support import laws

    assert accumulate.merge_ is partial.merge_ is laws.merge_
