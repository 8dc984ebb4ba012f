"""Exact attention over a sequence that several ranks share: the executor, its autograd function, and the public classes."""

from ringspan.attention.context_parallel import ContextParallel
from ringspan.attention.rank_speeds import measure_weights
from ringspan.attention.sequence import Sequence

__all__ = ["ContextParallel", "Sequence", "measure_weights"]
