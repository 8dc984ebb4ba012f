"""A Hugging Face batch of whole sequences to this rank's part of it, and whether all ranks were given the same."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from ringspan.attention.loss import IGNORE_INDEX, shift_labels
from ringspan.errors import RingspanError, UnsupportedError
from ringspan.geometry import document_borders, looks_ahead

if TYPE_CHECKING:
    from ringspan.attention.sequence import Sequence

SEQUENCE_KEYWORD = "ringspan_sequence"
"""The keyword under which the sequence travels through a Hugging Face model to its attention."""

_KNOWN = ("input_ids", "inputs_embeds", "position_ids", "labels", "attention_mask")
_WHOLE = ("input_ids", "position_ids", "labels")


SAME_BATCHES = "Ranks that share a sequence are given the same whole batches"
"""The rule: a sampler that gives each rank its own would train on a text that is nowhere."""


def shard_batch(sequence: Sequence, batch: Mapping[str, Any]) -> dict[str, Any]:
    """This rank's part of `batch`, ready for `model(**…)`, without a word to the other ranks: who calls it knows that theirs is the same.

    `Sequence.shard_batch` compares. This is for a thread or a DataLoader's worker that cuts batches ahead.

    Args:
        sequence: whose length is that of the batch.
        batch: `input_ids [batch, length]` (or `inputs_embeds`); optional `labels [batch, length]`, not shifted, −100 where none and at
            padding; optional `position_ids`; whole numbers of any dtype, which come back as int64. Optional `attention_mask` of ones, or of
            ones followed by padding on the right (exact under a causal mask, where no token sees what follows it).

    Returns:
        `input_ids`, `position_ids`, and, where there are labels, `labels` and `shift_labels` (both shifted: position t holds the token at
        t + 1, also across shard borders) and `num_items_in_batch`, the labelled positions of the whole batch. The model's own loss is then
        this rank's share of the unsplit loss: the shares add up to it.

    Raises:
        RingspanError: for tensors of another length, tokens, labels or positions that are no whole numbers, unknown keys, padding that this
            mask does not make harmless or that has labels, and where a rank would own no token. On every rank that is given
            this batch; nothing is sent.
    """
    unknown = sorted(set(batch) - set(_KNOWN))
    if unknown or not ({"input_ids", "inputs_embeds"} & set(batch)):
        raise UnsupportedError(
            f"a batch with {', '.join(sorted(batch))}",
            f"unknown: {', '.join(unknown)}" if unknown else "neither input_ids nor inputs_embeds",
            f"A batch is made of {', '.join(_KNOWN)}, and nothing is ignored",
            "seq.shard(x, dim) for further tensors",
        )
    _check_everyone_owns_some(sequence)
    batch = {key: _whole_numbers(key, value) if key in _WHOLE else value for key, value in batch.items()}
    labels = batch.get("labels")
    if (padding := batch.get("attention_mask")) is not None:
        _check_padding(sequence, padding)
        if labels is not None:
            _check_labels(labels, padding)
    part: dict[str, Any] = {key: sequence.shard(batch[key], 1) for key in ("input_ids", "inputs_embeds") if key in batch}
    tokens: Tensor = next(iter(part.values()))
    if "position_ids" in batch:
        _check_positions(sequence, batch["position_ids"], padding)
        part["position_ids"] = sequence.shard(batch["position_ids"], 1)
    else:
        # A copy: what a model does to it is no matter of the sequence's.
        part["position_ids"] = sequence.positions.to(tokens.device).repeat(tokens.shape[0], 1)
    if labels is not None:
        shifted = shift_labels(labels)
        part["labels"] = part["shift_labels"] = sequence.shard(shifted, 1)
        part["num_items_in_batch"] = (shifted != IGNORE_INDEX).sum()
    # So that attention need not read them.
    sequence.known_positions.add(part["position_ids"])
    sequence.context.use.count_batch(sequence.num_ranks)
    part[SEQUENCE_KEYWORD] = sequence
    return part


def checksums(batch: Mapping[str, Any]) -> dict[str, int]:
    """Of what is in whole numbers: tokens, labels, positions, padding."""
    numbers = {
        name: each for name, each in sorted(batch.items()) if isinstance(each, Tensor) and not (each.is_floating_point() or each.is_meta)
    }
    return {name: zlib.crc32(each.detach().cpu().contiguous().numpy().tobytes()) for name, each in numbers.items()}


def raise_first(problem: RingspanError | None, others: Iterable[RingspanError | None]) -> None:
    """Raises this rank's own `problem`, or that of the first rank that has one."""
    if problem is not None:
        raise problem
    for rank, other in enumerate(others):
        if other is not None:
            raise RingspanError(f"rank {rank} was given a batch that it cannot compute", str(other))


def differs(which: str, length: int, found: Mapping[int, Mapping[str, int]]) -> str:
    """What is found where one of two ranks was given other numbers than the other.

    Args:
        found: the `checksums` of a rank, and then those of the one that it is measured by.
    """
    (rank, theirs), (first, given) = found.items()
    names = [name for name in sorted({*theirs, *given}) if theirs.get(name) != given.get(name)]
    return f"{which}, of {length} tokens, is another on rank {rank} than on rank {first}: {', '.join(names)}"


def agree_on_batch(sequence: Sequence, batch: Mapping[str, Any], problem: RingspanError | None) -> None:
    """All ranks of `sequence` go on with `batch`, or all raise: one gathering of checksums and of what `problem` a rank has.

    Raises:
        RingspanError: on every rank, this rank's own `problem`, or that of the first rank that has one, or that the batches differ.
    """
    transport = sequence.context.transport
    if transport.size == 1:
        raise_first(problem, [])
        return
    if get_worker_info() is not None:
        raise UnsupportedError(
            f"shard_batch of a sequence on {transport.size} ranks in a worker of a DataLoader",
            "a worker reaches no other rank",
            SAME_BATCHES + ", and shard_batch compares them",
            "shard_batch in the training loop; or, of data in one order on all ranks, from ringspan.attention.batch import shard_batch",
        )
    said = transport.gather_objects(({} if problem is not None else checksums(batch), problem))
    raise_first(problem, [other for _, other in said])
    for rank, (theirs, _) in enumerate(said):
        if theirs != said[0][0]:
            found = differs("the batch", sequence.length, {rank: theirs, 0: said[0][0]})
            raise RingspanError(
                f"shard_batch on {transport.size} ranks", found, SAME_BATCHES, "the same data order on all ranks of the group"
            )


def _check_everyone_owns_some(sequence: Sequence) -> None:
    # Hugging Face's layers reshape with −1, which means nothing for a tensor without elements.
    if empty := [rank for rank, length in enumerate(sequence.layout.shard_lengths) if not length]:
        raise UnsupportedError(
            f"a batch of {sequence.length} tokens split {sequence.layout.name} over {sequence.num_ranks} ranks",
            f"rank {empty[0]} owns none",
            "A model computes at least one token on every rank",
            f"at least {sequence.num_ranks} tokens, fewer ranks, or weights above 0",
        )


def _whole_numbers(name: str, given: Any) -> Any:
    """As int64: embeddings know no narrow ones, and unsigned labels have no −100."""
    if not isinstance(given, Tensor) or given.dtype == torch.int64:
        return given
    if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
        rule = "Tokens, labels and positions are whole numbers"
        raise RingspanError(f"a batch with {name} in {given.dtype}", "", rule, f"{name}.long(), or inputs_embeds for embedded tokens")
    return given.long()


def _check_positions(sequence: Sequence, position_ids: Tensor, padding: Tensor | None) -> None:
    """Positions that begin again tell packed documents, as transformers reads them: the sequence's mask must have the same borders.

    So do positions that jump ahead, unless an attention_mask comes with them. One mask holds for all rows: where a row begins again at some
    of its borders, every row does at all of them. Positions that always go on by one tell nothing, and padding has none.
    """
    steps = position_ids[..., 1:] - position_ids[..., :-1]
    # Without an attention_mask transformers takes every step but that by one for a border.
    again = steps != 1 if padding is None else (steps <= 0) & (padding[:, 1:] != 0)
    rows = [set((row.nonzero().flatten() + 1).tolist()) for row in again.reshape(-1, again.shape[-1])]
    found, borders = set().union(*rows), {border for border in document_borders(sequence.mask) if 0 < border < sequence.length}
    if strange := sorted(found - borders):
        ahead = not bool((steps <= 0).any())
        one_text = "an attention_mask of ones, which says that all is one text; or " if ahead else ""
        raise UnsupportedError(
            f"position_ids that {'jump' if ahead else 'begin again'} at {strange[:4]} under mask {sequence.mask}",
            "the mask has no document border there",
            "Tokens of packed documents do not see one another, and the sequence's mask is what says so",
            f"{one_text}cp.sequence(length, ringspan.causal() & ringspan.documents(cu_seqlens)), of rows that are all packed alike",
        )
    # Of padding nothing depends on where its documents begin.
    ends = [sequence.length] * len(rows) if padding is None else (padding != 0).sum(-1).tolist()
    for index, (row, end) in enumerate(zip(rows, ends, strict=False)):
        if found and (missing := sorted(border for border in borders - row if border < end)):
            raise UnsupportedError(
                f"position_ids that go on at {missing[:4]} in row {index} under mask {sequence.mask}",
                f"the mask has document borders there, and rows begin again at {sorted(found)[:4]}",
                "One mask holds for all rows of a batch, and a row's positions tell other documents than it does",
                "rows that are packed alike, or a batch and a sequence for each",
            )


def _check_padding(sequence: Sequence, padding: Tensor) -> None:
    shaped = padding.ndim == 2 and padding.shape[1] == sequence.length
    everything = shaped and bool(torch.all(padding != 0))
    right = shaped and bool((padding[:, 1:].bool() <= padding[:, :-1].bool()).all())
    if not (everything or (right and not looks_ahead(sequence.mask))):
        raise UnsupportedError(
            f"an attention_mask {tuple(padding.shape)} under mask {sequence.mask}",
            "it hides tokens that others would see" if shaped else f"it is not [batch, {sequence.length}]",
            "Padding is exact on the right under a causal mask, where no token sees what follows it",
            "tokenizer.padding_side = 'right' with mask causal, or sequences of one length",
        )


def _check_labels(labels: Tensor, padding: Tensor) -> None:
    # The unsplit model would count them, and a padded token of it sees fewer keys than here.
    if labels.shape != padding.shape:
        raise RingspanError(
            f"labels {tuple(labels.shape)} with an attention_mask {tuple(padding.shape)}",
            "they are of different shapes",
            "Labels and attention_mask are [batch, length], of the same sequences",
        )
    labelled = (labels != IGNORE_INDEX) & (padding == 0)
    if bool(labelled.any()):
        row, position = labelled.nonzero()[0].tolist()
        raise UnsupportedError(
            f"a batch with labels at {int(labelled.sum())} padded positions",
            f"sequence {row} has the label {int(labels[row, position])} at position {position}, where its attention_mask is 0",
            "transformers' loss counts every label but -100 whatever the attention_mask, and what padding predicts is of no use",
            "labels.masked_fill(attention_mask == 0, -100), as DataCollatorForLanguageModeling(tokenizer, mlm=False) gives them",
        )
