"""Times, rates and counts as a reader likes them: three figures."""

from __future__ import annotations


def seconds_text(seconds: float) -> str:
    """`1.23 s`, `12.3 ms`, `45.6 µs`, `0`."""
    if not seconds:
        return "0"
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= 0.9995 * size:
            return f"{_figures(seconds / size)} {unit}"
    return f"{_figures(seconds / 1e-6)} µs"


def rate_text(per_second: float, what: str) -> str:
    """`12.3 GFLOP/s`, `456 MB/s`."""
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if per_second >= 0.9995 * size:
            return f"{_figures(per_second / size)} {prefix}{what}/s"
    return f"{_figures(per_second)} {what}/s"


def percent(share: float) -> str:
    """`93%`; `0.4%` below one, and `0%` below a twentieth of one."""
    return f"{100 * share:.0f}%" if share >= 0.0095 or share < 0.0005 else f"{100 * share:.1f}%"


def count_text(number: int | float) -> str:
    """`4,096`."""
    return f"{number:,.0f}"


def _figures(value: float) -> str:
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}"
