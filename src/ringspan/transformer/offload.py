"""Layer checkpoints in host memory: copied out while the next layers run, and back before they are needed."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ringspan.errors import RingspanError


@dataclass(frozen=True, kw_only=True)
class Offload:
    """What goes to host memory, and how much.

    Attributes:
        host_bytes: of host memory that this rank may fill, and hold for the next step; what does not fit stays on the device, the last
            layers' first, which are needed first. None for no bound.
        in_flight: layers whose tensors are on their way at once, out or back; they hold their device memory meanwhile.
        attention_outputs: whether the outputs that `rematerialise='attention_output'` keeps go too.
    """

    host_bytes: int | None = None
    in_flight: int = 2
    attention_outputs: bool = True

    def check(self) -> None:
        """Raises RingspanError where a number makes no sense."""
        if self.host_bytes is not None and (type(self.host_bytes) is not int or self.host_bytes < 0):
            raise RingspanError(f"host_bytes={self.host_bytes!r}", "", "It is a number of bytes", "host_bytes=100 << 30, or None")
        if type(self.in_flight) is not int or self.in_flight < 1:
            raise RingspanError(f"in_flight={self.in_flight!r}", "", "At least one layer is on its way", "in_flight=2")


class Copier(Protocol):
    """How tensors go to the host and back. A mark is whatever tells when a copy has ended."""

    def host_buffer(self, size: int) -> Tensor:
        """`size` bytes of host memory, uint8."""
        ...

    def out(self, tensor: Tensor, host: Tensor) -> Any:
        """Starts copying `tensor` into `host` once it is computed."""
        ...

    def back(self, host: Tensor, tensor: Tensor) -> Any:
        """Starts copying `host` into `tensor`, which was just allocated."""
        ...

    def wait(self, mark: Any) -> None:
        """Work queued from here on sees that copy ended; the host need not wait."""
        ...

    def hand(self, tensor: Tensor) -> None:
        """Work queued from here on reads `tensor`, which may have been allocated while another stream was the current one."""
        ...

    def hold(self, tensor: Tensor) -> None:
        """Memory of `tensor` is not given out again, on any stream, before every copy that was started has ended."""
        ...

    def finish(self) -> None:
        """The host waits until every copy that was started has ended."""
        ...


class PlainCopier:
    """Copies at once: for tensors in host memory, where nothing is gained but the same code runs."""

    def host_buffer(self, size: int) -> Tensor:
        """See `Copier`."""
        return torch.empty(size, dtype=torch.uint8, device="cpu")

    def out(self, tensor: Tensor, host: Tensor) -> None:
        """See `Copier`."""
        host.copy_(tensor)

    def back(self, host: Tensor, tensor: Tensor) -> None:
        """See `Copier`."""
        tensor.copy_(host)

    def wait(self, mark: Any) -> None:
        """See `Copier`."""

    def hand(self, tensor: Tensor) -> None:
        """See `Copier`."""

    def hold(self, tensor: Tensor) -> None:
        """See `Copier`."""

    def finish(self) -> None:
        """See `Copier`."""


class CudaCopier:
    """Copies on a stream of its own, to page-locked memory. One stream for both ways: a buffer is never read and refilled at once."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def host_buffer(self, size: int) -> Tensor:
        """See `Copier`."""
        # Not pin_memory=True: torch's allocator rounds up to a power of two, which at gigabytes a layer is a second model's worth.
        buffer = torch.empty(size, dtype=torch.uint8, device="cpu")
        runtime: Any = torch.cuda.cudart()
        torch.cuda.check_error(runtime.cudaHostRegister(buffer.data_ptr(), size, 0))
        # A process that ends gives back all of it.
        weakref.finalize(buffer, _unregister, self._stream, buffer.data_ptr()).atexit = False
        return buffer

    def out(self, tensor: Tensor, host: Tensor) -> Any:
        """See `Copier`."""
        return self._copy(tensor, host)

    def back(self, host: Tensor, tensor: Tensor) -> Any:
        """See `Copier`."""
        # Also for memory that `tensor` takes over: what used it before was queued on the stream that is waited for.
        return self._copy(host, tensor)

    def _copy(self, source: Tensor, target: Tensor) -> Any:
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        return self._stream.record_event()

    def wait(self, mark: Any) -> None:
        """See `Copier`."""
        torch.cuda.current_stream(self._stream.device).wait_event(mark)

    def hand(self, tensor: Tensor) -> None:
        """See `Copier`."""
        tensor.record_stream(torch.cuda.current_stream(self._stream.device))

    def hold(self, tensor: Tensor) -> None:
        """See `Copier`."""
        tensor.record_stream(self._stream)

    def finish(self) -> None:
        """See `Copier`."""
        self._stream.synchronize()


class Parked:
    """A tensor that a `HostStore` keeps. Called, it gives the tensor back on its device, as often as wanted."""

    def __init__(self, store: HostStore, tensor: Tensor, buffer: Tensor | None, layer: int) -> None:
        self._store, self._buffer, self.layer = store, buffer, layer
        self._shape, self._dtype, self._device = tensor.shape, tensor.dtype, tensor.device
        self.size = tensor.numel() * tensor.element_size()
        self.here: Tensor | None = tensor
        self.mark: Any = None
        self.was_taken = False

    def __call__(self) -> Tensor:
        """The tensor."""
        return self._store.get(self)

    @property
    def is_on_host(self) -> bool:
        """Whether it is host memory that keeps it."""
        return self._buffer is not None

    @property
    def host(self) -> Tensor:
        """Its bytes there; the buffer may be larger."""
        assert self._buffer is not None
        return self._buffer[: self.size]

    def fetch(self, copier: Copier) -> None:
        """Starts its way back."""
        self.here = torch.empty(self._shape, dtype=self._dtype, device=self._device)
        self.mark = copier.back(self.host, _as_bytes(self.here))

    def __del__(self) -> None:
        """Its host memory is for the next one."""
        if self._buffer is not None:
            self._store.give_back(self, self._buffer)


class HostStore:
    """Keeps tensors in host memory in the order in which they come, and gives them back in the opposite one, the next ones on their way.

    Args:
        copier: `CudaCopier`, or `PlainCopier` on a CPU.
        settings: how much.

    Attributes:
        bytes_used: of the tensors that are on the host.
        most_bytes_used: at once, so far.
        bytes_held: of host memory, with what waits for the next tensors.
    """

    def __init__(self, copier: Copier, settings: Offload) -> None:
        settings.check()
        self._copier, self._settings = copier, settings
        # The one that has been free for longest comes first.
        self._free: list[Tensor] = []
        self._was_full = False
        self._leaving: list[Parked] = []
        # Known by weak references, as all that is on the host: whoever drops its graph drops them, on their way or not.
        self._coming: list[weakref.ref[Parked]] = []
        self._layers = 0
        self._order: list[weakref.ref[Parked]] = []
        self.bytes_used = 0
        self.most_bytes_used = 0
        self.bytes_held = 0

    def new_layer(self) -> int:
        """The number of a layer, for `put`. Called where its layers are computed, before anything of it is begun on another stream.

        Device memory of tensors that have left is used again by what is queued from here on, and by streams that go on from here: some of
        it is theirs. A `put` may be any stream's, of which the others know nothing.
        """
        self._layers += 1
        while len({each.layer for each in self._leaving}) >= self._settings.in_flight:
            left = self._leaving.pop(0)
            # Not before the copy has ended.
            self._copier.wait(left.mark)
            left.here = None
        return self._layers

    def put(self, tensor: Tensor, layer: int | None = None) -> Parked:
        """Keeps `tensor`, which must not be written to from now on; the caller may drop it. Without a layer it is one of its own."""
        layer = self.new_layer() if layer is None else layer
        size = tensor.numel() * tensor.element_size()
        buffer = self._take(size) if size else None
        if buffer is None:
            return Parked(self, tensor, None, layer)
        parked = Parked(self, tensor.contiguous(), buffer, layer)
        assert parked.here is not None
        parked.mark = self._copier.out(_as_bytes(parked.here), parked.host)
        self._leaving.append(parked)
        self._order = [reference for reference in self._order if reference() is not None]
        self._order.append(weakref.ref(parked))
        return parked

    def get(self, parked: Parked) -> Tensor:
        """The tensor of `parked`, and those put before it started on their way back."""
        if not parked.is_on_host:
            assert parked.here is not None
            return parked.here
        if parked in self._leaving:
            self._leaving.remove(parked)
            self._copier.wait(parked.mark)
            tensor = parked.here
        else:
            if parked.here is None:
                parked.fetch(self._copier)
            self._copier.wait(parked.mark)
            tensor = parked.here
        parked.here, parked.was_taken = None, True
        self._coming = [each for each in self._coming if (found := each()) is not None and found.here is not None]
        self._fetch_up_to(parked.layer)
        assert tensor is not None
        self._copier.hand(tensor)
        return tensor

    def _fetch_up_to(self, layer: int) -> None:
        """Starts what else this layer needs, and what the layers before it do."""
        coming = (each() for each in self._coming)
        under_way = {each.layer for each in (*coming, *self._leaving) if each is not None} - {layer}
        for reference in reversed(self._order):
            parked = reference()
            if parked is None or parked.layer > layer or parked.here is not None or parked.was_taken:
                continue
            if parked.layer != layer and parked.layer not in under_way:
                if len(under_way) >= self._settings.in_flight:
                    return
                under_way.add(parked.layer)
            parked.fetch(self._copier)
            self._coming.append(reference)

    def give_back(self, parked: Parked, buffer: Tensor) -> None:
        """The buffer of a tensor that nobody wants any more: used again for one of its size or less."""
        if parked.here is not None:
            # Fetched for nothing, and dropped wherever its graph is: the copy may still write it.
            self._copier.hold(parked.here)
        self.bytes_used -= parked.size
        self._free.append(buffer)

    def _take(self, size: int) -> Tensor | None:
        """The smallest free buffer of at least `size` bytes, or a new one; None where there is no room for it."""
        bound = self._settings.host_bytes
        fitting = [(buffer.numel(), index) for index, buffer in enumerate(self._free) if self._fits(buffer, size)]
        if fitting:
            buffer = self._free.pop(min(fitting)[1])
        elif bound is not None and self.bytes_held - sum(each.numel() for each in self._free) + size > bound:
            self._was_full = True
            return None
        else:
            self._make_room(size)
            buffer = self._copier.host_buffer(size)
            self.bytes_held += size
        self.bytes_used += size
        self.most_bytes_used = max(self.most_bytes_used, self.bytes_used)
        return buffer

    def _fits(self, buffer: Tensor, size: int) -> bool:
        """Once there has been no room for a tensor, an eighth too much is the most: it is what others lack."""
        slack = buffer.numel() - size
        return slack >= 0 and not (self._was_full and slack * 8 > size)

    def _make_room(self, size: int) -> None:
        """Lets free buffers go until no more is held with `size` more bytes than was ever used at once: none of each size stays behind."""
        limit = max(self.most_bytes_used, self.bytes_used + size)
        if self._free and self.bytes_held + size > limit:
            # They may have been given back before the last copy from or to them has ended.
            self._copier.finish()
        while self._free and self.bytes_held + size > limit:
            self.bytes_held -= self._free.pop(0).numel()


def make_store(device: torch.device, settings: Offload) -> HostStore:
    """The store for tensors of `device`."""
    copier = CudaCopier(device) if device.type == "cuda" else PlainCopier()
    return HostStore(copier, settings)


def _unregister(stream: torch.cuda.Stream, address: int) -> None:
    """Page-locked memory goes back, and not while a copy from or to it is on its way: a store may be dropped in the middle of a step."""
    stream.synchronize()
    runtime: Any = torch.cuda.cudart()
    runtime.cudaHostUnregister(address)


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)
