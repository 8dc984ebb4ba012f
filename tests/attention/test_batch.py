"""`shard_batch`: every rank's part of a Hugging Face batch, and what it refuses."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

import ringspan
from ringspan.attention import batch as batch_module
from ringspan.attention.batch import shard_batch
from ringspan.errors import RingspanError, UnsupportedError
from ringspan.transport import InProcessTransport, SingleRank
from tests.support.models import make_batch, tiny_llama, whole_loss


def parts(batch: dict[str, Any], ranks: int = 3, mask: ringspan.Mask | None = None, **how: Any) -> list[dict[str, Any]]:
    def run(group: Any) -> dict[str, Any]:
        sequence = ringspan.ContextParallel(group, **how).sequence(batch["input_ids"].shape[1], mask)
        return {**sequence.shard_batch(batch), "positions": sequence.positions}

    return ringspan.run_in_process(ranks, run)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
def test_position_t_holds_the_token_at_t_and_the_label_at_t_plus_one_whichever_rank_owns_them(layout: str):
    batch = make_batch(2, 17)
    expected = torch.cat((batch["labels"][:, 1:], torch.full((2, 1), -100)), 1)
    for part in parts(batch, layout=layout):
        assert torch.equal(part["input_ids"], batch["input_ids"][:, part["positions"]])
        assert torch.equal(part["labels"], expected[:, part["positions"]])
        assert torch.equal(part["shift_labels"], part["labels"])
        assert torch.equal(part["position_ids"], part["positions"].expand(2, -1))
        assert part["num_items_in_batch"] == (expected != -100).sum()


def test_position_ids_that_are_given_are_kept():
    batch = {**make_batch(1, 12), "position_ids": torch.arange(12).unsqueeze(0) + 7}
    for part in parts(batch):
        assert torch.equal(part["position_ids"], batch["position_ids"][:, part["positions"]])


def test_rows_that_are_packed_differently_are_refused_since_one_mask_holds_for_all():
    positions = torch.stack([torch.cat([torch.arange(5), torch.arange(7)]), torch.cat([torch.arange(8), torch.arange(4)])])
    ids = torch.zeros(2, 12, dtype=torch.int64)
    for borders, words in (([0, 5, 8, 12], r"go on at \[8\] in row 0"), ([0, 5, 12], r"begin again at \[8\]")):
        sequence = ringspan.ContextParallel(kernel="reference").sequence(12, ringspan.causal() & ringspan.documents(borders))
        with pytest.raises(UnsupportedError, match=words):
            sequence.shard_batch({"input_ids": ids, "position_ids": positions})
        # Positions that never begin again tell nothing.
        sequence.shard_batch({"input_ids": ids, "position_ids": torch.arange(12).expand(2, -1)})
    sequence.shard_batch({"input_ids": ids, "position_ids": positions[:1].expand(2, -1)})
    with pytest.raises(UnsupportedError, match=r"go on at \[5\] in row 1"):
        sequence.shard_batch({"input_ids": ids, "position_ids": torch.stack([positions[0], torch.arange(12)])})


def test_positions_that_jump_ahead_are_documents_to_transformers_unless_a_mask_of_ones_comes_with_them():
    positions = torch.tensor([[0, 1, 2, 3, 4, 9, 10, 11, 12, 13, 14, 15]])
    batch = {"input_ids": torch.zeros(1, 12, dtype=torch.int64), "position_ids": positions}
    context = ringspan.ContextParallel(kernel="reference")
    with pytest.raises(UnsupportedError, match=r"jump at \[5\] under mask causal.*an attention_mask of ones"):
        context.sequence(12).shard_batch(batch)
    one_text = context.sequence(12).shard_batch({**batch, "attention_mask": torch.ones(1, 12, dtype=torch.int64)})
    packed = context.sequence(12, ringspan.causal() & ringspan.documents([0, 5, 12])).shard_batch(batch)
    assert torch.equal(one_text["position_ids"], positions) and torch.equal(packed["position_ids"], positions)
    # As transformers computes them: the last token's logits of all tokens, and of its document alone.
    model, ids = tiny_llama("sdpa").eval(), torch.randint(53, (1, 12), generator=torch.Generator().manual_seed(0))
    ones = torch.ones(1, 12, dtype=torch.int64)
    plain = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0, -1]
    alone = model(input_ids=ids[:, 5:], position_ids=positions[:, 5:], use_cache=False).logits[0, -1]
    joined = model(input_ids=ids, position_ids=positions, attention_mask=ones, use_cache=False).logits[0, -1]
    assert torch.allclose(plain, alone, atol=1e-9) and not torch.allclose(plain, joined, atol=1e-3)


def test_positions_of_padding_are_no_documents():
    kept = torch.tensor([[1] * 12, [1] * 7 + [0] * 5])
    sequence = ringspan.ContextParallel(kernel="reference").sequence(12)
    for positions in (kept.cumsum(-1) - 1, (kept.cumsum(-1) - 1).masked_fill(kept == 0, 1)):
        batch = {"input_ids": torch.zeros(2, 12, dtype=torch.int64), "attention_mask": kept, "position_ids": positions}
        assert torch.equal(sequence.shard_batch(batch)["position_ids"], positions)
        with pytest.raises(UnsupportedError, match="begin again"):
            sequence.shard_batch({name: tensor for name, tensor in batch.items() if name != "attention_mask"})
    packed = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
    of_documents = sequence.context.sequence(12, ringspan.causal() & ringspan.documents([0, 5, 12]))
    batch = {"input_ids": torch.zeros(2, 12, dtype=torch.int64), "attention_mask": torch.tensor([[1] * 12, [1] * 4 + [0] * 8])}
    of_documents.shard_batch({**batch, "position_ids": packed})


def test_what_a_model_does_to_its_positions_is_no_matter_of_the_sequences():
    sequence = ringspan.ContextParallel(kernel="reference").sequence(8)
    for _ in range(2):
        part = sequence.shard_batch({"input_ids": torch.zeros(1, 8, dtype=torch.int64)})
        assert part["position_ids"].tolist() == [list(range(8))]
        part["position_ids"] += 1


def test_the_batch_that_was_given_is_left_as_it_was():
    batch = make_batch(2, 12, padded=(0, 3))
    before = {key: tensor.clone() for key, tensor in batch.items()}
    parts(batch)
    assert all(torch.equal(batch[key], before[key]) for key in before)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.uint16])
def test_whole_numbers_of_any_width_are_what_they_are_as_int64(dtype: torch.dtype):
    ids = make_batch(2, 12)["input_ids"]
    given = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(12).expand(2, -1)}
    for part, expected in zip(parts({key: tensor.to(dtype) for key, tensor in given.items()}), parts(given), strict=True):
        for key in (*given, "shift_labels", "num_items_in_batch"):
            assert part[key].dtype == torch.int64 and torch.equal(part[key], expected[key]), key


def labelled_padding(batch: dict[str, Any]) -> dict[str, Any]:
    """`batch` with one label, 7, at the first padded position of its last sequence."""
    batch["labels"][-1, int(batch["attention_mask"][-1].sum())] = 7
    return batch


REFUSED = {
    "tokens that are no whole numbers": (lambda: {"input_ids": torch.ones(1, 8)}, None, r"input_ids in torch.float32.*input_ids.long\(\)"),
    "labels that say yes or no": (lambda: {**make_batch(1, 8), "labels": torch.ones(1, 8) > 0}, None, "labels in torch.bool"),
    "padding on the left": (lambda: {**make_batch(1, 8), "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]])}, None, "right"),
    "a hole in the middle": (lambda: {**make_batch(1, 8), "attention_mask": torch.tensor([[1, 1, 0, 1, 1, 1, 1, 1]])}, None, "right"),
    "padding under a mask that looks ahead": (lambda: make_batch(2, 8, padded=(0, 2)), ringspan.full(), "causal"),
    "a mask of pairs": (lambda: {**make_batch(1, 8), "attention_mask": torch.ones(1, 1, 8, 8)}, None, "attention_mask"),
    "a mask of one dimension": (lambda: {**make_batch(1, 8), "attention_mask": torch.ones(8)}, None, "attention_mask"),
    "a mask of another length": (
        lambda: {"input_ids": make_batch(1, 8)["input_ids"], "attention_mask": torch.ones(1, 9)},
        None,
        "attention_mask",
    ),
    "a label at padding": (
        lambda: labelled_padding(make_batch(2, 8, padded=(0, 2))),
        None,
        "label 7 at position 6, where its attention_mask",
    ),
    "labels of fewer sequences than the mask": (
        lambda: {**make_batch(2, 8, padded=(0, 2)), "labels": make_batch(1, 8)["labels"]},
        None,
        "different shapes",
    ),
    "labels of another length": (lambda: {**make_batch(1, 8), "labels": torch.zeros(1, 9, dtype=torch.int64)}, None, "8 positions"),
    "a keyword that nobody knows": (lambda: {**make_batch(1, 8), "token_type_ids": torch.zeros(1, 8)}, None, "token_type_ids"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_batch_is_refused_for(case: str):
    make, mask, message = REFUSED[case]
    with pytest.raises(RingspanError, match=message):
        parts(make(), ranks=2, mask=mask)


def test_no_tokens_at_all_are_refused():
    sequence = ringspan.ContextParallel().sequence(8)
    with pytest.raises(UnsupportedError, match="neither input_ids nor inputs_embeds"):
        sequence.shard_batch({"labels": torch.zeros(1, 8)})


@pytest.mark.parametrize(
    ("length", "how"), [(2, {}), (9, {"layout": "weighted", "weights": (1.0, 0.0, 1.0)})], ids=["few tokens", "no weight"]
)
def test_a_rank_without_a_token_is_refused_on_every_rank_since_models_compute_at_least_one(length: int, how: dict[str, Any]):
    def run(group: Any) -> str:
        sequence = ringspan.ContextParallel(group, **how).sequence(length)
        with pytest.raises(UnsupportedError) as caught:
            sequence.shard_batch(make_batch(1, length))
        return str(caught.value)

    messages = ringspan.run_in_process(3, run)
    assert len(set(messages)) == 1 and "owns none" in messages[0]


def test_labels_at_padding_are_refused_on_every_rank_where_the_whole_model_would_count_them():
    batch = labelled_padding(make_batch(2, 12, padded=(0, 5)))

    def run(group: Any) -> str:
        sequence = ringspan.ContextParallel(group).sequence(12)
        with pytest.raises(UnsupportedError) as caught:
            sequence.shard_batch(batch)
        # What it tells to do is done, and passes.
        sequence.shard_batch({**batch, "labels": batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)})
        return str(caught.value)

    messages = ringspan.run_in_process(3, run)
    assert len(set(messages)) == 1 and "DataCollatorForLanguageModeling" in messages[0]
    counted, _ = whole_loss(tiny_llama(), batch)
    masked, _ = whole_loss(tiny_llama(), make_batch(2, 12, padded=(0, 5)))
    assert counted != masked, "transformers counts a label at padding: to drop it would be another loss"


def changed(batch: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """`batch` with another last number in `name`."""
    other = batch[name].clone()
    other[-1, -1] += 1
    return {**batch, name: other}


def test_ranks_that_were_given_different_batches_are_all_refused_and_so_are_all_where_one_has_a_batch_that_is_wrong():
    right = {**make_batch(2, 9), "position_ids": torch.arange(9).expand(2, -1), "attention_mask": torch.ones(2, 9, dtype=torch.int64)}
    others = [changed(right, name) for name in right]
    others += [{key: right[key] for key in right if key != "labels"}, {**right, "extra": right["labels"]}, make_batch(2, 11)]

    def run(group: Any) -> list[str]:
        sequence, said = ringspan.ContextParallel(group).sequence(9), []
        for other in others:
            with pytest.raises(RingspanError) as caught:
                sequence.shard_batch(other if group.rank == 1 else right)
            said.append(str(caught.value))
        sequence.shard_batch(right)
        return said

    every = ringspan.run_in_process(3, run, timeout_seconds=20.0)
    differ = "the batch, of 9 tokens, is another on rank 1 than on rank 0: {}. Ranks that share a sequence are given the same whole batches"
    names = [*right, "labels"]
    for rank, said in enumerate(every):
        assert [differ.format(name) in message for name, message in zip(names, said, strict=False)] == [True] * 5, (rank, said)
        assert "nothing is ignored" in said[5] and "9 positions" in said[6]
        assert rank == 1 or all("rank 1 was given a batch that it cannot compute" in message for message in said[5:])


def test_batches_are_compared_by_one_gathering_and_by_none_where_a_rank_is_alone_or_parallelize_has_compared_them():
    batch = make_batch(1, 9)

    def gatherings(group: InProcessTransport, call: Any) -> int:
        before = group._meetings
        call(batch)
        return group._meetings - before

    def run(group: InProcessTransport) -> tuple[int, ...]:
        sequence, parallel = ringspan.ContextParallel(group).sequence(9), ringspan.parallelize(tiny_llama(), group)
        parallel.context.sequence(9)
        without_a_word = partial(shard_batch, sequence)
        return tuple(gatherings(group, call) for call in (sequence.shard_batch, without_a_word, parallel.shard_batch))

    # parallelize: what to cut by with the checksums, and then how many tokens are labelled.
    assert ringspan.run_in_process(2, run) == [(1, 0, 2)] * 2
    assert run(SingleRank()) == (0, 0, 2)


def test_a_worker_that_loads_data_reaches_no_other_rank_and_is_told_what_to_call(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(batch_module, "get_worker_info", lambda: "a worker's")
    with pytest.raises(UnsupportedError, match=r"in a worker of a DataLoader.*from ringspan\.attention\.batch import shard_batch"):
        parts(make_batch(1, 9), ranks=2)
    parts(make_batch(1, 9), ranks=1)
