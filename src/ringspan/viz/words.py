"""Numbers and positions as a reader likes them."""

from __future__ import annotations

from collections.abc import Sequence

from ringspan.geometry import Span

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_POWERS = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")


def grouped(number: int) -> str:
    """`1 234 567`."""
    return f"{number:,}".replace(",", " ")


def counted(number: int, word: str) -> str:
    """`1 rank`, `4 ranks`."""
    return f"{grouped(number)} {word}{'' if number == 1 else 's'}"


def short_count(number: int) -> str:
    """Exact up to 99 999; then three figures: `262 k`, `8.59 G`."""
    if abs(number) < 100_000:
        return grouped(number)
    value, unit = float(number), 0
    while value >= 999.5 and unit + 1 < len(_POWERS):
        value, unit = value / 1000, unit + 1
    return f"{value:.{2 - (value >= 9.995) - (value >= 99.95)}f} {_POWERS[unit]}"


def bytes_text(count: int) -> str:
    """`512 B`, `1.50 KiB`, `12.0 MiB`: three figures, units of 1024."""
    if count < 1024:
        return f"{count} B"
    value, unit = float(count), 0
    while value >= 1023.5 and unit + 1 < len(_UNITS):
        value, unit = value / 1024, unit + 1
    return f"{value:.{2 - (value >= 9.995) - (value >= 99.95)}f} {_UNITS[unit]}"


def percent(fraction: float) -> str:
    """`41.4%`."""
    return f"{100 * fraction:.1f}%"


def spans_text(spans: Sequence[Span]) -> str:
    """`0–3, 28–31`; with gaps `1, 5, … 29`; `nothing`."""
    return ", ".join(map(_span_text, spans)) or "nothing"


def _span_text(span: Span) -> str:
    if len(span) == 1:
        return str(span.start)
    if span.step == 1:
        return f"{span.start}–{span.last}"
    if len(span) <= 3:
        return ", ".join(map(str, span))
    return f"{span.start}, {span.start + span.step}, … {span.last}"
