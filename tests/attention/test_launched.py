"""A rank that a launcher started beside others computes nothing alone before it has joined them, or has said that it is alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import ringspan
from ringspan.compat import ring_flash_attn_func
from ringspan.errors import RingspanError
from ringspan.transport import SingleRank, make_transport
from tests.support.models import tiny_llama

Q, PACKED = torch.zeros(1, 4, 2, 8), torch.zeros(4, 2, 8)
CALLS: dict[str, Callable[[Any], Any]] = {
    "make_transport": make_transport,
    "ContextParallel": ringspan.ContextParallel,
    "attention": lambda group: ringspan.attention(Q, Q, Q, causal=True, group=group),
    "attention_varlen": lambda group: ringspan.attention_varlen(PACKED, PACKED, PACKED, [0, 4], [0, 4], group=group),
    "scaled_dot_product_attention": lambda group: ringspan.scaled_dot_product_attention(Q, Q, Q, group=group),
    "ring_flash_attn_func": lambda group: ring_flash_attn_func(Q, Q, Q, causal=True, group=group),
    "parallelize": lambda group: ringspan.parallelize(tiny_llama(), group),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_rank_that_was_launched_beside_others_and_has_not_joined_them_is_refused(name: str, monkeypatch: pytest.MonkeyPatch):
    call = CALLS[name]
    call(None)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(RingspanError, match=r"rank 1 of 3.*init_process_group\(\) first.*SingleRank\(\)"):
        call(None)
    # What it says works, and so do ranks that are threads of one process.
    call(SingleRank())
    ringspan.run_in_process(2, ringspan.ContextParallel)


@pytest.mark.parametrize(("rank", "ranks"), [("0", "1"), ("", "3"), ("0", ""), ("0", "many")])
def test_an_environment_that_tells_of_no_other_ranks_leaves_a_rank_alone(rank: str, ranks: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", ranks)
    assert make_transport(None).size == ringspan.ContextParallel().num_ranks == 1
