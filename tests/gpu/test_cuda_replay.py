"""Attention that is replayed as CUDA graphs, over NCCL and peer memory: the bits that launches give."""

from __future__ import annotations

import pytest

from tests.gpu.torchrun import printed_by_ranks

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("ranks", [2, 4])
def test_replays_give_the_bits_of_launches(ranks: int):
    assert "two heads at a time" in printed_by_ranks("replay_ranks.py", ranks), "the last of the ways"
