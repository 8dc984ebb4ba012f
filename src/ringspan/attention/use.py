"""Whether batches that were cut for ranks meet the attention of their context: a model with another computes each rank's tokens alone."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from ringspan.errors import RingspanError

_AHEAD = 64
"""Batches that may be cut before any attention without a word: some loops cut a step's, or more, ahead."""
_RULE = "What shard_batch cuts is for a model that calls ringspan's attention; any other computes each rank's tokens alone"
_NEAREST = 'from_pretrained(..., attn_implementation="ringspan") or model.set_attn_implementation("ringspan"); or ringspan.parallelize'


@dataclass
class Use:
    """What has been done with a context on this rank.

    Attributes:
        batches: cut by `shard_batch`.
        has_attended: whether attention has been called.
        has_compared: whether the ranks' weights have been compared.
    """

    batches: int = 0
    has_attended: bool = False
    has_compared: bool = False

    def count_batch(self, num_ranks: int) -> None:
        """One more batch is cut. Warns once where very many have been and nothing has come of them."""
        self.batches += 1
        if self.batches == _AHEAD and self._is_missed(num_ranks):
            warnings.warn(f"{self._found()}: {_RULE}. Try: {_NEAREST}", stacklevel=4)

    def check(self, asked: str, num_ranks: int) -> None:
        """That some attention has run where batches have been cut, and a forward must therefore have been.

        Raises:
            RingspanError: where none has.
        """
        if self._is_missed(num_ranks):
            raise RingspanError(f"{asked} on {num_ranks} ranks", self._found(), _RULE, _NEAREST)

    def _is_missed(self, num_ranks: int) -> bool:
        return num_ranks > 1 and self.batches > 0 and not self.has_attended

    def _found(self) -> str:
        cut = "a batch was" if self.batches == 1 else f"{self.batches} batches were"
        return f"{cut} cut by shard_batch, and no attention of this context has run"
