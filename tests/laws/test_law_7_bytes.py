"""Law 7: bytes that the transport counted equal the bytes that the schedule promised, on every link."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ringspan.schedule import PieceBytes
from ringspan.strategies import STRATEGIES
from tests.support.laws import check_bytes
from tests.support.masks import EXAMPLES
from tests.support.sizes import LAYOUT_NAMES, examples, lengths, num_ranks, shapes, unless_refused
from tests.support.split import Split


@pytest.mark.parametrize("strategy", STRATEGIES)
@examples(15)
@given(
    length=lengths, ranks=num_ranks, layout=st.sampled_from(LAYOUT_NAMES), mask=st.sampled_from(list(EXAMPLES)), shape=shapes,
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]), with_dlse=st.booleans(),
)  # fmt: skip
def test_every_byte_that_is_sent_was_promised_and_every_promised_byte_is_sent(
    strategy: str, length: int, ranks: int, layout: str, mask: str, shape: dict[str, int], dtype: torch.dtype, with_dlse: bool
):
    # A gradient of lse rides beside dO where queries travel; the schedule speaks of attention whose lse nobody differentiates.
    with_dlse = with_dlse and strategy in ("ring", "all_gather", "double_ring", "direct", "ulysses")
    split = Split(num_ranks=ranks, mask=EXAMPLES[mask].make(length), strategy=strategy, layout=layout)
    with unless_refused(strategy, layout):
        check_bytes(split, length, dtype=dtype, with_dlse=with_dlse, **shape)


@pytest.mark.parametrize("mask", ["causal", "window"])
def test_a_contiguous_causal_ring_sends_nothing_to_ranks_that_read_nothing(mask: str):
    from tests.support.dense import make_tensors
    from tests.support.split import split_attention

    _, parts = split_attention(Split(num_ranks=4, mask=EXAMPLES[mask].make(64), layout="contiguous"), make_tensors(64))
    forward_links = {link for part in parts for link in part.sent if link[0] < link[1]}
    assert not any(part.sent.get((3, 0)) for part in parts[:3]), "no key of the last rank is read by another"
    assert forward_links == {(0, 1), (1, 2), (2, 3)}


def test_law_7_fails_where_keys_are_counted_as_if_they_were_expanded(monkeypatch: pytest.MonkeyPatch):
    right = PieceBytes.of
    monkeypatch.setattr(PieceBytes, "of", lambda self, kind: right(self, kind) * (2 if kind == "kv" else 1))
    with pytest.raises(AssertionError, match="promised"):
        check_bytes(Split(num_ranks=3, mask=EXAMPLES["causal"].make(16)), 16, heads=4, kv_heads=2)
