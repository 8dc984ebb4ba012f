"""The tiled loss is the loss of whole logits, with its gradients, and no tensor is as large as a shard's logits."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import ringspan
from ringspan.errors import RingspanError
from ringspan.transformer import LossTerms, cross_entropy_of_logits, tiled_cross_entropy, tiled_loss
from tests.support.errors import relative
from tests.transformer.test_blockwise import widest

VOCABULARY, HIDDEN, LENGTH = 37, 8, 13
BUDGETS = {torch.float64: 1e-14, torch.float32: 1e-6}
TERMS = {
    "plain": LossTerms(),
    "smoothing": LossTerms(label_smoothing=0.2),
    "z": LossTerms(z_loss=0.03),
    "softcap": LossTerms(softcap=2.0),
    "multiplier": LossTerms(multiplier=0.3),
    "all": LossTerms(label_smoothing=0.1, z_loss=0.02, softcap=3.0, multiplier=1.7),
}


def make(dtype: torch.dtype, bias: bool = False) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = {"hidden": (2, LENGTH, HIDDEN), "weight": (VOCABULARY, HIDDEN), **({"bias": (VOCABULARY,)} if bias else {})}
    tensors = {name: torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for name, size in sizes.items()}
    labels = torch.randint(VOCABULARY, (2, LENGTH), generator=generator)
    labels[0, 3:6] = -100
    return tensors, labels


def plain(tensors: dict[str, Tensor], labels: Tensor, terms: LossTerms) -> Tensor:
    """The formula in torch's own functions."""
    x = F.linear(tensors["hidden"], tensors["weight"], tensors.get("bias")) * terms.multiplier
    if terms.softcap is not None:
        x = torch.tanh(x / terms.softcap) * terms.softcap
    x, flat = x.flatten(0, 1), labels.flatten()
    total = F.cross_entropy(x, flat, label_smoothing=terms.label_smoothing, reduction="sum")
    return total + terms.z_loss * (torch.logsumexp(x, -1)[flat != -100] ** 2).sum()


def with_gradients(loss_of: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    loss = loss_of(leaves)
    loss.backward()
    return {"loss": loss.detach(), **{name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}}


def check(terms: LossTerms, tile: int, dtype: torch.dtype, bias: bool) -> None:
    tensors, labels = make(dtype, bias)
    expected = with_gradients(lambda given: plain(given, labels, terms) * 0.25, tensors)
    found = with_gradients(lambda given: tiled_cross_entropy(labels=labels, tile=tile, scale=0.25, terms=terms, **given), tensors)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and relative(found[name], tensor) <= BUDGETS[dtype], name


@pytest.mark.parametrize("dtype", BUDGETS, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("tile", [1, 5, 26, 1000])
@pytest.mark.parametrize("terms", TERMS)
def test_the_loss_and_every_gradient_are_those_of_whole_logits(terms: str, tile: int, bias: bool, dtype: torch.dtype):
    check(TERMS[terms], tile, dtype, bias)


def test_it_fails_where_the_slope_of_the_softcap_is_forgotten(monkeypatch: pytest.MonkeyPatch):
    module = sys.modules["ringspan.transformer.tiled_loss"]
    right = module._tile

    def wrong(raw: Tensor, labels: Tensor, factor: Tensor, terms: LossTerms, with_gradient: bool) -> Any:
        capped = torch.tanh(raw * terms.multiplier / terms.softcap) * terms.softcap
        return right(capped, labels, factor, LossTerms(label_smoothing=terms.label_smoothing, z_loss=terms.z_loss), with_gradient)

    monkeypatch.setattr(module, "_tile", wrong)
    with pytest.raises(AssertionError):
        check(TERMS["softcap"], 5, torch.float64, False)


@pytest.mark.parametrize("terms", [TERMS["plain"], TERMS["z"], TERMS["smoothing"]], ids=["plain", "z", "smoothing"])
def test_logits_that_are_there_already_give_the_same(terms: LossTerms):
    tensors, labels = make(torch.float64)
    expected = with_gradients(lambda given: plain(given, labels, terms) / 3, tensors)
    found = with_gradients(lambda given: cross_entropy_of_logits(F.linear(**_linear(given)), labels, 1 / 3, terms), tensors)
    assert all(relative(found[name], expected[name]) <= 1e-14 for name in expected)


def _linear(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"input": given["hidden"], "weight": given["weight"]}


@pytest.mark.parametrize("terms", TERMS)
def test_a_kernel_that_works_in_the_logits_place_gives_the_same(terms: str, monkeypatch: pytest.MonkeyPatch):
    module = sys.modules["ringspan.transformer.tiled_loss"]
    seen = []

    def in_place(logits: Tensor, labels: Tensor, factor: Tensor, *, with_gradient: bool, **how: Any) -> Tensor:
        seen.append(with_gradient)
        found = module._tile(logits.clone(), labels, factor, LossTerms(**how), with_gradient)
        # What they were is lost.
        logits.copy_(found.gradient) if with_gradient else logits.fill_(torch.nan)
        return found.loss

    monkeypatch.setattr(module, "_can_be_fused", lambda raw, bias: bias is None)
    monkeypatch.setattr(module, "_fused", lambda: in_place)
    check(TERMS[terms], 5, torch.float64, False)
    tensors, labels = make(torch.float64)
    expected = plain(tensors, labels, TERMS[terms])
    assert relative(tiled_cross_entropy(labels=labels, tile=5, terms=TERMS[terms], **tensors), expected) < 1e-14
    assert seen == [True] * 6 + [False] * 6


def test_logits_that_no_kernel_takes_are_left_to_torch():
    half, single = torch.zeros(2, 3, dtype=torch.bfloat16), torch.zeros(2, 3)
    can = sys.modules["ringspan.transformer.tiled_loss"]._can_be_fused
    assert not can(half, None) and not can(single, None), "these are on a CPU"


def test_frozen_weights_get_no_gradient_and_no_sum_is_held_for_them():
    tensors, labels = make(torch.float32)
    hidden = tensors["hidden"].requires_grad_()
    loss = tiled_cross_entropy(hidden, tensors["weight"], labels, tile=1)
    assert loss.grad_fn.gradients[1:] == (None, None)  # type: ignore[union-attr]
    loss.backward()
    assert hidden.grad is not None and tensors["weight"].grad is None


@pytest.mark.parametrize("within", [torch.no_grad, torch.inference_mode])
def test_where_nothing_is_learned_no_gradient_is_made(within: Any):
    tensors, labels = make(torch.float32)
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    products, losses = [], []
    for context in (nullcontext, within):
        with context(), Operations() as counted:
            losses.append(tiled_cross_entropy(labels=labels, tile=5, **leaves))
        products.append(counted.products)
    assert products == [3 * 6, 6], "of six tiles: logits, and the gradients of hidden and weight"
    assert not losses[1].requires_grad and torch.equal(*losses)


class Operations(TorchDispatchMode):
    """Counts products of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += func.overloadpacket.__name__ in ("mm", "addmm", "addmm_", "linear")
        return func(*args, **(kwargs or {}))


def test_a_sequence_without_labels_costs_nothing_and_leaves_zeros():
    tensors, labels = make(torch.float64)
    found = with_gradients(lambda given: tiled_cross_entropy(labels=labels.fill_(-100), tile=4, **given), tensors)
    assert all(float(tensor.abs().sum()) == 0 for tensor in found.values())


def test_no_tensor_is_as_large_as_a_shards_logits():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 4, generator=generator).requires_grad_()
    sizes = []
    for length in (100, 400):
        hidden = torch.randn(1, length, 4, generator=generator).requires_grad_()
        labels = torch.randint(96, (1, length), generator=generator)
        sizes.append(widest(lambda: tiled_cross_entropy(hidden, weight, labels, tile=10).backward()))  # noqa: B023
    assert sizes == [10 * 96, 4 * 400], "a tile's logits, and at 400 tokens the hidden states themselves"


def test_gradients_in_bfloat16_do_not_worsen_with_more_tiles():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(size, generator=generator).bfloat16() for size in ((1, 900, HIDDEN), (VOCABULARY, HIDDEN)))
    labels = torch.randint(VOCABULARY, (1, 900), generator=generator)
    exact = with_gradients(lambda given: plain(given, labels, LossTerms()) / 900, {"hidden": hidden.double(), "weight": weight.double()})[
        "weight"
    ]
    errors = {}
    for tile in (900, 9):
        errors[tile] = relative(
            with_gradients(
                lambda given: tiled_cross_entropy(labels=labels, tile=tile, scale=1 / 900, **given),  # noqa: B023
                {"hidden": hidden, "weight": weight},
            )["weight"],
            exact,
        )
    assert errors[9] <= 1.1 * errors[900] and errors[900] < 4e-3, errors


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("terms", ["plain", "all"])
def test_over_ranks_it_is_the_whole_sequences_mean(terms: str, ranks: int):
    tensors, labels = make(torch.float64)
    count = int((labels != -100).sum())
    expected = with_gradients(lambda given: plain(given, labels, TERMS[terms]) / count, tensors)

    def run(group: Any) -> tuple[dict[str, Tensor], Tensor]:
        sequence = ringspan.ContextParallel(group).sequence(LENGTH)
        mine = {"hidden": sequence.shard(tensors["hidden"]), "weight": tensors["weight"]}
        found = with_gradients(lambda given: tiled_loss(sequence, labels=sequence.shard(labels), tile=3, terms=TERMS[terms], **given), mine)
        return found, sequence.unshard(found["hidden"])

    results = ringspan.run_in_process(ranks, run)
    for found, whole in results:
        assert relative(found["loss"], expected["loss"]) <= 1e-14
        assert relative(whole, expected["hidden"]) <= 1e-14
    assert relative(torch.stack([found["weight"] for found, _ in results]).sum(0), expected["weight"]) <= 1e-14


def test_it_equals_the_loss_of_the_sequence():
    tensors, labels = make(torch.float64)

    def run(group: Any) -> tuple[Tensor, Tensor]:
        sequence = ringspan.ContextParallel(group).sequence(LENGTH)
        hidden, mine = sequence.shard(tensors["hidden"]), sequence.shard(labels)
        return sequence.loss(hidden @ tensors["weight"].T, mine), tiled_loss(sequence, hidden, tensors["weight"], mine, tile=4)

    for whole, tiled in ringspan.run_in_process(2, run):
        assert relative(tiled, whole) <= 1e-15


def test_a_loss_that_one_rank_cannot_compute_is_refused_on_every_rank():
    tensors, labels = make(torch.float64)

    def run(group: Any) -> str:
        sequence = ringspan.ContextParallel(group).sequence(LENGTH)
        hidden = sequence.shard(tensors["hidden"])
        with pytest.raises(RingspanError) as caught:
            tiled_loss(sequence, hidden[:, sequence.rank :], tensors["weight"], sequence.shard(labels), tile=4)
        return str(caught.value)

    assert all("the shapes do not belong together" in message for message in ringspan.run_in_process(2, run, timeout_seconds=20.0))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tile": 0}, "at least one token"),
        ({"terms": LossTerms(label_smoothing=1.0)}, "a share of 1"),
        ({"terms": LossTerms(z_loss=-1.0)}, "at least 0"),
        ({"terms": LossTerms(softcap=0.0)}, "above 0"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(changes: dict[str, Any], said: str):
    tensors, labels = make(torch.float32)
    with pytest.raises(RingspanError, match=said):
        tiled_cross_entropy(labels=labels, **{"tile": 4, **tensors, **changes})


def test_a_second_backward_is_refused():
    tensors, labels = make(torch.float32)
    loss = tiled_cross_entropy(tensors["hidden"].requires_grad_(), tensors["weight"], labels, tile=4)
    loss.backward(retain_graph=True)
    with pytest.raises(RingspanError, match="computing the loss again"):
        loss.backward()


def test_a_gradient_of_a_gradient_is_refused_and_not_made_up():
    tensors, labels = make(torch.float32)
    hidden = tensors["hidden"].requires_grad_()
    loss = tiled_cross_entropy(hidden, tensors["weight"], labels, tile=4)
    for wanted in (loss, loss.square()):
        with pytest.raises(RingspanError, match="create_graph=True"):
            torch.autograd.grad(wanted, hidden, create_graph=True, retain_graph=True)
