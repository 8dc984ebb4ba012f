"""Bad input to every strategy and mask: an error that teaches, on every rank, before a byte is sent. Nobody waits for another."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ringspan
from ringspan.errors import RingspanError
from ringspan.geometry import block_sparse, causal, documents, full, mask_mod, prefix_lm, sliding_window
from ringspan.strategies import STRATEGIES
from tests.support.processes import results, run_processes

RANKS, LENGTH, WAIT = 4, 24, 10.0
ROWS = LENGTH // RANKS
EVERY = (*STRATEGIES, "auto")


def tensors(rows: int = ROWS, heads: int = 4, kv_heads: int = 2, head_dim: int = 8, dtype: torch.dtype = torch.float32) -> list[Any]:
    return [torch.zeros(1, rows, count, head_dim, dtype=dtype) for count in (heads, kv_heads, kv_heads)]


def said(function: Callable[[Any], Any], ranks: int = RANKS) -> list[str]:
    """What each rank was told; fails where one was told nothing, or something that does not teach, or where anything was sent."""

    def run(group: Any) -> str:
        with pytest.raises(RingspanError) as caught:
            function(group)
        assert not +group.bytes_sent, "something was sent"
        return str(caught.value)

    return ringspan.run_in_process(ranks, run, timeout_seconds=WAIT)


# ---- options ---------------------------------------------------------------------------------------------------------------------------

OPTIONS: dict[str, tuple[str, dict[str, Any], str]] = {
    "an inner ring that does not divide": ("double_ring", {"window": 3}, "4 has the divisors 1, 2, 4.*window=[24]"),
    "an inner ring of nothing": ("double_ring", {"window": 0}, "divisors.*window=1"),
    "an inner ring of more than there are": ("double_ring", {"window": 8}, "divisors.*window=4"),
    "no stage": ("all_gather", {"stages": 0}, "at least one stage.*stages=1"),
    "fewer stages than none": ("all_gather", {"stages": -1}, "at least one stage"),
    "no shard at once": ("direct", {"shards_at_once": 0}, "at least one.*shards_at_once=1"),
    "a direction of the ring that is none": ("ring", {"rotate": "values"}, "keys or queries"),
    "a degree that does not divide": ("two_dimensional", {"ulysses": 3}, "4 has the divisors 1, 2, 4"),
    "a degree of nothing": ("two_dimensional", {"ulysses": 0}, "divisors"),
    "a placement that is none": ("two_dimensional", {"placement": "diagonal"}, "head_first, context_first"),
    "an inner strategy that is none": ("two_dimensional", {"inner": "square"}, "the strategies are"),
    "an inner strategy of two dimensions": ("two_dimensional", {"inner": "ulysses"}, "two dimensions"),
    "itself inside": ("two_dimensional", {"inner": "two_dimensional"}, "two dimensions"),
    "auto inside": ("two_dimensional", {"inner": "auto"}, "the strategies are"),
    "options of auto": ("auto", {"stages": 2}, "auto without options"),
    "a strategy that is none": ("triangle", {}, "the strategies are ring, "),
    "a strategy that is no word": (["ring"], {}, "list"),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_rank_refuses(name: str):
    strategy, options, message = OPTIONS[name]
    told = said(lambda group: ringspan.ContextParallel(group, strategy=strategy, **options))
    assert len(set(told)) == 1
    assert re.search(message, told[0]), told[0]


@pytest.mark.parametrize("strategy", EVERY)
def test_an_option_that_a_strategy_does_not_take_is_named_with_those_that_it_takes(strategy: str):
    for text in said(lambda group: ringspan.ContextParallel(group, strategy=strategy, depth=2)):
        assert "depth" in text or "auto without options" in text


@pytest.mark.parametrize("value", ["2", 2.0, True, None, [2]], ids=repr)
@pytest.mark.parametrize(("strategy", "option"), [("all_gather", "stages"), ("double_ring", "window"), ("two_dimensional", "ulysses")])
def test_a_number_that_is_of_another_type_is_refused_and_not_converted(strategy: str, option: str, value: Any):
    if strategy != "all_gather" and value is None:
        pytest.skip("None leaves the choice to the strategy")
    for text in said(lambda group: ringspan.ContextParallel(group, strategy=strategy, **{option: value})):
        assert option in text and "of type int" in text


@pytest.mark.parametrize("value", [0, -1, 1.5, "2", True, [1]], ids=repr)
def test_a_stage_of_key_heads_is_a_whole_number_of_at_least_one(value: Any):
    for text in said(lambda group: ringspan.ContextParallel(group, kv_heads_per_stage=value)):
        assert "kv_heads_per_stage" in text


@pytest.mark.parametrize("weights", [5, ("a", 1, 1, 1), (1.0, -1.0, 1.0, 1.0), (0.0,) * 4, (float("nan"),) * 4, (1.0, 1.0)], ids=repr)
def test_weights_are_a_finite_number_a_rank(weights: Any):
    for text in said(lambda group: ringspan.ContextParallel(group, layout="weighted", weights=weights)):
        assert "weight" in text


def test_a_strategy_that_cannot_keep_a_layout_says_which_can():
    for text in said(lambda group: ringspan.ContextParallel(group, strategy="two_dimensional", layout="striped")):
        assert "placement='context_first' with 'striped'" in text


# ---- ranks that disagree ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", EVERY)
@pytest.mark.parametrize("on", [0, 3])
def test_ranks_that_disagree_about_the_strategy_are_all_told_both(strategy: str, on: int):
    other = "ring" if strategy != "ring" else "direct"
    for text in said(lambda group: ringspan.ContextParallel(group, strategy=strategy if group.rank == on else other)):
        assert f"strategy='{strategy}'" in text and f"strategy='{other}'" in text


DISAGREE: dict[str, tuple[Callable[[Any], Any], str]] = {
    "stages": (lambda group: ringspan.ContextParallel(group, strategy="all_gather", stages=1 + group.rank % 2), "stages"),
    "the inner ring": (lambda group: ringspan.ContextParallel(group, strategy="double_ring", window=1 + group.rank % 2), "window"),
    "what rotates": (lambda group: ringspan.ContextParallel(group, rotate=("keys", "queries")[group.rank % 2]), "rotate"),
    "the degree": (lambda group: ringspan.ContextParallel(group, strategy="two_dimensional", ulysses=2 + 2 * (group.rank == 3)), "ulysses"),
    "the placement": (
        lambda group: ringspan.ContextParallel(
            group, strategy="two_dimensional", placement=("head_first", "context_first")[group.rank == 2]
        ),
        "placement",
    ),
    "an option given and not given": (
        lambda group: ringspan.ContextParallel(group, strategy="all_gather", **({"stages": 1} if group.rank else {})),
        "stages",
    ),
    "the stages of heads": (lambda group: ringspan.ContextParallel(group, kv_heads_per_stage=1 + group.rank), "kv_heads_per_stage"),
    "a window": (lambda group: ringspan.ContextParallel(group).sequence(LENGTH, sliding_window(2 + group.rank)), "window:2,0"),
    "a window's right side": (lambda group: ringspan.ContextParallel(group).sequence(LENGTH, sliding_window(2, group.rank)), "window:2,1"),
    "borders": (
        lambda group: ringspan.ContextParallel(group).sequence(LENGTH, documents([0, 5 + (group.rank == 1), LENGTH])),
        "documents:6,18",
    ),
    "a prefix": (lambda group: ringspan.ContextParallel(group).sequence(LENGTH, prefix_lm(group.rank)), "prefix:1"),
    "blocks": (
        lambda group: ringspan.ContextParallel(group).sequence(LENGTH, block_sparse(12, [[1, group.rank == 3], [1, 1]])),
        "blocks:12:11/11",
    ),
    "the order of joining": (
        lambda group: ringspan.ContextParallel(group).sequence(LENGTH, causal() & full() if group.rank else full() & causal()),
        "full&causal",
    ),
    "a function": (
        lambda group: ringspan.ContextParallel(group).sequence(LENGTH, mask_mod(is_even) if group.rank else causal()),
        "mask_mod is_even",
    ),
}


def is_even(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return (q_idx + kv_idx) % 2 == 0


@pytest.mark.parametrize("name", DISAGREE)
def test_ranks_that_disagree_are_all_told_about(name: str):
    function, message = DISAGREE[name]
    assert all(message in text for text in said(function))


def attending(strategy: str, change: Callable[[list[Any]], Any], on: int) -> Callable[[Any], Any]:
    """Attention for which rank `on` changes its tensors, or adds keywords."""

    def function(group: Any) -> None:
        sequence = ringspan.ContextParallel(group, strategy=strategy).sequence(LENGTH)
        mine, keywords = tensors(), {}
        if group.rank == on:
            changed = change(mine)
            mine, keywords = changed if isinstance(changed, tuple) else (changed, {})
        sequence.attention(*mine, **keywords)

    return function


ON_ONE_RANK: dict[str, tuple[Callable[[list[Any]], Any], str]] = {
    "another dtype": (lambda x: tensors(dtype=torch.bfloat16), "torch.bfloat16"),
    "keys of another dtype": (lambda x: [x[0], x[1].half(), x[2]], "one floating-point dtype"),
    "another device": (lambda x: [each.to("meta") for each in x], "meta"),
    "values on another device": (lambda x: [*x[:2], x[2].to("meta")], "one device"),
    "other heads": (lambda x: tensors(heads=8), "heads=8"),
    "other key heads": (lambda x: tensors(kv_heads=1), "kv_heads=1"),
    "key heads that do not divide": (lambda x: tensors(kv_heads=3), "KV heads divide query heads"),
    "too many positions": (lambda x: tensors(rows=ROWS + 1), "owns 6 positions"),
    "a softcap": (lambda x: (x, {"softcap": 20.0}), "softcap"),
    "a scale": (lambda x: (x, {"scale": 0.5}), "scale=0.5"),
    "a scale that is a list": (lambda x: (x, {"scale": [0.5]}), "scale"),
    "sinks": (lambda x: (x, {"sinks": torch.zeros(4)}), "sinks"),
    "sinks that are a list": (lambda x: (x, {"sinks": [0.0] * 4}), "list"),
    "no keys": (lambda x: [x[0], None, x[2]], "NoneType"),
    "an array": (lambda x: [np.zeros(tuple(each.shape), np.float32) for each in x], "ndarray"),
}


@pytest.mark.parametrize("name", ON_ONE_RANK)
@pytest.mark.parametrize("strategy", EVERY)
def test_one_rank_brings_what_the_others_do_not_and_all_are_told(strategy: str, name: str):
    change, message = ON_ONE_RANK[name]
    on = (len(strategy) + len(name)) % RANKS
    told = said(attending(strategy, change, on))
    assert all(message in text for text in told), told


# ---- masks -----------------------------------------------------------------------------------------------------------------------------

MASKS: dict[str, tuple[Callable[[], Any], str]] = {
    "borders that do not rise": (lambda: documents([0, 9, 9, LENGTH]), "begin with 0, rise"),
    "borders that fall": (lambda: documents([0, 9, 5, LENGTH]), "begin with 0, rise"),
    "borders that begin later": (lambda: documents([1, 9, LENGTH]), "begin with 0, rise"),
    "a single border": (lambda: documents([0]), "begin with 0, rise"),
    "no borders": (lambda: documents([]), "begin with 0, rise"),
    "borders in halves": (lambda: documents([0, 4.5, LENGTH]), "whole numbers"),
    "borders in words": (lambda: documents(["0", "9"]), "whole numbers"),
    "a tensor of halves": (lambda: documents(torch.tensor([0, 4.5, LENGTH])), "whole numbers"),
    "borders in two rows": (lambda: documents(torch.tensor([[0, 9], [9, LENGTH]])), "whole numbers"),
    "a lone number": (lambda: documents(9), "whole numbers"),
    "ids that come back": (lambda: documents(ids=[0, 0, 1, 0]), "stand together"),
    "ids in two rows": (lambda: documents(ids=torch.zeros(2, 3)), "whole numbers"),
    "no ids": (lambda: documents(ids=[]), "begin with 0, rise"),
    "ids and borders": (lambda: documents([0, LENGTH], ids=[0] * LENGTH), "one way"),
    "neither": (lambda: documents(), "one way"),
    "a window below nothing": (lambda: sliding_window(-1), "at least 0"),
    "a window in halves": (lambda: sliding_window(1.5), "whole numbers"),
    "a prefix below nothing": (lambda: prefix_lm(-1), "at least 0"),
    "a pattern that is not square": (lambda: block_sparse(4, [[1, 0]]), "square"),
    "a pattern in one row": (lambda: block_sparse(4, [1, 0]), "square"),
    "blocks of nothing": (lambda: block_sparse(0, [[1]]), "at least one position"),
    "blocks in halves": (lambda: block_sparse(2.5, [[1]]), "at least one position"),
    "blocks in words": (lambda: block_sparse("4", [[1]]), "at least one position"),
    "a function that is none": (lambda: mask_mod(5), "cannot be called"),
    "a mask joined with a word": (lambda: causal() & "full", "masks"),
    "a mask joined with a tensor": (lambda: causal() & torch.ones(3, 3, dtype=torch.bool), "masks"),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_cannot_be_made_of(name: str):
    make, message = MASKS[name]
    with pytest.raises(RingspanError, match=message):
        make()


MISFITS: dict[str, tuple[Callable[[], Any], str]] = {
    "documents that end early": (lambda: documents([0, 9, LENGTH - 1]), "Every position belongs to a document"),
    "documents that end late": (lambda: causal() & documents([0, LENGTH + 1]), "Every position belongs to a document"),
    "ids for another length": (lambda: documents(ids=[0] * 5), "Every position belongs to a document"),
    "blocks that end early": (lambda: block_sparse(4, [[1] * 5] * 5), "Every position belongs to a block"),
    "a misfit inside a joined mask": (lambda: sliding_window(3) & (causal() & documents([0, 5])), "Every position belongs to a document"),
    "a list": (lambda: [0, 9, LENGTH], "A mask is a ringspan mask"),
    "a tensor": (lambda: torch.ones(LENGTH, LENGTH, dtype=torch.bool), "A mask is a ringspan mask"),
}


@pytest.mark.parametrize("name", MISFITS)
@pytest.mark.parametrize("on", [None, 2])
def test_a_mask_that_does_not_fit_the_sequence_is_refused_on_every_rank(name: str, on: int | None):
    make, message = MISFITS[name]
    told = said(lambda group: ringspan.ContextParallel(group).sequence(LENGTH, make() if on in (None, group.rank) else causal()))
    assert all(message in text for text in told), told


MODS: dict[str, tuple[Callable[..., Any], str]] = {
    "takes two arguments": (lambda q_idx, kv_idx: q_idx >= kv_idx, "positional argument"),
    "returns scores": (lambda b, h, q_idx, kv_idx: (q_idx - kv_idx).float(), "float32"),
    "returns a number": (lambda b, h, q_idx, kv_idx: 1, "int"),
    "returns nothing": (lambda b, h, q_idx, kv_idx: None, "NoneType"),
    "returns another shape": (lambda b, h, q_idx, kv_idx: torch.ones(7, 7, dtype=torch.bool), "(7, 7)"),
    "breaks": (lambda b, h, q_idx, kv_idx: {}["positions"], "KeyError"),
    "looks up fewer positions than there are": (lambda b, h, q_idx, kv_idx: torch.ones(LENGTH - 1, dtype=torch.bool)[kv_idx], "IndexError"),
    "looks up fewer heads than there are": (lambda b, h, q_idx, kv_idx: torch.ones(3, dtype=torch.bool)[h], "IndexError"),
    "returns one truth for all": (lambda b, h, q_idx, kv_idx: torch.tensor(True), "it returns ()"),
}


@pytest.mark.parametrize("strategy", ["ring", "pass_query", "ulysses", "ring_self_attention"])
@pytest.mark.parametrize("name", MODS)
def test_a_mask_mod_is_tried_before_anything_is_sent_and_refused_where_it(name: str, strategy: str):
    function, message = MODS[name]
    told = said(lambda group: ringspan.ContextParallel(group, strategy=strategy).sequence(LENGTH, mask_mod(function)).attention(*tensors()))
    assert all(message in text for text in told), told


# ---- decoding --------------------------------------------------------------------------------------------------------------------------

DECODING: dict[str, tuple[Callable[[list[Any]], Any], str]] = {
    "other heads": (lambda x: tensors(heads=8), "heads=8"),
    "another dtype": (lambda x: tensors(dtype=torch.float64), "float64"),
    "keys of another dtype": (lambda x: [x[0], x[1].double(), x[2]], "one floating-point dtype"),
    "key heads that do not divide": (lambda x: tensors(kv_heads=3), "KV heads divide query heads"),
    "a gradient": (lambda x: [x[0].requires_grad_(), *x[1:]], "no backward"),
    "fewer queries": (lambda x: [x[0][:, :2], *x[1:]], "q (1, 2, 4, 8)"),
}


@pytest.mark.parametrize("name", DECODING)
def test_one_rank_decodes_what_the_others_do_not_and_all_are_told(name: str):
    change, message = DECODING[name]

    def function(group: Any) -> None:
        context = ringspan.ContextParallel(group)
        context.decode(*(change(tensors()) if group.rank == 1 else tensors()))

    assert all(message in text for text in said(function))


# ---- real processes --------------------------------------------------------------------------------------------------------------------


def refused_over_gloo(group: Any) -> list[str]:
    """Called in each process: what it was told, one thing after the other; the group goes on working."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    rank = dist.get_rank(group)
    attempts: list[Callable[[], Any]] = [
        lambda: ringspan.ContextParallel(init_device_mesh("cpu", (3, 1), mesh_dim_names=("context", "data"))),
        lambda: ringspan.ContextParallel(group, strategy="double_ring", window=2),
        lambda: ringspan.ContextParallel(group, strategy="two_dimensional", ulysses=2),
        lambda: ringspan.ContextParallel(group, strategy="all_gather", stages=rank),
        lambda: ringspan.ContextParallel(group, layout="weighted", weights=5 if rank == 1 else (1.0,) * 3),  # type: ignore[arg-type]
        lambda: ringspan.ContextParallel(group).sequence(12, [1] if rank else causal()),  # type: ignore[arg-type]
        lambda: ringspan.ContextParallel(group).sequence(12).attention(*tensors(4 + (rank == 2))),
        lambda: ringspan.ContextParallel(group).decode(*tensors(4, heads=4 + 4 * (rank == 2))),
    ]
    told = []
    for attempt in attempts:
        with pytest.raises(RingspanError) as caught:
            attempt()
        told.append(str(caught.value))
    ringspan.ContextParallel(group).sequence(12).attention(*tensors(4))
    return told


def test_between_processes_every_rank_is_told_and_the_group_goes_on(tmp_path: Path):
    by_attempt = zip(*results(run_processes(3, f"{__name__}:refused_over_gloo", tmp_path, group_timeout=20.0, timeout=60.0)), strict=True)
    words = ("axes", "divisors 1, 3", "divisors 1, 3", "stage", "weight", "mask", "owns 4 positions", "heads=8")
    for told, word in zip(by_attempt, words, strict=True):
        assert all(word in text for text in told), told
