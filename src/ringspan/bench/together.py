"""Ranks that measure together: what fails on one is known to all at the next word that they exchange."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ringspan.transport import Transport


class Broken(Exception):
    """A rank failed. `status` and `reason` are those of the first that did, the same on every rank."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


class Together:
    """`transport`, whose small objects carry a word on whether their sender goes on. All else is the transport's own.

    A rank that failed says so once, in place of whatever the others say next, and all of them leave what they were about: they stay in
    step. A rank that fails in the middle of a transfer leaves the others waiting until the group's time is up, which nothing here can help.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def gather_objects(self, mine: object) -> list:
        """See `Transport.gather_objects`.

        Raises:
            Broken: on every rank, where one of them has failed.
        """
        return self._exchange("", mine)

    def all_reduce(self, tensor: Tensor, operation: str = "sum") -> None:
        """See `Transport.all_reduce`; a word goes before it, as a rank that has failed would say its own instead.

        Raises:
            Broken: on every rank, where one of them has failed.
        """
        self.gather_objects(None)
        self._transport.all_reduce(tensor, operation)

    def fail(self, status: str, reason: str) -> Broken:
        """Tells the others that this rank has failed, and returns what they will raise."""
        try:
            self._exchange(status, reason)
        except Broken as broken:
            return broken
        raise AssertionError("a failure that was told was not heard")

    def _exchange(self, status: str, mine: object) -> list:
        said = self._transport.gather_objects((status, mine))
        for rank, (found, reason) in enumerate(said):
            if found:
                everywhere = all(other == (found, reason) for other in said)
                raise Broken(found, reason if everywhere else f"rank {rank}: {reason}")
        return [payload for _, payload in said]


def first_of(reasons: list[str]) -> str:
    """The first that is not empty."""
    return next((reason for reason in reasons if reason), "")


def one_line(error: BaseException) -> str:
    """The kind of an error and the first line that it says."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0] if said else ''}"[:400]
