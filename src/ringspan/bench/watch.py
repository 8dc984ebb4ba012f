"""Looking on while a grid is run."""

from __future__ import annotations

from collections.abc import Sequence

from ringspan.bench.case import Shape
from ringspan.bench.record import Record


class Watch:
    """Is told of every record as soon as there is one, on every rank. This one does nothing; who does more derives from it.

    `records` are all that there are so far, in the order in which they were made; the list goes on changing after the call.
    """

    def came(self, record: Record, records: Sequence[Record]) -> None:
        """`record` is there, the last of `records`."""

    def timed_again(self, records: Sequence[Record]) -> None:
        """One of `records` has more samples than it had."""

    def ended(self, shape: Shape, records: Sequence[Record]) -> None:
        """Nothing more comes of `shape`."""
