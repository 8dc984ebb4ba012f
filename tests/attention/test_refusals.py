"""Bad input: an error that teaches, on every rank, before anything is sent. Nobody hangs."""

from __future__ import annotations

from collections.abc import Callable
from threading import get_ident
from typing import Any

import pytest
import torch
from torch import Tensor

import ringspan
from ringspan.attention import checks
from ringspan.errors import RingspanError, UnsupportedError
from ringspan.geometry import sliding_window
from ringspan.kernels.torch_kernels import TorchCpu
from ringspan.transport import SingleRank

RANKS = 3
LENGTH = 12
WAIT = 20.0


def shapes(rows: int = LENGTH // RANKS, heads: int = 4, kv_heads: int = 2, head_dim: int = 8, dtype: torch.dtype = torch.float32) -> list:
    return [torch.zeros(2, rows, count, head_dim, dtype=dtype) for count in (heads, kv_heads, kv_heads)]


def every_rank(function: Callable[[Any], Any], ranks: int = RANKS) -> list[tuple[str, int]]:
    """What each rank raised, and how many bytes it had sent by then. A rank that raises nothing, or something else, fails the test."""

    def run(group: Any) -> tuple[str, int]:
        with pytest.raises(RingspanError) as caught:
            function(group)
        return str(caught.value), sum(group.bytes_sent.values())

    return ringspan.run_in_process(ranks, run, timeout_seconds=WAIT)


def attention_with(change: Callable[[list], Any], on: int = 1) -> Callable[[Any], None]:
    """Attention for which rank `on` changes its tensors or keywords."""

    def function(group: Any) -> None:
        sequence = ringspan.ContextParallel(group).sequence(LENGTH)
        tensors: list = shapes()
        keywords: dict = {}
        if group.rank == on:
            changed = change(tensors)
            tensors, keywords = changed if isinstance(changed, tuple) else (changed, {})
        sequence.attention(*tensors, **keywords)

    return function


ON_ONE_RANK: dict[str, tuple[Callable[[list], Any], str]] = {
    "too few positions": (lambda x: shapes(rows=3), "rank 1 owns 4 positions"),
    "heads before positions": (lambda x: [tensor.transpose(1, 2) for tensor in x], "do not belong together"),
    "three dimensions": (lambda x: [tensor[0] for tensor in x], "do not belong together"),
    "no dimension at all": (lambda x: [torch.zeros(()), *x[1:]], "do not belong together"),
    "keys longer than queries": (lambda x: [x[0], *(torch.zeros(2, 5, 2, 8) for _ in range(2))], "do not belong together"),
    "values unlike keys": (lambda x: [*x[:2], torch.zeros(2, 4, 2, 4)], "do not belong together"),
    "key heads that divide nothing": (lambda x: shapes(kv_heads=3), "KV heads divide query heads"),
    "no key heads": (lambda x: shapes(kv_heads=0), "KV heads"),
    "heads of no width": (lambda x: shapes(head_dim=0), "heads of 0|KV heads of 0"),
    "keys of another dtype": (lambda x: [x[0], x[1].double(), x[2]], "one floating-point dtype"),
    "whole numbers": (lambda x: [tensor.long() for tensor in x], "one floating-point dtype"),
    "keys on another device": (lambda x: [x[0], x[1].to("meta"), x[2].to("meta")], "one device"),
    "a scale that is no number": (lambda x: (x, {"scale": float("nan")}), "finite"),
    "a scale that is a word": (lambda x: (x, {"scale": "large"}), "finite"),
    "a softcap of zero": (lambda x: (x, {"softcap": 0.0}), "above 0"),
    "sinks for other heads": (lambda x: (x, {"sinks": torch.zeros(3)}), "one score a query head"),
    "complex sinks": (lambda x: (x, {"sinks": torch.zeros(4, dtype=torch.complex64)}), "one score a query head"),
    "sparse queries": (lambda x: [x[0].to_sparse(), *x[1:]], "dense tensors"),
    "a list for whether lse is returned": (lambda x: (x, {"return_lse": []}), "return_lse=[]"),
}


@pytest.mark.parametrize("name", ON_ONE_RANK)
def test_one_rank_asks_for_what_cannot_be_and_every_rank_is_told_before_anything_is_sent(name: str):
    change, message = ON_ONE_RANK[name]
    said = every_rank(attention_with(change))
    assert any(alternative in said[1][0] for alternative in message.split("|")), said[1][0]
    assert all("rank 1" in text for text, _ in (said[0], said[2])), said
    assert all(sent == 0 for _, sent in said)


UNLIKE: dict[str, tuple[Callable[[list], Any], str]] = {
    "another batch": (lambda x: [torch.zeros(3, *tensor.shape[1:]) for tensor in x], "batch=3"),
    "other heads": (lambda x: shapes(heads=8), "heads=8"),
    "other key heads": (lambda x: shapes(kv_heads=4), "kv_heads=4"),
    "other widths": (lambda x: shapes(head_dim=16), "head_dim=16"),
    "another dtype": (lambda x: shapes(dtype=torch.bfloat16), "bfloat16"),
    "another device": (lambda x: [tensor.to("meta") for tensor in x], "meta"),
    "another scale": (lambda x: (x, {"scale": 0.25}), "scale=0.25"),
    "a softcap": (lambda x: (x, {"softcap": 30.0}), "softcap=30"),
    "sinks": (lambda x: (x, {"sinks": torch.zeros(4)}), "sinks=True"),
}


@pytest.mark.parametrize("name", UNLIKE)
@pytest.mark.parametrize("on", [0, 2])
def test_ranks_that_bring_unlike_tensors_are_all_told_before_anything_is_sent(name: str, on: int):
    change, message = UNLIKE[name]
    said = every_rank(attention_with(change, on))
    assert all(message in text for text, _ in said), said
    assert all(sent == 0 for _, sent in said)


DISAGREE: dict[str, tuple[Callable[[Any], Any], str]] = {
    "the length": (lambda group: ringspan.ContextParallel(group).sequence(12 + (group.rank == 2)), "length=13"),
    "the mask": (
        lambda group: ringspan.ContextParallel(group).sequence(12, (ringspan.causal(), ringspan.full())[group.rank == 1]),
        "mask=full",
    ),
    "the width of the window": (lambda group: ringspan.ContextParallel(group).sequence(12, sliding_window(3 + group.rank)), "window"),
    "the strategy": (lambda group: ringspan.ContextParallel(group, strategy="all_gather" if group.rank else "ring"), "all_gather"),
    "an option of the strategy": (
        lambda group: ringspan.ContextParallel(group, strategy="all_gather", stages=1 + (group.rank == 2)),
        "stages",
    ),
    "the layout": (lambda group: ringspan.ContextParallel(group, layout="striped" if group.rank else "zigzag"), "striped"),
    "the weights": (lambda group: ringspan.ContextParallel(group, layout="weighted", weights=(1.0, 1.0, 1.0 + group.rank)), "weights"),
    "the kernel": (lambda group: ringspan.ContextParallel(group, kernel="reference" if group.rank else "auto"), "reference"),
    "whether a backward comes": (
        lambda group: ringspan.ContextParallel(group).sequence(12).attention(*(torch.zeros(1, 4, 2, 4, requires_grad=group.rank < 2),) * 3),
        "gradients=False",
    ),
    "a gradient of what is unsharded": (
        lambda group: ringspan.ContextParallel(group).sequence(12).unshard(torch.zeros(1, 4, requires_grad=group.rank == 1)),
        "gradient=True",
    ),
    "the shape to unshard": (
        lambda group: ringspan.ContextParallel(group).sequence(12).unshard(torch.zeros(1, 4, 5 + (group.rank == 1))),
        "other sizes",
    ),
}


def test_a_capture_is_no_first_call_and_one_without_gradients_is_another(monkeypatch: pytest.MonkeyPatch):
    captured: dict[int, bool] = {}
    monkeypatch.setattr(checks, "is_captured", lambda device: captured[get_ident()])

    def run(group: Any) -> tuple[Tensor, Tensor, str]:
        sequence = ringspan.ContextParallel(group).sequence(LENGTH)
        leaves = [tensor.requires_grad_() for tensor in shapes()]
        captured[get_ident()] = False
        first = sequence.attention(*leaves)
        captured[get_ident()] = True
        again, sent = sequence.attention(*leaves), sum(group.bytes_sent.values())
        with pytest.raises(RingspanError) as caught, torch.no_grad():
            sequence.attention(*leaves)
        assert sum(group.bytes_sent.values()) == sent
        return first, again, str(caught.value)

    for first, again, said in ringspan.run_in_process(RANKS, run, timeout_seconds=WAIT):
        assert torch.equal(first, again)
        assert "no such call before" in said
        assert "gradients=False" in said


def test_the_first_decode_is_not_in_a_capture_either(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checks, "is_captured", lambda device: True)
    said = every_rank(lambda group: ringspan.ContextParallel(group).decode(*shapes(rows=1)))
    assert all("decode captured in a CUDA graph" in text for text, _ in said), said


def test_one_rank_has_nobody_to_agree_with_before_a_capture(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checks, "is_captured", lambda device: True)
    out = ringspan.ContextParallel(SingleRank()).sequence(LENGTH).attention(*shapes(rows=LENGTH))
    assert out.shape == (2, LENGTH, 4, 8)


@pytest.mark.parametrize("name", DISAGREE)
def test_ranks_that_disagree_are_all_told_about(name: str):
    function, message = DISAGREE[name]
    said = every_rank(function)
    assert all(message in text for text, _ in said), said
    assert all(sent == 0 for _, sent in said)


WRONG: dict[str, tuple[Callable[[Any], Any], str]] = {
    "strategy": (lambda group: ringspan.ContextParallel(group, strategy="rings"), "the strategies are"),
    "layout": (lambda group: ringspan.ContextParallel(group, layout="spiral"), "the layouts are"),
    "kernel": (lambda group: ringspan.ContextParallel(group, kernel="fast"), "the kernels are"),
    "option": (lambda group: ringspan.ContextParallel(group, strategy="ring", stages=2), "stages"),
    "value of an option": (lambda group: ringspan.ContextParallel(group, strategy="all_gather", stages="two"), "stages"),
    "weights without layout weighted": (lambda group: ringspan.ContextParallel(group, weights=(1.0, 1.0, 1.0)), "Only 'weighted'"),
    "no weights at all": (lambda group: ringspan.ContextParallel(group, layout="weighted", weights=()), "0 weights"),
    "number of weights": (lambda group: ringspan.ContextParallel(group, layout="weighted", weights=(1.0,)), "one finite weight"),
    "length zero": (lambda group: ringspan.ContextParallel(group).sequence(0), "at least 1"),
    "length below zero": (lambda group: ringspan.ContextParallel(group).sequence(-5), "at least 1"),
    "length that is no whole number": (lambda group: ringspan.ContextParallel(group).sequence(4.5), "whole number"),
    "length that is a truth": (lambda group: ringspan.ContextParallel(group).sequence(True), "whole number"),
    "mask that is a word": (lambda group: ringspan.ContextParallel(group).sequence(8, "causal"), "A mask is a ringspan mask"),
    "documents of another length": (
        lambda group: ringspan.ContextParallel(group).sequence(8, ringspan.documents([0, 4])),
        "belongs to a document",
    ),
    "tensor to shard": (lambda group: ringspan.ContextParallel(group).sequence(8).shard(torch.zeros(1, 9)), "8 positions"),
    "a list to shard": (lambda group: ringspan.ContextParallel(group).sequence(2).shard([1, 2]), "is a tensor"),  # type: ignore[arg-type]
    "dim to shard": (lambda group: ringspan.ContextParallel(group).sequence(8).shard(torch.zeros(1, 8), dim=2), "dim 2"),
    "dim to unshard": (
        lambda group: ringspan.ContextParallel(group).sequence(12).unshard(torch.zeros(1, 4), dim="1"),  # type: ignore[arg-type]
        "with the sequence along dim '1'",
    ),
    "tensor to unshard": (
        lambda group: ringspan.ContextParallel(group).sequence(12).unshard(torch.zeros(1, 12)),
        "4 positions|12 tokens|owns",
    ),
    "a list to unshard": (
        lambda group: ringspan.ContextParallel(group).sequence(12).unshard([1] if group.rank else torch.zeros(1, 4)),  # type: ignore[arg-type]
        "of type list",
    ),
    "words for a softcap": (lambda group: ringspan.attention(*shapes(), softcap="", group=group), "softcap ''"),  # type: ignore[call-overload]
    "kernel for this machine": (
        lambda group: ringspan.ContextParallel(group, kernel="cudnn").sequence(12).attention(*shapes()),
        "it runs on cuda, and the tensors are on cpu",
    ),
    "kernel for a scale of zero": (
        lambda group: ringspan.ContextParallel(group, kernel="torch_cpu").sequence(12).attention(*shapes(), 0.0),
        "it computes no scale ≤ 0",
    ),
    "kernel for a scale below zero": (
        lambda group: ringspan.ContextParallel(group, kernel="torch_cpu").decode(*shapes(), -0.5),
        "it computes no scale ≤ 0",
    ),
    "kernel for softcap": (
        lambda group: ringspan.ContextParallel(group, kernel="torch_cpu").sequence(12).attention(*shapes(), softcap=5.0),
        "no softcap",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_all_ranks_are_refused_the(name: str):
    function, message = WRONG[name]
    said = every_rank(function)
    assert all(any(alternative in text for alternative in message.split("|")) for text, _ in said), said
    assert all(sent == 0 for _, sent in said)


@pytest.mark.parametrize("strategy", ["ring", "pass_query", "ulysses"])
def test_a_gradient_through_lse_is_refused_by_kernels_that_do_not_compute_it_and_never_dropped(
    strategy: str, monkeypatch: pytest.MonkeyPatch
):
    # As cuDNN does with heads of 128: the columns that carry the gradient do not fit.
    monkeypatch.setattr(TorchCpu, "refusal", lambda self, problem: f"heads of {problem.head_dim}" if problem.head_dim > 8 else None)

    def run(group: Any) -> str:
        sequence = ringspan.ContextParallel(group, strategy=strategy, kernel="torch_cpu").sequence(LENGTH)
        q, k, v = (tensor.requires_grad_() for tensor in shapes())
        out, lse = sequence.attention(q, k, v, return_lse=True)
        before = sequence.context.transport.bytes_sent.total()
        with pytest.raises(UnsupportedError, match=r"a gradient through lse with kernel 'torch_cpu': .* heads of 16"):
            (out.sum() + lse.sum()).backward()
        assert sequence.context.transport.bytes_sent.total() == before, "refused before anything is sent"
        return "refused"

    assert ringspan.run_in_process(RANKS, run, timeout_seconds=WAIT) == ["refused"] * RANKS


def test_an_lse_that_nobody_differentiates_costs_nothing():
    def run(group: Any) -> bool:
        sequence = ringspan.ContextParallel(group, kernel="torch_cpu").sequence(LENGTH)
        q, k, v = (tensor.requires_grad_() for tensor in shapes())
        out, _ = sequence.attention(q, k, v, return_lse=True)
        out.sum().backward()
        return q.grad is not None

    assert all(ringspan.run_in_process(RANKS, run, timeout_seconds=WAIT))


@pytest.mark.parametrize("labels", [(2, 5), (2, 4, 1), (1, 4)])
def test_a_loss_of_logits_and_labels_that_do_not_belong_together_is_refused(labels: tuple[int, ...]):
    said = every_rank(
        lambda group: ringspan.ContextParallel(group).sequence(LENGTH).loss(torch.zeros(2, 4, 7), torch.zeros(labels, dtype=torch.int64))
    )
    assert all("logits are [batch, shard, vocabulary]" in text for text, _ in said)


def test_errors_keep_their_parts_when_they_cross_a_process_border():
    import pickle

    error = UnsupportedError("asked", "found", "rule", "nearest")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is UnsupportedError and vars(again) == vars(error) and str(again) == "asked: found. rule. Try: nearest"


def test_weights_may_be_a_list_on_some_ranks_and_a_tuple_on_others():
    def run(group: Any) -> int:
        weights: Any = [0, 1, 3] if group.rank else (0, 1, 3)
        return ringspan.ContextParallel(group, layout="weighted", weights=weights).sequence(8).shard_length

    assert ringspan.run_in_process(3, run) == [0, 2, 6]


def test_auto_also_chooses_under_a_mask_that_allows_nothing():
    def run(group: Any) -> tuple[str, float]:
        sequence = ringspan.ContextParallel(group, strategy="auto").sequence(8, ringspan.block_sparse(4, [[0, 0], [0, 0]]))
        q = torch.randn(1, 4, 2, 8)
        out = sequence.attention(q, q, q)
        assert sequence.choice is not None
        return sequence.choice.reason, float(out.abs().sum())

    for reason, total in ringspan.run_in_process(2, run):
        assert "0 ms" in reason and "times as long" not in reason and total == 0


@pytest.mark.parametrize(
    ("asked", "nearest"), [("ulyses", "ulysses"), ("all-gather", "all_gather"), ("zzz", "ring"), (3, "ring"), (None, "ring")]
)
def test_a_name_that_there_is_not_is_answered_with_the_one_spelled_most_like_it(asked: Any, nearest: str):
    def run(group: Any) -> None:
        ringspan.ContextParallel(group, strategy=asked)

    with pytest.raises(RingspanError) as caught:
        ringspan.run_in_process(2, run)
    assert caught.value.nearest == f"strategy={nearest!r}"
