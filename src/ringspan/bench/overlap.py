"""A transport without overlap: every transfer is awaited where it is posted. What overlapping is worth is the difference."""

from __future__ import annotations

from collections.abc import Sequence

from ringspan.transport import Parcel, Pending, Transport


class Awaited:
    """`transport`, but `exchange` returns only when what was posted has arrived (on CUDA: what is queued from there on waits for it).

    Computing is posted after the transfers of its step, so nothing of it hides them any more. Everything else is the transport's own.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def __getattr__(self, name: str):
        return getattr(self._transport, name)

    def exchange(self, sends: Sequence[Parcel], receives: Sequence[Parcel], lane: int = 0) -> Pending:
        """See `Transport.exchange`."""
        pending = self._transport.exchange(sends, receives, lane)
        pending.wait()
        return _Done()


class _Done:
    def wait(self) -> None:
        """There is nothing left to wait for."""
