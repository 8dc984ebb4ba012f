"""Checkpoints written while training goes on: a snapshot in host memory, and on each rank one thread that writes its part."""

from __future__ import annotations

import threading
from pathlib import Path

import torch
import torch.distributed as dist

from ringspan.training.checkpoint import Snapshot, save_checkpoint


class Saver:
    """Writes one checkpoint at a time in the background. On every rank; all learn of a failure by `Ranks.agree_on_stop`.

    Args:
        checkpoints: the folder of the checkpoints.
        keep: how many of the newest stay.
        group: of all ranks, which nobody else uses; None for a process alone.
    """

    def __init__(self, checkpoints: Path, *, keep: int, group: dist.ProcessGroup | None = None) -> None:
        self._checkpoints, self._keep, self._group = checkpoints, keep, group
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._written: Path | None = None

    @property
    def has_failed(self) -> bool:
        """Whether the checkpoint could not be written; `finish` says why."""
        return self._error is not None

    def begin(self, snapshot: Snapshot) -> None:
        """Copies the snapshot into host memory and returns while it is being written; first awaits the one before.

        Raises:
            RingspanError: what kept the one before from being written.
        """
        self.finish()
        copied = snapshot.in_host_memory()
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        # Not a daemon: a process that ends while it writes, ends when it has written.
        self._thread = threading.Thread(target=self._run, args=(copied, device), name="ringspan-checkpoint")
        self._thread.start()

    def _run(self, snapshot: Snapshot, device: int | None) -> None:
        try:
            if device is not None:
                # A new thread is on the first GPU, where torch.distributed.checkpoint would make a context of this process for nothing.
                torch.cuda.set_device(device)
            self._written = save_checkpoint(self._checkpoints, snapshot, keep=self._keep, group=self._group)
        except Exception as error:  # raised again by `finish`
            self._error = error

    def written(self) -> Path | None:
        """The checkpoint that has become whole since the last call; None where there is none."""
        path, self._written = (self._written, None) if self._thread is None or not self._thread.is_alive() else (None, self._written)
        return path

    def finish(self) -> None:
        """Waits until what was begun is on the disk; on other ranks than 0, until their part is.

        Raises:
            RingspanError: what kept it from being written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def close(self) -> None:
        """Waits like `finish`, and leaves what went wrong to whoever is raising already."""
        if self._thread is not None:
            self._thread.join()
