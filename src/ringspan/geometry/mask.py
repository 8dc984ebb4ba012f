"""Masks: which keys a query may see, as bands of global positions. Every mask is a union of disjoint regions; `&` joins two."""

from __future__ import annotations

import operator
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ringspan.errors import RingspanError


@dataclass(frozen=True, slots=True)
class Region:
    """Global queries `[q_start, q_stop)` × keys `[k_start, k_stop)`, allowed where `low <= query − key <= high`."""

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    low: int | None = None
    high: int | None = None


MaskMod = Callable[[Any, Any, Any, Any], Any]
"""FlexAttention's `mask_mod(b, h, q_idx, kv_idx)`: broadcastable index tensors to a boolean tensor, True where the pair is allowed."""


@dataclass(frozen=True)
class Mask:
    """What a query may see."""

    @property
    def name(self) -> str:
        """The mask in the words that `parse_mask` reads."""
        raise NotImplementedError

    @property
    def mod(self) -> MaskMod | None:
        """What must hold for a pair besides lying in a region, or None where the regions say everything."""
        return None

    @property
    def functions(self) -> tuple[MaskMod, ...]:
        """The users' functions that `mod` asks, in order."""
        return ()

    def check_length(self, length: int) -> None:
        """Passes where the mask says something about every pair of a sequence of `length`.

        Raises:
            RingspanError: where it does not.
        """

    def regions(self, q_start: int, q_stop: int, k_start: int, k_stop: int) -> Iterable[Region]:
        """Disjoint regions that hold every allowed pair of the rectangle, and (`mod` aside) no forbidden pair of it."""
        raise NotImplementedError

    def __and__(self, other: Mask) -> Mask:
        if not isinstance(other, Mask):
            raise RingspanError(f"{self} & {other!r}", f"it is of type {type(other).__name__}", "Masks are joined with masks", "full()")
        return Both(self, other)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Full(Mask):
    """Every query sees every key."""

    @property
    def name(self) -> str:
        """`full`."""
        return "full"

    def regions(self, q_start: int, q_stop: int, k_start: int, k_stop: int) -> Iterable[Region]:
        """The rectangle itself."""
        return (Region(q_start, q_stop, k_start, k_stop),)


@dataclass(frozen=True)
class Band(Mask):
    """A query sees the keys from `left` before it to `right` after it; None is no bound. Causal is `right=0`."""

    left: int | None
    right: int | None

    @property
    def name(self) -> str:
        """`causal`, or `window:LEFT,RIGHT`."""
        if self.left is None and self.right == 0:
            return "causal"
        return f"window:{'' if self.left is None else self.left},{'' if self.right is None else self.right}"

    def regions(self, q_start: int, q_stop: int, k_start: int, k_stop: int) -> Iterable[Region]:
        """The rectangle with `−right <= query − key <= left`."""
        return (Region(q_start, q_stop, k_start, k_stop, None if self.right is None else -self.right, self.left),)


@dataclass(frozen=True)
class Documents(Mask):
    """A query sees the keys of its own document. `borders` are the cumulative lengths, 0 first (flash-attn's `cu_seqlens`)."""

    borders: tuple[int, ...]

    @property
    def name(self) -> str:
        """`documents:LENGTH,LENGTH,…`."""
        return "documents:" + ",".join(str(stop - start) for start, stop in pairwise(self.borders))

    def check_length(self, length: int) -> None:
        """See `Mask.check_length`: the documents' lengths add up to `length`."""
        if self.borders[-1] != length:
            raise RingspanError(
                f"a sequence of {length} tokens with documents of {self.borders[-1]} in all",
                f"{len(self.borders) - 1} documents",
                "Every position belongs to a document",
                "cu_seqlens that end with the length; give padding a document of its own",
            )

    def regions(self, q_start: int, q_stop: int, k_start: int, k_stop: int) -> Iterable[Region]:
        """A square for each document, cut to the rectangle."""
        first = bisect_right(self.borders, max(q_start, k_start)) - 1
        for index in range(max(first, 0), bisect_left(self.borders, min(q_stop, k_stop))):
            if index + 1 == len(self.borders):
                return
            start, stop = self.borders[index], self.borders[index + 1]
            yield Region(max(q_start, start), min(q_stop, stop), max(k_start, start), min(k_stop, stop))


@dataclass(frozen=True)
class Prefix(Mask):
    """Every query sees the first `prefix` keys, and of the others those that are not after it (prefix-LM)."""

    prefix: int

    @property
    def name(self) -> str:
        """`prefix:LENGTH`."""
        return f"prefix:{self.prefix}"

    def regions(self, q_start: int, q_stop: int, k_start: int, k_stop: int) -> Iterable[Region]:
        """The prefix in full, the rest causal."""
        border = min(max(self.prefix, k_start), k_stop)
        yield Region(q_start, q_stop, k_start, border)
        yield Region(q_start, q_stop, border, k_stop, low=0)


@dataclass(frozen=True)
class BlockSparse(Mask):
    """Blocks of `block` × `block` positions; a query block sees the key blocks that its row of `pattern` marks."""

    block: int
    pattern: tuple[tuple[bool, ...], ...]

    @property
    def name(self) -> str:
        """`blocks:SIZE:ROW/ROW/…`, each row of 0 and 1."""
        return f"blocks:{self.block}:" + "/".join("".join("01"[bit] for bit in row) for row in self.pattern)

    def check_length(self, length: int) -> None:
        """See `Mask.check_length`: the blocks reach the end of the sequence."""
        if length > self.block * len(self.pattern):
            raise RingspanError(
                f"a sequence of {length} tokens with {len(self.pattern)} blocks of {self.block}",
                f"the blocks end at {self.block * len(self.pattern)}",
                "Every position belongs to a block",
                f"{-(-length // self.block)} rows and columns of blocks",
            )

    def regions(self, q_start: int, q_stop: int, k_start: int, k_stop: int) -> Iterable[Region]:
        """A region for each marked block, cut to the rectangle."""
        for row in range(q_start // self.block, -(-q_stop // self.block)):
            top, bottom = max(q_start, row * self.block), min(q_stop, (row + 1) * self.block)
            for column in range(k_start // self.block, -(-k_stop // self.block)):
                if self.pattern[row][column]:
                    yield Region(top, bottom, max(k_start, column * self.block), min(k_stop, (column + 1) * self.block))


@dataclass(frozen=True)
class Predicate(Mask):
    """What a user's own `mask_mod(b, h, q_idx, kv_idx)` allows, on global positions. Join it with a mask of regions to spare work."""

    mask_mod: MaskMod

    @property
    def name(self) -> str:
        """`mask_mod NAME`."""
        return f"mask_mod {getattr(self.mask_mod, '__qualname__', type(self.mask_mod).__qualname__)}"

    @property
    def mod(self) -> MaskMod | None:
        """The user's function."""
        return self.mask_mod

    @property
    def functions(self) -> tuple[MaskMod, ...]:
        """The user's function."""
        return (self.mask_mod,)

    def regions(self, q_start: int, q_stop: int, k_start: int, k_stop: int) -> Iterable[Region]:
        """The rectangle: only the function knows."""
        return (Region(q_start, q_stop, k_start, k_stop),)


@dataclass(frozen=True)
class Both(Mask):
    """What two masks both allow."""

    first: Mask
    second: Mask

    @property
    def name(self) -> str:
        """Both names, joined by `&`."""
        return f"{self.first.name}&{self.second.name}"

    @property
    def mod(self) -> MaskMod | None:
        """Both functions, where both masks have one."""
        mods = [mask.mod for mask in (self.first, self.second) if mask.mod is not None]
        if len(mods) < 2:
            return mods[0] if mods else None
        return lambda b, h, q_idx, kv_idx: mods[0](b, h, q_idx, kv_idx) & mods[1](b, h, q_idx, kv_idx)

    @property
    def functions(self) -> tuple[MaskMod, ...]:
        """Those of both masks."""
        return self.first.functions + self.second.functions

    def check_length(self, length: int) -> None:
        """See `Mask.check_length`: both masks fit."""
        self.first.check_length(length)
        self.second.check_length(length)

    def regions(self, q_start: int, q_stop: int, k_start: int, k_stop: int) -> Iterable[Region]:
        """The second mask's regions inside each of the first's, with the narrower band of the two."""
        for outer in self.first.regions(q_start, q_stop, k_start, k_stop):
            if outer.q_start < outer.q_stop and outer.k_start < outer.k_stop:
                for inner in self.second.regions(outer.q_start, outer.q_stop, outer.k_start, outer.k_stop):
                    low = max((bound for bound in (outer.low, inner.low) if bound is not None), default=None)
                    high = min((bound for bound in (outer.high, inner.high) if bound is not None), default=None)
                    yield Region(inner.q_start, inner.q_stop, inner.k_start, inner.k_stop, low, high)


def looks_ahead(mask: Mask) -> bool:
    """Whether any query may see a key after it. False is proven; True where nothing excludes it."""
    if isinstance(mask, Both):
        return looks_ahead(mask.first) and looks_ahead(mask.second)
    return not (isinstance(mask, Band) and mask.right == 0)


def depends_on_position(mask: Mask) -> bool:
    """Whether moving a query and a key by as much may change what is allowed. False is proven; True where nothing excludes it."""
    if isinstance(mask, Both):
        return depends_on_position(mask.first) or depends_on_position(mask.second)
    return not isinstance(mask, Band | Full)


def document_borders(mask: Mask) -> frozenset[int]:
    """Where documents begin and end under `mask`; empty where it knows none."""
    if isinstance(mask, Both):
        return document_borders(mask.first) | document_borders(mask.second)
    return frozenset(mask.borders) if isinstance(mask, Documents) else frozenset()


def has_window(mask: Mask) -> bool:
    """Whether a kernel that knows triangles alone is not enough: some band is bounded on the left, or on the right beyond the query."""
    if isinstance(mask, Both):
        return has_window(mask.first) or has_window(mask.second)
    return isinstance(mask, Band) and mask.left is not None


def full() -> Mask:
    """Every query sees every key."""
    return Full()


def causal() -> Mask:
    """A query sees the keys at its own position and before it."""
    return Band(None, 0)


def sliding_window(left: int | None, right: int | None = 0) -> Mask:
    """A query sees `left` keys before it, itself, and `right` keys after it (flash-attn's `window_size=(left, right)`; None: no bound).

    Hugging Face's `sliding_window=w` counts the query itself: it is `sliding_window(w - 1)`.

    Raises:
        RingspanError: for a negative bound.
    """
    if any(bound is not None and (isinstance(bound, bool) or not isinstance(bound, int) or bound < 0) for bound in (left, right)):
        raise RingspanError(
            f"sliding_window({left}, {right})", "", "A window's bounds are whole numbers of at least 0, or None", "sliding_window(4095)"
        )
    return Band(left, right)


def documents(cu_seqlens: Sequence[int] | None = None, *, ids: Sequence[int] | None = None) -> Mask:
    """A query sees the keys of its own document alone. Join it: `causal() & documents(…)`.

    Args:
        cu_seqlens: the documents' borders, 0 first and the length last, as flash-attn takes them (a list, or a tensor of integers).
        ids: instead, each position's document: equal ids stand together.

    Raises:
        RingspanError: for borders that do not rise from 0, or ids of which one comes back after another.
    """
    if (cu_seqlens is None) == (ids is None):
        raise RingspanError(
            "documents()", "cu_seqlens and ids are both or neither given", "Documents are given one way", "cu_seqlens=[0, 5, 9]"
        )
    if ids is not None:
        values = _integers(ids)
        starts = [index for index, value in enumerate(values) if index == 0 or value != values[index - 1]]
        if len({values[start] for start in starts}) != len(starts):
            raise RingspanError(
                "documents(ids=…)", "an id comes back after another document", "The tokens of a document stand together", "ids that rise"
            )
        cu_seqlens = [*starts, len(values)]
    borders = tuple(_integers(() if cu_seqlens is None else cu_seqlens))
    if len(borders) < 2 or borders[0] != 0 or any(stop <= start for start, stop in pairwise(borders)):
        raise RingspanError(
            f"documents(cu_seqlens={list(borders[:8])}{'…' if len(borders) > 8 else ''})",
            "the borders do not rise from 0",
            "cu_seqlens begin with 0, rise, and end with the length",
            "cu_seqlens=[0, 5, 9] for documents of 5 and 4 tokens",
        )
    return Documents(borders)


def prefix_lm(prefix: int) -> Mask:
    """Every query sees the first `prefix` keys; the rest is causal.

    Raises:
        RingspanError: for a negative prefix.
    """
    if isinstance(prefix, bool) or not isinstance(prefix, int) or prefix < 0:
        raise RingspanError(f"prefix_lm({prefix!r})", "", "A prefix is a whole number of at least 0 tokens", "prefix_lm(128)")
    return Prefix(prefix)


def block_sparse(block: int, pattern: Sequence[Sequence[bool]]) -> Mask:
    """Query block i sees key block j where `pattern[i][j]`. Join it with `causal()` where blocks on the diagonal are to be triangles.

    Raises:
        RingspanError: for a block below 1, or a pattern that is empty or not square.
    """
    try:
        rows = tuple(tuple(bool(bit) for bit in row) for row in pattern)
    except TypeError:
        rows = ()
    if type(block) is not int or block < 1 or not rows or any(len(row) != len(rows) for row in rows):
        raise RingspanError(
            f"block_sparse({block!r}, {len(rows)} rows of {sorted({len(row) for row in rows})})",
            "",
            "Blocks have at least one position, and the pattern is square",
            "block_sparse(64, [[1, 0], [1, 1]])",
        )
    return BlockSparse(block, rows)


def mask_mod(function: MaskMod) -> Mask:
    """What `function(b, h, q_idx, kv_idx)` allows, on global positions, with FlexAttention's signature.

    Joined with regions (`causal() & mask_mod(f)`), blocks outside of them cost nothing. The function is its own identity: keep one object
    and pass it again, or every call plans anew. It says the same on every rank, and always: ranks compare its code and the values that it
    reads when they first meet it, and not again.

    Raises:
        RingspanError: where `function` cannot be called, or cannot be hashed.
    """
    found = "it cannot be called" if not callable(function) else "it cannot be hashed" if type(function).__hash__ is None else None
    if found is not None:
        rule = "A mask_mod is a function of (b, h, q_idx, kv_idx), by whose identity plans are kept"
        raise RingspanError(f"mask_mod({function!r})", found, rule, "mask_mod(f)")
    return Predicate(function)


def _integers(values: Any) -> list[int]:
    try:
        return [operator.index(value) for value in (values.tolist() if hasattr(values, "tolist") else values)]
    except TypeError:
        raise RingspanError(
            f"documents of {str(values)[:60]}", "", "Borders and ids are whole numbers, in one row", "cu_seqlens=[0, 5, 9]"
        ) from None
