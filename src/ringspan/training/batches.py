"""What one step reads, as passes of a few rows: token-weighted, so that any cut of a step into passes is the same step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Int
from torch import Tensor

from ringspan.attention.loss import IGNORE_INDEX, shift_labels
from ringspan.geometry import Mask, documents


@dataclass(frozen=True, kw_only=True)
class Pass:
    """The rows of one forward and backward pass, whole.

    Attributes:
        ids: token ids.
        labels: `ids`, with −100 where nothing is to be predicted; not shifted.
        position_ids: where they are not 0, 1, 2 …
        mask: what a token sees.
        weight: this pass's labelled tokens over the step's; Σ weight · loss is the mean loss of the step.
    """

    ids: Int[Tensor, "batch context"]
    labels: Int[Tensor, "batch context"]
    position_ids: Int[Tensor, "batch context"] | None
    mask: Mask
    weight: float

    def tensors(self) -> dict[str, Tensor]:
        """As `Sequence.shard_batch` takes them."""
        positions = {} if self.position_ids is None else {"position_ids": self.position_ids}
        return {"input_ids": self.ids, "labels": self.labels, **positions}


def cut_into_passes(rows: Int[Tensor, "rows context"], *, batch_size: int, mask: Mask, separator: int | None = None) -> list[Pass]:
    """The passes of a step.

    Args:
        batch_size: rows in a pass.
        mask: what a token sees.
        separator: the token that ends a document; None where documents are not kept apart. Where they are, a token sees its own document
            alone, positions begin again in each, no token predicts the first of the next, and each row, having its own documents, is a
            pass.
    """
    if separator is None:
        passes = [(ids, ids, None, mask) for ids in rows.split(batch_size)]
    else:
        passes = [_packed(row, mask, separator) for row in rows.split(1)]
    counts = [int((shift_labels(labels) != IGNORE_INDEX).sum()) for _, labels, _, _ in passes]
    total = max(1, sum(counts))
    return [
        Pass(ids=ids, labels=labels, position_ids=positions, mask=seen, weight=count / total)
        for (ids, labels, positions, seen), count in zip(passes, counts, strict=True)
    ]


def document_borders_of(row: Int[Tensor, " context"], separator: int) -> list[int]:
    """Where documents begin in a row, and its end: `[0, …, context]`. A document ends with its separator."""
    starts = (row[:-1] == separator).nonzero().flatten() + 1
    return [0, *starts.tolist(), len(row)]


def _packed(ids: Int[Tensor, "1 context"], mask: Mask, separator: int) -> tuple[Tensor, Tensor, Tensor, Mask]:
    borders = document_borders_of(ids[0], separator)
    labels = ids.clone()
    labels[:, borders[1:-1]] = IGNORE_INDEX
    lengths = [stop - start for start, stop in pairwise(borders)]
    positions = torch.cat([torch.arange(length, device=ids.device) for length in lengths])
    return ids, labels, positions.unsqueeze(0), mask & documents(borders)


def rows_of(starts: Sequence[int], tokens: Int[Tensor, " tokens"], context: int) -> Int[Tensor, "rows context"]:
    """The rows that begin at `starts`, as int64."""
    return torch.stack([tokens[start : start + context].long() for start in starts])
