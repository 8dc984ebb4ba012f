"""What one step reads, as passes of a few rows, dealt out to who reads them: a token weighs the same in any cut of a step into passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from jaxtyping import Int
from torch import Tensor

from ringspan.attention.loss import IGNORE_INDEX
from ringspan.geometry import Mask, documents

SHORTEST_WINDOW = 16
"""Tokens of the shortest window that `context_windows` gives."""
_MOST_WINDOWS = 8


@dataclass(frozen=True, kw_only=True)
class Pass:
    """The rows of one forward and backward pass, whole.

    Attributes:
        ids: token ids.
        labels: `ids`, with −100 where nothing is to be predicted; not shifted.
        position_ids: where they are not 0, 1, 2 …
        mask: what a token sees.
        is_blank: whether it only keeps step with replicas that have one pass more: nothing in it is to be predicted.
    """

    ids: Int[Tensor, "batch context"]
    labels: Int[Tensor, "batch context"]
    position_ids: Int[Tensor, "batch context"] | None
    mask: Mask
    is_blank: bool = False

    def tensors(self, device: torch.device) -> dict[str, Tensor]:
        """On `device`, as `ParallelModel.shard_batches` takes them."""
        positions = {} if self.position_ids is None else {"position_ids": self.position_ids.to(device)}
        return {"input_ids": self.ids.to(device), "labels": self.labels.to(device), **positions}


def deal(
    rows: Int[Tensor, "rows context"], *, num_replicas: int, batch_size: int, mask: Mask, separator: int | None = None
) -> list[list[Pass]]:
    """The passes of a step for each replica: row i is replica i mod `num_replicas`'s, and who has a pass less gets a blank one.

    Args:
        num_replicas: how many groups of ranks read different rows; there is at least one row.
        batch_size: see `cut_into_passes`, as `mask` and `separator`.
    """
    parts = [rows[replica::num_replicas] for replica in range(num_replicas)]
    hands = [cut_into_passes(part, batch_size=batch_size, mask=mask, separator=separator) if len(part) else [] for part in parts]
    first = hands[0][0]
    blank = replace(first, labels=torch.full_like(first.labels, IGNORE_INDEX), is_blank=True)
    return [hand + [blank] * (len(hands[0]) - len(hand)) for hand in hands]


def cut_into_passes(rows: Int[Tensor, "rows context"], *, batch_size: int, mask: Mask, separator: int | None = None) -> list[Pass]:
    """The passes of the rows that one replica reads.

    Args:
        batch_size: rows in a pass.
        mask: what a token sees.
        separator: the token that ends a document; None where documents are not kept apart. Where they are, a token sees its own document
            alone, positions begin again in each, no token predicts the first of the next, and each row, having its own documents, is a
            pass.
    """
    if separator is None:
        return [Pass(ids=ids, labels=ids, position_ids=None, mask=mask) for ids in rows.split(batch_size)]
    return [_packed(row, mask, separator) for row in rows.split(1)]


def document_borders_of(row: Int[Tensor, " context"], separator: int) -> list[int]:
    """Where documents begin in a row, and its end: `[0, …, context]`. A document ends with its separator."""
    starts = (row[:-1] == separator).nonzero().flatten() + 1
    return [0, *starts.tolist(), len(row)]


def _packed(ids: Int[Tensor, "1 context"], mask: Mask, separator: int) -> Pass:
    borders = document_borders_of(ids[0], separator)
    labels = ids.clone()
    labels[:, borders[1:-1]] = IGNORE_INDEX
    lengths = [stop - start for start, stop in pairwise(borders)]
    positions = torch.cat([torch.arange(length, device=ids.device) for length in lengths])
    return Pass(ids=ids, labels=labels, position_ids=positions.unsqueeze(0), mask=mask & documents(borders))


def context_windows(context: int, shortest: int = SHORTEST_WINDOW) -> list[int]:
    """The windows of `cut_into_windows`, rising, the last the whole context: `[512, 1024, …, 65536]`.

    Window i from the end is twice the last half's 2⁻ⁱ, rounded up: 61 tokens have windows of 61, 30 and 16.

    Args:
        shortest: no window but the context has fewer tokens; eight at most are given.
    """
    halved = [2 * -(-(context // 2) // 2**i) for i in range(1, _MOST_WINDOWS)]
    return [*(window for window in reversed(halved) if window >= shortest), context]


def cut_into_windows(whole: Pass, window: int) -> Pass:
    """The targets of a pass, the last ⌊context / 2⌋ tokens of its rows, each predicted from less of its row than all before it.

    The targets are cut, from the row's end, into blocks of ⌊window / 2⌋ tokens. Each is predicted from the `window` tokens that end with
    it, with positions from 0, so that a target sees from ⌈window / 2⌉ to `window` − 1 tokens before it. Whatever the window, the same
    tokens are predicted, each once: losses differ by what the model makes of the context, not by what text lies where.

    Eight tokens, whose last four are targets, and windows of four; `·` has no label:

        whole      · · · · 4 5 6 7
        window 4       · · 4 5
                           · · 6 7

    Args:
        whole: rows that are not packed, under a mask that does not depend on the position.
        window: one of `context_windows`.

    Returns:
        A pass of as many rows as there are blocks in all, of `window` tokens each.
    """
    context = whole.ids.shape[1]
    first, block = context - context // 2, window // 2
    stops = range(context, first, -block)
    scored = whole.labels.clone()
    scored[:, :first] = IGNORE_INDEX
    ids, labels = (torch.cat([tokens[:, stop - window : stop] for stop in stops]) for tokens in (whole.ids, scored))
    # What is before a block has been, or will be, another's.
    labels[:, : window - block] = IGNORE_INDEX
    return replace(whole, ids=ids, labels=labels)


def rows_of(starts: Sequence[int], tokens: Int[Tensor, " tokens"], context: int) -> Int[Tensor, "rows context"]:
    """The rows that begin at `starts`, as int64."""
    return torch.stack([tokens[start : start + context].long() for start in starts])
