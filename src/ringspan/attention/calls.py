"""What calls that ask for the same share: one `Sequence`, agreed on at the first of them and found without a word from then on."""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ringspan.attention.checks import problem_of
from ringspan.attention.context_parallel import ContextParallel
from ringspan.attention.sequence import Sequence
from ringspan.errors import RankFailure, RingspanError
from ringspan.geometry import Layout, Mask
from ringspan.transport import InProcessTransport, SingleRank, Transport, agree, check_not_launched, make_transport

Group = DeviceMesh | dist.ProcessGroup | InProcessTransport | None

MAX_SEQUENCES = 64
"""How many sequences a group keeps; the one that was longest not asked for goes first. Packed batches bring a new one each."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What every rank asks for alike. Equal requests share a `Sequence`.

    Attributes:
        function: what the user called.
        strategy: see `ContextParallel`, as `layout` and `kernel`.
        length: tokens of the whole sequence, or None where they are to be inferred: as many ranks as there are times `shard_length`.
        shard_length: this rank's tokens, where `length` is None.
        options: further keywords of `ContextParallel`, sorted by name.
        mask: what the mask is made of.
        make: the layout and the mask, from the number of ranks and the length; says the same for equal requests.
    """

    function: str
    strategy: str
    layout: str
    kernel: str
    length: int | None
    shard_length: int | None = None
    options: tuple[tuple[str, int | str], ...] = ()
    mask: tuple[tuple[str, Hashable], ...] = ()
    make: Callable[[int, int], tuple[Layout, Mask]] = field(compare=False, repr=False)

    def __str__(self) -> str:
        shown = {part.name: getattr(self, part.name) for part in fields(self) if part.name in ("strategy", "layout", "kernel", "length")}
        return self.function + "".join(f" {name}={_short(value)}" for name, value in (*shown.items(), *self.options, *self.mask))


def promising(request: Request, deterministic: bool) -> Request:
    """`request`, with the promise of the same bits at every run where it is asked for."""
    return replace(request, options=(*request.options, ("deterministic", True))) if deterministic else request


def find_sequence(group: Group, function: str, prepare: Callable[[], Request]) -> Sequence:
    """The `Sequence` of a request; the first time on a group that is collective, afterwards it is a look-up.

    Args:
        group: as `ContextParallel` takes it.
        function: what the user called.
        prepare: the request, or an error where this rank was asked for what it cannot do: every rank then raises.

    Raises:
        RingspanError: on every rank, where one of them refuses, they disagree, or their shards do not add up.
    """
    transport = transport_of(group)
    kept = _kept(transport)
    prepared: list[Request] = []
    problem = problem_of(lambda: prepared.append(prepare()))
    request = None if problem else prepared[0]
    if request is not None and (found := kept.sequences.get(request)) is not None:
        kept.sequences.move_to_end(request)
        return found
    _agree(transport, function, str(request or function), problem)
    assert request is not None
    sequence = kept.sequences[request] = _make(group, transport, kept, request)
    if len(kept.sequences) > MAX_SEQUENCES:
        kept.sequences.popitem(last=False)
    return sequence


def transport_of(group: Group) -> Transport:
    """The transport over `group`: the same object for the same group, since what is kept is kept there."""
    if group is None and not (dist.is_available() and dist.is_initialized()):
        check_not_launched()
        return _alone()
    return make_transport(group)


@cache
def _alone() -> SingleRank:
    return SingleRank()


@dataclass(frozen=True)
class _Kept:
    contexts: dict[tuple, ContextParallel] = field(default_factory=dict)
    sequences: OrderedDict[Request, Sequence] = field(default_factory=OrderedDict)


def _kept(transport: Transport) -> _Kept:
    # On the transport itself: contexts point to it, so that a table outside, weak keys or not, would keep every group for ever.
    return vars(transport).setdefault("_kept_calls", _Kept())


def _agree(transport: Transport, function: str, asked: str, problem: RingspanError | None) -> None:
    try:
        agree(transport, function, asked, problem)
    except RankFailure as failure:
        # The other ranks are elsewhere, having asked for something else: what this one refuses is the better explanation.
        if problem is None:
            raise
        raise problem from failure


def _make(group: Group, transport: Transport, kept: _Kept, request: Request) -> Sequence:
    length = request.length
    if length is None:
        length = _inferred(transport, request)
    layout, mask = request.make(transport.size, length)
    if request.length is None and set(layout.shard_lengths) != {request.shard_length}:
        raise _uneven(request, list(layout.shard_lengths), f"layout {layout.name!r} has shards of")
    key = (request.strategy, request.layout, request.kernel, request.options)
    if key not in kept.contexts:
        options: dict[str, Any] = dict(request.options)
        names = {"strategy": request.strategy, "layout": request.layout, "kernel": request.kernel}
        kept.contexts[key] = ContextParallel(group, **names, **options)
    return Sequence(kept.contexts[key], layout, mask)


def _inferred(transport: Transport, request: Request) -> int:
    """Shards of one length on all ranks add up; others do not, even where they would.

    One of 5 and one of 6 tokens on two ranks are both 3 tokens on rank 0, which could not tell them apart without asking at every call.
    """
    lengths = transport.gather_objects(request.shard_length)
    if len(set(lengths)) > 1:
        raise _uneven(request, lengths, "the ranks hold")
    return lengths[0] * transport.size


def _uneven(request: Request, lengths: list[int], found: str) -> RingspanError:
    return RingspanError(
        f"{request.function} without a length",
        f"{found} {', '.join(map(str, lengths[:8]))}{', …' if len(lengths) > 8 else ''} tokens",
        "A length is inferred only from shards that are equally long on all ranks",
        f"ringspan.attention(…, length={sum(lengths)}), and shards as ContextParallel(…).sequence({sum(lengths)}).shard(x) cuts them",
    )


def _short(value: object) -> str:
    """`value` as text that differs where it differs, short where it is long."""
    if not isinstance(value, tuple) or len(value) <= 8:
        return repr(value)
    head = ", ".join(map(repr, value[:8]))
    return f"({head}, … {len(value)} in all, checksum {zlib.crc32(repr(value).encode()):08x})"
