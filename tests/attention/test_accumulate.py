"""Partial outputs are added up in float32 and rounded once, and only where more than two meet is there a float32 copy of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ringspan.attention import accumulate
from ringspan.attention.accumulate import TOGETHER_MADE, Accumulator, Partial
from ringspan.attention.inbox import Place
from ringspan.attention.peer_courier import _as_one
from ringspan.attention.shelf import adjacent
from ringspan.kernels.partial import add_, merge_
from ringspan.schedule import Piece
from ringspan.transformer.memory import LiveBytes

ROWS = 12


def partials(spans: list[tuple[int, int]], dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    return [
        (torch.randn(stop - start, 1, 2, 4).to(dtype), torch.randn(stop - start, 1, 2, dtype=torch.float32)) for start, stop in spans
    ]  # rows first


def exact(spans: list[tuple[int, int]], parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    out, lse = torch.zeros(ROWS, 1, 2, 4, dtype=torch.float64), torch.full((ROWS, 1, 2), float("-inf"), dtype=torch.float64)
    for (start, _), (part, part_lse) in zip(spans, parts, strict=True):
        merge_(out, lse, [(start, part.double(), part_lse.double())])
    return out, lse


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "spans",
    [
        [(0, 12), (6, 12), (6, 12)],
        [(0, 12), (6, 9), (4, 12), (7, 8)],
        [(0, 12), (6, 12)],
        [(0, 12)],
        [(0, 5), (5, 12)],
        [(3, 5)],
        [(0, 5), (2, 12), (0, 12)],
    ],
)
@pytest.mark.parametrize("rounds", [True, False])
@pytest.mark.parametrize("lent", [True, False])
def test_parts_add_up_to_the_whole_and_are_rounded_once(spans: list[tuple[int, int]], dtype: torch.dtype, rounds: bool, lent: bool):
    parts = partials(spans, dtype)
    expected, expected_lse = exact(spans, parts)
    later = spans[1:] or [(0, ROWS)]
    again = min(start for start, _ in later), max(stop for _, stop in later)
    partial = Partial(Piece("o", 0, 0, ROWS), torch.empty(1, ROWS, 2, 4, dtype=dtype), len(spans), again, rounds)
    before = [(out.clone(), lse.clone()) for out, lse in parts]
    for (start, stop), (out, lse) in zip(spans, parts, strict=True):
        partial.add(start, stop, out, lse, lent=lent)
    found, found_lse = partial.result()
    found, found_lse = found.movedim(1, 0), found_lse.permute(2, 0, 1)
    unit = 2**-8 if dtype == torch.bfloat16 and (rounds or len(spans) == 1) else 2**-24
    assert found.dtype == (dtype if rounds or spans == [(0, 12)] else torch.float32)
    torch.testing.assert_close(found.double(), expected, rtol=1.01 * unit + 1e-6, atol=2e-6)
    torch.testing.assert_close(found_lse.double(), expected_lse, rtol=1e-5, atol=1e-5)
    if lent:
        assert all(torch.equal(a, b) for old, new in zip(before, parts, strict=True) for a, b in zip(old, new, strict=True)), "left as lent"


def test_few_parts_are_put_off_and_merged_at_once_without_a_wide_copy(monkeypatch: pytest.MonkeyPatch):
    spans = [(0, 12), (6, 12), (6, 12), (3, 9)]
    partial = Partial(Piece("o", 0, 0, ROWS), torch.empty(1, ROWS, 2, 4, dtype=torch.bfloat16), 4, (3, 12))
    made, merged = watched(partial, monkeypatch)
    for (start, stop), (out, lse) in zip(spans, partials(spans, torch.bfloat16), strict=True):
        partial.add(start, stop, out, lse)
    assert not merged
    partial.result()
    assert merged == [3] and not made


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(("additions", "lent", "waits"), [(2, False, True), (3, False, True), (4, False, False), (4, True, True)])
def test_of_a_gradient_that_is_made_here_the_last_call_finds_no_more_than_its_sum(additions: int, lent: bool, waits: bool, parts: int):
    """What is put off lies beside what a call works in, which is several times as much as it gives; what was lent lies where it came."""
    like, bytes_each = torch.empty(1, ROWS, 2, 4, dtype=torch.bfloat16), parts * ROWS * 2 * 4 * 2
    came = [torch.ones(1, ROWS, 2, 4, dtype=torch.bfloat16).movedim(1, 0) for _ in range(parts)]
    with LiveBytes() as live:
        live.ignore(like, *came)
        total = Accumulator(Piece("dq", 0, 0, ROWS), like, additions, parts=parts)
        total.add(0, ROWS, *[part.clone() for part in came])
        held = []
        for _ in range(1, additions):
            held.append(live.now())
            total.add(0, ROWS, *(came if lent else [part.clone() for part in came]), lent=lent)
        found = total.result()
    assert all(torch.equal(part, torch.full_like(part, additions)) for part in found)
    if waits:
        assert held == [bytes_each * (1 if lent else before) for before in range(1, additions)]
    else:
        assert held == [bytes_each, 2 * bytes_each, 2 * bytes_each], "in 2 bytes, and from the first addition on in 4"


def test_of_many_only_rows_to_which_more_comes_are_kept_wide(monkeypatch: pytest.MonkeyPatch):
    spans = [(0, 12), *[(6, 12)] * 4]
    partial = Partial(Piece("o", 0, 0, ROWS), torch.empty(1, ROWS, 2, 4, dtype=torch.bfloat16), 5, (6, 12))
    made, merged = watched(partial, monkeypatch)
    for (start, stop), (out, lse) in zip(spans, partials(spans, torch.bfloat16), strict=True):
        partial.add(start, stop, out, lse)
    partial.result()
    assert made == [(6, torch.float32)] and merged == [1] * 4


def test_what_was_lent_is_read_before_it_is_given_back():
    spans = [(0, 12), (3, 9), (0, 12)]
    parts = partials(spans, torch.bfloat16)
    expected, _ = exact(spans, parts)
    partial = Partial(Piece("o", 0, 0, ROWS), torch.empty(1, ROWS, 2, 4, dtype=torch.bfloat16), 3, (0, 12))
    accumulator = Accumulator(Piece("dq", 0, 0, ROWS), torch.empty(1, ROWS, 2, 4, dtype=torch.bfloat16), 3)
    total = torch.zeros(ROWS, 1, 2, 4, dtype=torch.float64)
    for (start, stop), (out, lse) in zip(spans, parts, strict=True):
        total[start:stop] += out
        partial.add(start, stop, out, lse, lent=True)
        accumulator.add(start, stop, out, lent=True)
        partial.settle(lent=True)
        accumulator.settle(lent=True)
        for tensor in (out, lse):
            tensor.fill_(float("nan"))
    torch.testing.assert_close(partial.result()[0].movedim(1, 0).double(), expected, rtol=1.01 * 2**-8, atol=2e-6)
    torch.testing.assert_close(accumulator.result()[0].movedim(1, 0).double(), total, rtol=1.01 * 2**-8, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rounds", [True, False])
@pytest.mark.parametrize("kind", ["o", "dq", "dkv"])
@pytest.mark.parametrize("spans", [[(0, 96)], [(0, 96), (8, 96)], [(0, 48), (40, 96)]])
@pytest.mark.parametrize("additions", [2, 3, 4, 5, 8])
def test_the_first_their_sum_and_the_next_are_all_that_is_held(spans, additions: int, kind: str, rounds: bool, dtype, monkeypatch):
    """`ringspan.bench.memory` promises it: what waits takes no more than the sum that it saves, and where none is saved nothing waits."""
    for name in ("merge_", "add_"):
        monkeypatch.setattr(accumulate, name, uncounted(getattr(accumulate, name)))
    like, parts = torch.empty(1, 96, 2, 64, dtype=dtype), 2 if kind == "dkv" else 1
    sum_bytes = parts * like.numel() * (4 if dtype != torch.float32 and (additions > 2 or not rounds) else 0)
    with LiveBytes() as live:
        live.ignore(like)
        if kind == "o":
            total = Partial(Piece(kind, 0, 0, 96), like, additions, (min(start for start, _ in spans), 96), rounds)
        else:
            total = Accumulator(Piece(kind, 0, 0, 96), like, additions, rounds, parts)
        for index in range(additions):
            start, stop = spans[min(index, len(spans) - 1)]
            made = [torch.ones(1, stop - start, 2, 64, dtype=dtype).movedim(1, 0) for _ in range(parts)]
            if isinstance(total, Partial):
                total.add(start, stop, made[0], torch.ones(1, 2, stop - start).permute(2, 0, 1))
            else:
                total.add(start, stop, *made)
            del made
        total.result()
    assert live.peak <= 2 * parts * like.numel() * like.element_size() + sum_bytes + 6 * 2 * 96 * 4, "and a few lse"


def uncounted(work: Callable[..., None]) -> Callable[..., None]:
    """`work` whose own intermediates, which the fused kernels have in registers, are not counted."""

    def quiet(*args: Any, **kwargs: Any) -> None:
        with _disable_current_modes():
            work(*args, **kwargs)

    return quiet


def watched(partial: Partial, monkeypatch: pytest.MonkeyPatch) -> tuple[list, list[int]]:
    """What it makes room for, and how many parts each of its merges takes in."""
    made, merged, right = [], [], partial._empty
    monkeypatch.setattr(partial, "_empty", lambda rows, dtype: made.append((rows, dtype)) or right(rows, dtype))

    def counted(out, lse, others, *, into=None):
        merged.append(len(others))
        merge_(out, lse, others, into=into)

    monkeypatch.setattr(accumulate, "merge_", counted)
    return made, merged


def gradients(rows: int, beside: bool, dtype: torch.dtype) -> list[Tensor]:
    """dk and dv, rows first; `beside`: as a kernel that is given one tensor for both leaves them."""
    both = torch.randn(2, rows, 1, 2, 4).to(dtype)
    return list(both) if beside else [part.clone() for part in both]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("rounds", [True, False])
@pytest.mark.parametrize(
    "spans",
    [
        [(0, 12), (0, 12)],
        [(0, 12)] * 3,
        [(0, 12)] * 4,
        [(0, 12), (3, 9), (0, 12)],
        [(2, 12), (0, 12), (0, 12)],
        [(0, 12)],
        [(0, 12), *[(3, 12)] * 5],
    ],
)
def test_gradients_add_up_whether_they_lie_side_by_side_or_not(spans, rounds: bool, beside: bool, dtype: torch.dtype, monkeypatch):
    torch.manual_seed(0)
    passes: list[int] = []

    def counted(held, others, *, into=None):
        passes.append(len(others))
        add_(held, others, into=into)

    monkeypatch.setattr(accumulate, "add_", counted)
    accumulator = Accumulator(Piece("dkv", 0, 0, ROWS), torch.empty(1, ROWS, 2, 4, dtype=dtype), len(spans), rounds, parts=2)
    expected = torch.zeros(2, ROWS, 1, 2, 4, dtype=torch.float64)
    for start, stop in spans:
        parts = gradients(stop - start, beside, dtype)
        for whole, part in zip(expected, parts, strict=True):
            whole[start:stop] += part
        accumulator.add(start, stop, *parts)
    found = accumulator.result()
    wanted = dtype if rounds or len(spans) == 1 else torch.float32
    for mine, right in zip(found, expected, strict=True):
        assert mine.dtype == wanted and mine.is_contiguous()
        # Rounded once, to half a unit in the last place.
        unit = 2**-8 if wanted == torch.bfloat16 else 2**-22
        torch.testing.assert_close(mine.movedim(1, 0).double(), right, rtol=1.01 * unit + 1e-6, atol=2e-6)
    if set(spans) == {(0, 12)} and len(spans) > 1:
        # All at once where waiting costs nothing, dk and dv as well where they lie side by side.
        more = len(spans) - 1
        each = [more] if rounds and dtype == torch.bfloat16 and more <= TOGETHER_MADE else [1] * more
        assert passes == [count for count in each for _ in range(1 if beside else 2)]


def test_what_lies_side_by_side_here_and_there_is_one_copy():
    dk, dv = torch.randn(2, 6, 1, 2, 4)
    nbytes = dk.numel() * dk.element_size()
    side_by_side = (Place(512, nbytes), Place(512 + nbytes, nbytes))
    ((whole, place),) = _as_one([dk, dv], side_by_side)
    assert torch.equal(whole, torch.cat([dk, dv])) and place == Place(512, 2 * nbytes)
    assert len(_as_one([dk, dv], (Place(512, nbytes), Place(1024, nbytes)))) == 2, "a gap there"
    assert len(_as_one([dk, dv.clone()], side_by_side)) == 2, "apart here"
    assert len(_as_one([dv, dk], side_by_side)) == 2, "the other way round"
    assert _as_one([dk], (Place(0, nbytes),))[0][1] == Place(0, nbytes)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("fused", [True, False])
def test_single_rows_that_lie_side_by_side_are_one_view_whatever_their_strides(batch: int, fused: bool):
    """Torch calls one row contiguous whatever its stride: two of them are not one and the same stride apart."""
    whole = torch.randn(2, batch, 1, 3, 4) if not fused or batch > 1 else torch.randn(1, 1, 2, 3, 4).permute(2, 0, 1, 3, 4)
    first, second = (part.transpose(0, 1) for part in whole)
    view = adjacent([first, second])
    assert view is not None and torch.equal(view, torch.cat([first, second]))


def test_gradients_of_one_row_of_several_sequences_add_up():
    torch.manual_seed(0)
    accumulator = Accumulator(Piece("dkv", 0, 0, 1), torch.empty(3, 1, 2, 4, dtype=torch.bfloat16), 3, parts=2)
    expected = torch.zeros(2, 3, 1, 2, 4, dtype=torch.float64)
    for _ in range(3):
        both = torch.randn(2, 3, 1, 2, 4).bfloat16()
        expected += both
        accumulator.add(0, 1, *(part.transpose(0, 1) for part in both))
    torch.testing.assert_close(torch.stack(accumulator.result()).double(), expected, rtol=2**-8, atol=1e-6)
