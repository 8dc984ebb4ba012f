"""What the tests of the Hugging Face hook share: a small model's sizes, a rank's part of a batch, and what every rank says."""

from __future__ import annotations

from typing import Any

import pytest

import ringspan
from ringspan.errors import RingspanError
from tests.support.models import VOCABULARY, make_batch

BUDGET = 2e-6  # as in law 6: Hugging Face computes norms, rotations, eager softmax and its loss in float32

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "attn_implementation": "eager",
}


def on_each_rank(function: Any, ranks: int = 2) -> list[str]:
    """The RingspanError of each rank; the test fails where one has none."""

    def run(group: Any) -> str:
        with pytest.raises(RingspanError) as caught:
            function(group)
        return str(caught.value)

    return ringspan.run_in_process(ranks, run, timeout_seconds=20.0)


def part_of(group: Any, mask: ringspan.Mask | None = None, **batch: Any) -> dict[str, Any]:
    """A rank's part of a sequence of 12 tokens, and of `batch` all."""
    sequence = ringspan.ContextParallel(group).sequence(12, mask)
    return {**sequence.shard_batch({"input_ids": make_batch(1, 12)["input_ids"]}), **batch}
