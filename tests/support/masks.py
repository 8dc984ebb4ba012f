"""Masks beside what they mean, written out by hand as a function of two positions: no code of the geometry room has a part in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import ringspan
from ringspan.geometry import Mask, block_sparse, documents, mask_mod, prefix_lm, sliding_window

PATTERN = ((1, 0, 0), (0, 0, 0), (1, 1, 0))


@dataclass(frozen=True)
class Example:
    """A mask for any length, and the same as a predicate on index tensors of queries and keys."""

    make: Callable[[int], Mask]
    allows: Callable[[Tensor, Tensor, int], Tensor]

    def allowed(self, length: int) -> Tensor:
        """`[length, length]`, True where the query of the row sees the key of the column."""
        positions = torch.arange(length)
        q, k = positions.unsqueeze(1), positions.unsqueeze(0)
        return self.allows(q, k, length).expand(length, length)


def borders(length: int) -> list[int]:
    """Three documents of unequal lengths, or as many as the length has room for."""
    return sorted({0, length // 5, length // 2, length})


def _document(positions: Tensor, length: int) -> Tensor:
    return sum((positions >= border).long() for border in borders(length)[1:-1]) + torch.zeros_like(positions)


def _block(length: int) -> int:
    return -(-length // len(PATTERN))


def _marked(q: Tensor, k: Tensor, length: int) -> Tensor:
    return torch.tensor(PATTERN, dtype=torch.bool)[q // _block(length), k // _block(length)]


def sieve(b: object, h: object, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """A user's own predicate, under which query 0 and some others see nothing at all where it is joined with causal."""
    return (q_idx % 4 != 0) & ((q_idx + 2 * kv_idx) % 3 != 0)


EXAMPLES: dict[str, Example] = {
    "causal": Example(lambda length: ringspan.causal(), lambda q, k, length: k <= q),
    "full": Example(lambda length: ringspan.full(), lambda q, k, length: (k >= 0) | (q >= 0)),
    "window": Example(lambda length: sliding_window(3), lambda q, k, length: (k <= q) & (k >= q - 3)),
    "two-sided window": Example(lambda length: sliding_window(2, 1), lambda q, k, length: (k <= q + 1) & (k >= q - 2)),
    "documents": Example(
        lambda length: ringspan.causal() & documents(borders(length)),
        lambda q, k, length: (k <= q) & (_document(q, length) == _document(k, length)),
    ),
    "prefix": Example(lambda length: prefix_lm(length // 3), lambda q, k, length: (k <= q) | (k < length // 3)),
    "blocks": Example(lambda length: block_sparse(_block(length), PATTERN), _marked),
    "mask_mod": Example(lambda length: ringspan.causal() & mask_mod(sieve), lambda q, k, length: (k <= q) & sieve(0, 0, q, k)),
}
"""`blocks` and `mask_mod` leave queries that see nothing."""
