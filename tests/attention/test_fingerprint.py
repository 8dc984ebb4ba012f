"""Ranks that mean different functions by one name are told apart; those that mean the same one are not."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import and_masks

import ringspan
from ringspan.attention.fingerprint import describe_mask
from ringspan.errors import RingspanError
from ringspan.geometry import causal, documents, full, mask_mod
from tests.support.processes import results, run_processes

LENGTH, RANKS = 24, 3
WIDE, NARROW = (lambda b, h, q_idx, kv_idx, reach=reach: q_idx - kv_idx <= reach for reach in (5, 3))


def even(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return (q_idx + kv_idx) % 2 == 0


def near(window: int) -> Callable[..., Any]:
    """A closure over a number."""

    def f(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return q_idx - kv_idx <= window

    return f


def same_document(ids: torch.Tensor) -> Callable[..., Any]:
    """A closure over a tensor."""

    def f(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return ids[q_idx] == ids[kv_idx]

    return f


def joined(*functions: Callable[..., Any]) -> Callable[..., Any]:
    """A closure over functions, as torch's and_masks makes."""

    def f(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return torch.stack(torch.broadcast_tensors(*(function(b, h, q_idx, kv_idx) for function in functions))).all(0)

    return f


class Window:
    """An object that is called, and one whose method is."""

    def __init__(self, reach: int, owner: int = 0) -> None:
        self.reach, self.owner = reach, owner

    def __call__(self, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return q_idx - kv_idx <= self.reach

    def method(self, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return kv_idx - q_idx <= self.reach


def by_code(odd: bool) -> Callable[..., Any]:
    """Two functions of one name, from one line to the eye."""
    if odd:

        def f(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
            return (q_idx + kv_idx) % 2 == 1
    else:

        def f(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
            return (q_idx - kv_idx) % 2 == 1

    return f


def with_global(reach: int) -> Callable[..., Any]:
    """A function that reads a global of a module that is another on every rank."""
    module: dict[str, Any] = {"__name__": "masks"}
    exec(f"REACH = {reach}\ndef f(b, h, q_idx, kv_idx):\n    return q_idx - kv_idx <= REACH\n", module)
    return module["f"]


def with_helper(odd: bool) -> Callable[..., Any]:
    """A function that calls another of its module."""
    module: dict[str, Any] = {"__name__": "masks"}
    exec(f"def g(x):\n    return x % 2 == {int(odd)}\ndef f(b, h, q_idx, kv_idx):\n    return g(q_idx + kv_idx)\n", module)
    return module["f"]


def ids(last: int) -> torch.Tensor:
    return torch.tensor([0] * 10 + [1] * 13 + [last])


MAKE: dict[str, Callable[[bool], Callable[..., Any]]] = {
    "other code": by_code,
    "another number in a closure": lambda other: near(3 + other),
    "another tensor in a closure": lambda other: same_document(ids(1 + other)),
    "a tensor of another dtype": lambda other: same_document(ids(1).to(torch.int32 if other else torch.int64)),
    "another function in a closure": lambda other: joined(even, near(3 + other)),
    "functions joined by torch": lambda other: and_masks(even, near(3 + other)),
    "another default": lambda other: WIDE if other else NARROW,
    "another number in a partial": lambda other: functools.partial(Window.__call__, Window(3 + other)),
    "an object with another number": lambda other: Window(3 + other),
    "a method of an object with another number": lambda other: Window(3 + other).method,
    "another value of a global": lambda other: with_global(3 + other),
    "a helper with other code": with_helper,
}
"""A function that every rank makes anew; given True, another one of the same name."""


def told(function: Callable[[Any], Any]) -> list[str]:
    """What every rank is told; "went on" where it is told nothing."""

    def run(group: Any) -> str:
        try:
            function(group)
        except RingspanError as error:
            return str(error)
        return "went on"

    return ringspan.run_in_process(RANKS, run)


def differing(group: Any) -> list[str]:
    """Of each of `MAKE`, what this rank is told where the last rank means another function, and where all mean the same."""
    context, said = ringspan.ContextParallel(group), []
    for make in MAKE.values():
        for other in (context.rank == RANKS - 1, False):
            try:
                context.sequence(LENGTH, causal() & mask_mod(make(other)))
            except RingspanError as error:
                said.append(str(error))
            else:
                said.append("went on")
    return said


def check(said: list[list[str]]) -> None:
    for index, name in enumerate(MAKE):
        first, *others = (rank[2 * index] for rank in said)
        assert all(text == first for text in others), name
        assert "All ranks of a group ask for the same" in first and f"rank {RANKS - 1} has" in first and "mask_mod" in first, (name, first)
        assert [rank[2 * index + 1] for rank in said] == ["went on"] * RANKS, name


def test_two_functions_of_one_name_are_told_apart_and_one_function_made_on_every_rank_is_not():
    check(ringspan.run_in_process(RANKS, differing))


@pytest.mark.slow
def test_over_gloo_too(tmp_path: Path):
    check(results(run_processes(RANKS, "tests.attention.test_fingerprint:differing", tmp_path)))


def test_the_error_says_whether_code_or_values_differ():
    code, values = (describe_mask(mask_mod(make(False))) for make in (MAKE["other code"], MAKE["another number in a closure"]))
    other_code, other_values = (describe_mask(mask_mod(make(True))) for make in (MAKE["other code"], MAKE["another number in a closure"]))
    assert code.split(" values ")[0] != other_code.split(" values ")[0]
    assert values.split(" values ")[0] == other_values.split(" values ")[0] and values != other_values
    assert values.startswith("mask_mod near.<locals>.f (tests.attention.test_fingerprint, code ")


def test_what_a_function_does_not_read_does_not_count():
    def run(group: Any) -> None:
        cp = ringspan.ContextParallel(group)
        window = Window(3, owner=group.rank)
        for function in (window, window.method, functools.partial(even), torch.compile(even, backend="eager")):
            cp.sequence(LENGTH, mask_mod(function))
        # Devices and objects of other kinds are known by type.
        device, tensor = torch.device("cpu", group.rank), ids(1)

        def f(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
            return tensor.to(device)[q_idx] == tensor[kv_idx] + (0 if group is None else 1)

        cp.sequence(LENGTH, mask_mod(f))

    assert told(run) == ["went on"] * RANKS


def test_a_function_that_reads_itself_ends():
    def f(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return f is circle[0] and q_idx >= kv_idx

    circle: list[Any] = [f]
    circle.append(circle)
    assert describe_mask(mask_mod(f)) == describe_mask(mask_mod(f))


def test_masks_without_a_function_are_said_by_name_alone():
    for mask in (causal(), full(), causal() & documents([0, 5, LENGTH])):
        assert describe_mask(mask) == str(mask)
