"""Masks beside their meaning as a function of two positions, their tiles under every layout, and their text."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ringspan.errors import RingspanError
from ringspan.geometry import (
    MASKS,
    Mask,
    block_sparse,
    causal,
    depends_on_position,
    documents,
    full,
    mask_mod,
    parse_mask,
    prefix_lm,
    sliding_window,
    tiles,
)
from ringspan.verify import allowed_pairs
from tests.support.laws import count_pairs
from tests.support.masks import EXAMPLES
from tests.support.sizes import LAYOUT_NAMES, examples, layout_of, lengths, num_ranks


@pytest.mark.parametrize("name", EXAMPLES)
@examples(30)
@given(length=lengths, ranks=num_ranks, layout=st.sampled_from(LAYOUT_NAMES))
def test_the_tiles_of_all_blocks_hold_every_allowed_pair_once(name: str, length: int, ranks: int, layout: str):
    example, split = EXAMPLES[name], layout_of(layout, length, ranks)
    mask = example.make(length)
    every = [(q, k, tile) for q in range(ranks) for k in range(ranks) for tile in tiles(split, mask, q, k)]
    counts = count_pairs(split, every)
    allowed = example.allowed(length)
    if mask.mod is None:
        assert torch.equal(counts, allowed.long())
    else:
        assert counts.max() <= 1 and bool((counts[allowed] == 1).all())


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name != "mask_mod"])
@pytest.mark.parametrize("length", [1, 2, 13, 40])
def test_the_yardstick_of_verify_reads_masks_as_they_are_meant(name: str, length: int):
    assert torch.equal(allowed_pairs(EXAMPLES[name].make(length), length), EXAMPLES[name].allowed(length))


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name != "mask_mod"])
def test_a_mask_reads_back_from_its_name(name: str):
    mask = EXAMPLES[name].make(30)
    assert parse_mask(mask.name) == mask and str(mask) == mask.name


@pytest.mark.parametrize(
    "text", [*MASKS, "window:3", "window:3,1", "window:,2", "documents:3,4", "prefix:5", "blocks:4:10/11", "causal&window:7"]
)
def test_what_the_command_line_takes_is_read(text: str):
    assert isinstance(parse_mask(text), Mask)


class _Unhashable:
    """A function by content: which plan is whose could not be told."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Unhashable)

    def __call__(self, b, h, q_idx, kv_idx):
        return q_idx >= kv_idx


NO_MASKS = """triangle window window: window:x window:1,2,3 window:-1 documents: documents:0 prefix:-2 prefix blocks:4 blocks:0:1
blocks:4:10/1 blocks:2:1x/2l causal& causal:3"""


@pytest.mark.parametrize("text", ["", "causal causal", *NO_MASKS.split()])
def test_what_is_no_mask_is_refused_with_the_forms_that_there_are(text: str):
    with pytest.raises(RingspanError):
        parse_mask(text)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sliding_window(-1), "at least 0"),
        (lambda: sliding_window(2.5), "whole numbers"),  # type: ignore[arg-type]
        (lambda: sliding_window(3, -1), "at least 0"),
        (lambda: documents([1, 4]), "begin with 0"),
        (lambda: documents([0, 4, 4]), "rise"),
        (lambda: documents([0]), "begin with 0"),
        (lambda: documents(ids=[0, 1, 0]), "comes back"),
        (lambda: documents(), "one way"),
        (lambda: prefix_lm(-1), "at least 0"),
        (lambda: block_sparse(0, [[1]]), "at least one position"),
        (lambda: block_sparse(4, [[1, 0]]), "square"),
        (lambda: block_sparse(4, []), "square"),
        (lambda: mask_mod(3), "cannot be called"),  # type: ignore[arg-type]
        (lambda: mask_mod(_Unhashable()), "cannot be hashed"),
        (lambda: documents([0, 3, 8]).check_length(9), "Every position belongs to a document"),
        (lambda: block_sparse(4, [[1, 0], [1, 1]]).check_length(9), "Every position belongs to a block"),
        (lambda: (causal() & documents([0, 3])).check_length(4), "document"),
    ],
)
def test_a_mask_that_means_nothing_is_refused(make, message: str):
    with pytest.raises(RingspanError, match=message):
        make()


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_mask_that_does_not_depend_on_the_position_allows_the_same_one_token_further(name: str):
    mask = EXAMPLES[name].make(19)
    moves = all(region == "causal" or region == "full" or region.startswith("window") for region in mask.name.split("&"))
    assert depends_on_position(mask) == (not moves)
    if moves:
        allowed = EXAMPLES[name].allowed(19)
        assert torch.equal(allowed[1:, 1:], allowed[:-1, :-1])


def test_documents_are_the_same_from_borders_from_ids_and_from_a_tensor():
    assert documents([0, 3, 8]) == documents(ids=[4, 4, 4, 7, 7, 7, 7, 7]) == documents(torch.tensor([0, 3, 8], dtype=torch.int32))


def test_joining_masks_allows_what_both_allow():
    positions = torch.arange(20)
    q, k = positions.unsqueeze(1), positions
    joined = causal() & sliding_window(5, 3) & documents([0, 7, 20])
    wanted = (k <= q) & (q - k <= 5) & ((q >= 7) == (k >= 7))
    assert torch.equal(allowed_pairs(joined, 20), wanted)
    assert torch.equal(allowed_pairs(full() & causal(), 20), allowed_pairs(causal(), 20))
