"""Positions that a model was not given, and makes by itself: refused where they are wrong. All others are the user's choice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import ringspan
from ringspan.attention.batch import SEQUENCE_KEYWORD
from ringspan.attention.positions import KnownTensors, position_problem
from ringspan.errors import RankFailure, RingspanError
from tests.support.models import make_batch, tiny_llama

LENGTH = 13
FORGOTTEN = "counts each rank's tokens from 0"


def without_positions(sequence: ringspan.Sequence) -> dict[str, Any]:
    """What the model is given, less what tells it where its tokens stand."""
    part = sequence.shard_batch({"input_ids": make_batch(1, sequence.length)["input_ids"]})
    return {key: part[key] for key in ("input_ids", SEQUENCE_KEYWORD)}


def said(call: Any) -> str:
    """What `call` is refused with, by its class and its words; nothing where it is not."""
    try:
        call()
    except RingspanError as error:
        return f"{type(error).__name__} {error}"
    return ""


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
def test_a_forward_that_is_given_no_positions_is_refused_on_every_rank_before_anything_is_sent(layout: str):
    model = tiny_llama("ringspan", dtype=torch.float32)

    def run(group: Any) -> tuple[str, int]:
        sequence = ringspan.ContextParallel(group, layout=layout).sequence(LENGTH)
        return said(lambda: model(**without_positions(sequence))), sum(group.bytes_sent.values())

    for message, sent in ringspan.run_in_process(3, run, timeout_seconds=20.0):
        # Also on rank 0 under contiguous, which cannot know it by itself.
        assert FORGOTTEN in message and "seq.shard_batch(batch)" in message and sent == 0


def test_where_the_shapes_are_known_a_rank_that_cannot_know_it_fails_as_when_another_dies():
    model = tiny_llama("ringspan", dtype=torch.float32)

    def run(group: Any) -> None:
        sequence = ringspan.ContextParallel(group, layout="contiguous").sequence(LENGTH)
        model(**sequence.shard_batch({"input_ids": make_batch(1, LENGTH)["input_ids"]}))
        if group.rank == 1:
            model(**without_positions(sequence))
        # Its own positions are right, and a causal rank 0 reads no other's keys: it is the loss that it waits for.
        logits = model(**without_positions(sequence)).logits
        with pytest.raises(RankFailure, match=FORGOTTEN):
            sequence.loss(logits, torch.zeros(logits.shape[:2], dtype=torch.int64))

    with pytest.raises(RingspanError, match=FORGOTTEN):
        ringspan.run_in_process(2, run, timeout_seconds=20.0)


def problems(position_ids: Tensor, mask: ringspan.Mask | None = None, ranks: int = 3, **how: Any) -> list[bool]:
    """On which ranks of a sequence of 12 tokens attention refuses these."""

    def run(group: Any) -> bool:
        sequence = ringspan.ContextParallel(group, **how).sequence(12, mask)
        return position_problem(sequence, position_ids, "attention") is not None

    return ringspan.run_in_process(ranks, run)


COUNTED = torch.arange(4)[None]
PACKED = ringspan.causal() & ringspan.documents([0, 4, 8, 12])


def test_what_is_refused_is_what_a_model_makes_of_a_shard_by_itself_and_nothing_else():
    assert problems(COUNTED, layout="zigzag") == [True] * 3
    assert problems(COUNTED.expand(5, -1), layout="zigzag") == [True] * 3
    assert problems(COUNTED.expand(3, 2, -1), layout="zigzag") == [True] * 3
    # Rank 0 owns 0 … 3.
    assert problems(COUNTED, layout="contiguous") == [False, True, True]
    assert problems(torch.arange(12)[None], ranks=1) == [False]
    for chosen in (COUNTED + 1, COUNTED // 2, COUNTED.flip(1), torch.zeros(1, 4), torch.stack((COUNTED, COUNTED + 1))):
        assert problems(chosen) == [False] * 3
    # What has another length is not about this shard's tokens, and a model may give none.
    assert problems(torch.arange(5)[None]) == problems(torch.tensor(0)) == problems(torch.empty(1, 4, device="meta")) == [False] * 3
    assert problems(None) == [False] * 3  # type: ignore[arg-type]


def test_documents_that_begin_where_a_shard_does_are_counted_from_0():
    assert problems(COUNTED, PACKED, layout="contiguous") == [False] * 3
    # Rank 1 has the end of one document and the beginning of the next: 2, 3, 0, 1.
    assert problems(COUNTED, ringspan.causal() & ringspan.documents([0, 6, 12]), layout="contiguous") == [False, True, True]
    # Rank 0 owns 0, 1, 10, 11, the last two of which are 2 and 3 of a document; rank 1 owns 2, 3, 8, 9; rank 2 owns 4 … 7.
    assert problems(COUNTED, PACKED, layout="zigzag") == [False, True, False]


def test_documents_that_are_split_at_their_borders_run_without_the_positions_that_would_say_the_same():
    model, batch = tiny_llama("ringspan"), make_batch(1, 12)
    given = {"input_ids": batch["input_ids"], "position_ids": torch.arange(4).repeat(3)[None]}

    def run(group: Any) -> bool:
        sequence = ringspan.ContextParallel(group, layout="contiguous").sequence(12, PACKED)
        return torch.equal(model(**without_positions(sequence)).logits, model(**sequence.shard_batch(given)).logits)

    assert all(ringspan.run_in_process(3, run))


class Reads(TorchDispatchMode):
    """Counts how often a tensor becomes a number, for which a GPU would be waited for."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*arguments, **(keywords or {}))


def test_what_shard_batch_made_is_never_read_and_another_tensor_once_whatever_the_number_of_layers():
    def run(group: Any) -> list[int]:
        sequence = ringspan.ContextParallel(group).sequence(12)
        made = sequence.shard_batch({"input_ids": make_batch(1, 12)["input_ids"]})["position_ids"]
        other, counts = made.clone(), []
        for position_ids in (made, made.detach(), other, other, other.view(1, 4)):
            with Reads() as reads:
                assert position_problem(sequence, position_ids, "attention") is None
            counts.append(reads.count)
        other.copy_(COUNTED)
        assert position_problem(sequence, other, "attention") is not None
        return counts

    # The first read also finds where documents begin.
    for counts in ringspan.run_in_process(3, run):
        assert counts[:2] == counts[3:] == [0, 0] and counts[2] >= 1


def test_tensors_are_known_as_long_as_they_live_and_hold_what_they_held():
    known, tensor = KnownTensors(), torch.arange(6)
    known.add(tensor)
    assert tensor in known and tensor.view(6) in known and tensor.clone() not in known and tensor[:3] not in known
    tensor.add_(1)
    assert tensor not in known
    with torch.inference_mode():
        inferred = torch.arange(6)
        known.add(inferred)
        assert inferred in known
    del tensor, inferred
    assert not len(known._versions)
