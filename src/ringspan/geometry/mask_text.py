"""Masks as text: what a command line takes, and what `Mask.name` writes."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

from ringspan.errors import RingspanError
from ringspan.geometry.mask import Mask, block_sparse, causal, documents, full, prefix_lm, sliding_window


def _parse_window(text: str) -> Mask:
    bounds = [int(bound) if bound else None for bound in text.split(",")]
    return sliding_window(*bounds) if len(bounds) <= 2 else sliding_window(-1)


def _parse_blocks(text: str) -> Mask:
    size, _, rows = text.partition(":")
    assert set(rows) <= set("01/")
    return block_sparse(int(size), [[bit == "1" for bit in row] for row in rows.split("/")])


MASK_FORMS: dict[str, tuple[str, Callable[[str], Mask]]] = {
    "causal": ("causal", lambda _: causal()),
    "full": ("full", lambda _: full()),
    "window": ("window:LEFT[,RIGHT]", _parse_window),
    "documents": ("documents:LENGTH,LENGTH,…", lambda text: documents([0, *accumulate(int(length) for length in text.split(","))])),
    "prefix": ("prefix:LENGTH", lambda text: prefix_lm(int(text))),
    "blocks": ("blocks:SIZE:ROW/ROW/…", _parse_blocks),
}
"""By name: how the mask is written, and what reads it."""

MASKS: tuple[str, ...] = ("causal", "full")
"""The masks that need no number."""


def parse_mask(text: str) -> Mask:
    """The mask that `text` names: one of `MASK_FORMS`, or several joined by `&`, as in `causal&documents:100,28`.

    Raises:
        RingspanError: for a name that is not one of `MASK_FORMS`, or numbers that do not read.
    """
    if not isinstance(text, str):
        raise RingspanError(f"mask {text!r}", f"it is of type {type(text).__name__}", "A mask is written as text", "'causal'")
    masks = []
    for part in text.split("&"):
        name, _, numbers = part.strip().partition(":")
        try:
            form, make = MASK_FORMS[name]
            assert bool(numbers) == (":" in form)
            masks.append(make(numbers))
        except RingspanError:
            raise
        except (KeyError, ValueError, AssertionError):
            forms = ", ".join(form for form, _ in MASK_FORMS.values())
            raise RingspanError(
                f"mask {text!r}", f"{part!r} does not read; the masks are {forms}", "Masks are joined by &", "causal"
            ) from None
    result = masks[0]
    for other in masks[1:]:
        result = result & other
    return result
