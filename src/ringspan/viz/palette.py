"""A colour for each rank, the same in the terminal and in pictures, that colour-blind readers can tell apart."""

from __future__ import annotations

# Okabe and Ito's colours, in an order that keeps the first four far apart in hue and in brightness.
_FEW = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#7A7A7A")
# Viridis without its ends, which would sink into a black or a white background: for many ranks, brightness follows the rank.
_MANY = ("#46327E", "#365C8D", "#277F8E", "#1FA187", "#4AC16D", "#A0DA39", "#E3E418")


def rank_colours(num_ranks: int) -> tuple[str, ...]:
    """`#RRGGBB` for each rank: up to eight by name, more along a ramp."""
    if num_ranks <= len(_FEW):
        return _FEW[:num_ranks]
    return tuple(_on_ramp(rank / (num_ranks - 1)) for rank in range(num_ranks))


def _on_ramp(place: float) -> str:
    low = min(int(place * (len(_MANY) - 1)), len(_MANY) - 2)
    share = place * (len(_MANY) - 1) - low
    mixed = (round(a + (b - a) * share) for a, b in zip(_channels(_MANY[low]), _channels(_MANY[low + 1]), strict=True))
    return "#" + "".join(f"{value:02X}" for value in mixed)


def text_on(colour: str) -> str:
    """Black or white, whichever contrasts more with `colour` (WCAG relative luminance)."""
    red, green, blue = (_linear(value / 255) for value in _channels(colour))
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return "#FFFFFF" if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05 else "#000000"


def _channels(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def _linear(value: float) -> float:
    return value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
