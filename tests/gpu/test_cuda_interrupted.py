"""A step that an error ends on every rank, over NCCL, with parameters sharded: the next ones have their own gradients alone."""

from __future__ import annotations

import pytest

from tests.gpu.torchrun import printed_by_ranks

pytestmark = pytest.mark.gpu


def test_steps_after_one_that_was_given_up_have_their_own_gradients_alone():
    assert printed_by_ranks("interrupted_ranks.py", 2).count("gradients are off by") == 3
