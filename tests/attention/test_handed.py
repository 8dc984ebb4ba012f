"""A batch comes out of a DataLoader's worker with the sequence that cut it, and a sequence of elsewhere is refused."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import ringspan
from ringspan.attention import handed
from ringspan.attention.batch import SEQUENCE_KEYWORD
from ringspan.errors import RingspanError

LENGTH = 12


@pytest.mark.parametrize("workers", [0, 1])
def test_a_worker_hands_on_the_sequence_itself(workers: int):
    sequence = ringspan.ContextParallel(kernel="reference").sequence(LENGTH)

    def collate(rows: list[torch.Tensor]) -> dict[str, Any]:
        return sequence.shard_batch({"input_ids": torch.stack(rows), "labels": torch.stack(rows)})

    rows = [torch.arange(LENGTH) + index for index in range(4)]
    loader = DataLoader(rows, 2, collate_fn=collate, num_workers=workers, multiprocessing_context="fork" if workers else None)  # type: ignore[arg-type]
    found = list(loader)
    assert [batch["input_ids"][0, 0].item() for batch in found] == [0, 2]
    assert all(batch[SEQUENCE_KEYWORD] is sequence for batch in found)


def test_copies_of_a_batch_have_its_sequence_and_another_process_has_none():
    sequence = ringspan.ContextParallel(kernel="reference").sequence(LENGTH)
    assert copy.deepcopy({"a": sequence})["a"] is sequence
    pickled = pickle.dumps(sequence)
    assert pickle.loads(pickled) is sequence
    handed._KNOWN.clear()
    with pytest.raises(RingspanError, match="pickled in another process"):
        pickle.loads(pickled)
