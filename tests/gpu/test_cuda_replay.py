"""Attention that is replayed as CUDA graphs, over peer memory: the bits that launches give; over NCCL it is refused.

Before that heads are exchanged through peer memory, to the bits that NCCL brings.
"""

from __future__ import annotations

import pytest

from tests.gpu.torchrun import printed_by_ranks

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("ranks", [2, 4])
def test_replays_give_the_bits_of_launches(ranks: int):
    assert "ulysses" in printed_by_ranks("replay_ranks.py", ranks), "the last of the ways"
