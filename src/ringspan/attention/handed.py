"""Sequences that travel by name: between the processes of a DataLoader goes a name, and the sequence stays where its ranks are."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from ringspan.errors import RingspanError

if TYPE_CHECKING:
    from ringspan.attention.sequence import Sequence

_KNOWN: WeakValueDictionary[str, Sequence] = WeakValueDictionary()


def enter(sequence: Sequence) -> str:
    """The name under which `find` finds it as long as it lives, in this process and in those forked from it later."""
    name = uuid.uuid4().hex
    _KNOWN[name] = sequence
    return name


def find(name: str) -> Sequence:
    """The sequence of a name.

    Raises:
        RingspanError: where it was made in a process that this one was not forked from.
    """
    if (sequence := _KNOWN.get(name)) is None:
        raise RingspanError(
            "a sequence that was pickled in another process",
            "it is not known here",
            "A sequence belongs to the process whose rank computes it, and to workers forked after it was made",
            "multiprocessing_context='fork' for the DataLoader, or shard_batch in the training loop",
        )
    return sequence
