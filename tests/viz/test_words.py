"""Numbers, positions and colours as they are shown."""

from __future__ import annotations

import pytest

from ringspan.geometry import Span
from ringspan.viz.palette import rank_colours, text_on
from ringspan.viz.words import bytes_text, counted, grouped, percent, short_count, spans_text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1536, "1.50 KiB"),
        (10240, "10.0 KiB"),
        (1048575, "1.00 MiB"),
        (130 << 40, "130 TiB"),
    ],
)
def test_bytes_have_three_figures_and_units_of_1024(count: int, text: str):
    assert bytes_text(count) == text


@pytest.mark.parametrize(("number", "text"), [(99_999, "99 999"), (262_144, "262 k"), (999_999, "1.00 M"), (8_589_942_784, "8.59 G")])
def test_large_counts_are_shortened_and_others_exact(number: int, text: str):
    assert short_count(number) == text


def test_numbers_are_grouped_counted_and_turned_into_percents():
    assert (grouped(1234567), counted(1, "rank"), counted(4, "rank"), percent(0.4137)) == ("1 234 567", "1 rank", "4 ranks", "41.4%")


@pytest.mark.parametrize(
    ("spans", "text"),
    [
        ((Span(0, 4), Span(28, 32)), "0–3, 28–31"),
        ((Span(7, 8),), "7"),
        ((Span(1, 32, 4),), "1, 5, … 29"),
        ((Span(1, 12, 4),), "1, 5, 9"),
        ((), "nothing"),
    ],
)
def test_owned_positions_read_well(spans: tuple[Span, ...], text: str):
    assert spans_text(spans) == text


@pytest.mark.parametrize("num_ranks", [1, 4, 8, 9, 64])
def test_every_rank_has_a_colour_of_its_own(num_ranks: int):
    colours = rank_colours(num_ranks)
    assert len(set(colours)) == num_ranks == len(colours)
    assert all(len(colour) == 7 and int(colour[1:], 16) >= 0 for colour in colours)


@pytest.mark.parametrize("num_ranks", [8, 64])
def test_text_on_every_colour_has_a_contrast_of_at_least_four_and_a_half(num_ranks: int):
    def luminance(colour: str) -> float:
        values = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in values]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for colour in rank_colours(num_ranks):
        low, high = sorted((luminance(colour), luminance(text_on(colour))))
        assert (high + 0.05) / (low + 0.05) >= 4.5  # WCAG AA for normal text
