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


def rows_of(starts: Sequence[int], tokens: Int[Tensor, " tokens"], context: int) -> Int[Tensor, "rows context"]:
    """The rows that begin at `starts`, as int64."""
    return torch.stack([tokens[start : start + context].long() for start in starts])
