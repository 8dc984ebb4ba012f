"""What the model makes of the held-out text: its loss, its loss by position, and its loss by what a token is given before it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from ringspan.geometry import depends_on_position
from ringspan.training.batches import SHORTEST_WINDOW, Pass, context_windows, cut_into_windows
from ringspan.training.tokens import position_edges

if TYPE_CHECKING:
    from ringspan.transformer import ParallelModel


@dataclass(frozen=True)
class HeldOut:
    """The held-out rows; every loss is in nats per token, the same on every rank and for every number of ranks. All is collective.

    Attributes:
        parallel: the model.
        passes: those of this rank's replica, a row each.
        device: where they are computed.
    """

    parallel: ParallelModel
    passes: Sequence[Pass]
    device: torch.device

    def loss(self) -> float:
        """The mean over all rows."""
        return self._mean(self.passes)

    def by_position(self) -> list[tuple[int, int, float]]:
        """The mean for ranges of positions, as (first, past the last, nats); ranges without a token are left out."""
        edges = position_edges(self._context)
        with self._evaluating():
            losses = self.parallel.losses_by_position(parts_of(self.parallel, self.passes, self.device), edges)
        return [(low, high, loss) for (low, high), loss in zip(pairwise(edges), losses, strict=True) if not math.isnan(loss)]

    def by_context(self) -> list[tuple[int, float]] | None:
        """The mean over the last halves of all rows, for windows of `context_windows`: (window, nats), see `cut_into_windows`.

        At the whole context it is the plain loss of those tokens. Each window costs about one `loss`.

        Returns:
            None where a token cannot be given less with all else the same, under masks that depend on the position, those of packed
            documents among them; and for contexts that have one window alone. A window has at least two tokens for each rank that shares
            a row.
        """
        windows = context_windows(self._context, max(SHORTEST_WINDOW, 2 * self.parallel.context.num_ranks))
        if len(windows) < 2 or any(depends_on_position(each.mask) for each in self.passes):
            return None
        return [(window, self._mean([cut_into_windows(each, window) for each in self.passes])) for window in windows]

    @property
    def _context(self) -> int:
        return self.passes[0].ids.shape[1]

    def _mean(self, passes: Sequence[Pass]) -> float:
        with self._evaluating():
            return sum(self.parallel.loss(part).item() for part in parts_of(self.parallel, passes, self.device))

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        self.parallel.model.eval()
        with torch.no_grad():
            yield
        self.parallel.model.train()


def parts_of(parallel: ParallelModel, passes: Sequence[Pass], device: torch.device) -> list[dict[str, Any]]:
    """This rank's parts of its replica's passes. Collective."""
    return parallel.shard_batches([each.tensors(device) for each in passes], [each.mask for each in passes])
