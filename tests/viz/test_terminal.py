"""A study printed: within the width, without colour in a pipe, and with the right numbers."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from ringspan.schedule.draw import cells
from ringspan.strategies import STRATEGIES
from ringspan.viz.palette import rank_colours
from ringspan.viz.study import Study, piece_sizes, study
from ringspan.viz.terminal import print_study

SIZES = piece_sizes(8, 2, 64, 2)


def printed(shown: Study, width: int = 80, direction: str = "forward", **options: bool) -> str:
    file = io.StringIO()
    print_study(shown, Console(file=file, width=width), direction=direction, **options)
    return file.getvalue()


def rows_of(text: str, header: str) -> list[list[str]]:
    """The rows of the table below `header`, up to the first empty line, split at two spaces or more."""
    lines = [line.rstrip() for line in text.splitlines()]
    start = next(index for index, line in enumerate(lines) if line.startswith(header)) + 1
    stop = next(index for index in range(start, len(lines)) if not lines[index] or ":" in lines[index])
    return [re.split(r"\s{2,}", line) for line in lines[start:stop]]


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
@pytest.mark.parametrize("ranks", [1, 3, 8, 20])
def test_everything_fits_into_eighty_columns(strategy: str, ranks: int):
    shown = study(strategy, length=1000, num_ranks=ranks, sizes=SIZES)
    for direction in ("forward", "backward"):
        text = printed(shown, direction=direction)
        assert max(map(len, text.splitlines())) <= 80
        assert "…" not in text.split("rank  owns")[0], "a word of the schedule is cut off"


def test_a_wide_terminal_shows_a_cell_on_one_line_and_a_narrow_one_stacks_it():
    shown = study("ring", layout="zigzag", length=32, num_ranks=4, sizes=SIZES)
    assert re.search(r"^0     q0×kv0  kv0\[0:4\]→r1  q1×kv1  kv1→r2 ", printed(shown, width=120), re.MULTILINE)
    narrow = printed(shown, width=80)
    assert re.search(r"^0     q0×kv0       q1×kv1       q2×kv2       q3×kv3 *\n      kv0\[0:4\]→r1  kv1→r2 ", narrow, re.MULTILINE)
    broken = printed(shown, width=50)
    assert re.search(r"^1     q0\[4:8\] +q1 +q2 +q3 *\n +×kv3 +×kv0\[0:4\] ", broken, re.MULTILINE)


def test_many_ranks_get_the_compact_table_more_get_a_sentence_and_full_prints_it_all():
    sixteen = study("ring", length=64, num_ranks=16, sizes=SIZES)
    text = printed(sixteen)
    assert re.search(r"^1    15 0  1  2  3 ", text, re.MULTILINE)
    assert "--full prints it" in " ".join(text.split())
    many = study("ring", length=64, num_ranks=32, sizes=SIZES)
    sentence = " ".join(printed(many).split())
    wide = int(re.search(r"32 columns × 32 steps does not fit in 80 columns: --full prints it, (\d+) columns wide", sentence)[1])
    full = printed(many, full=True)
    assert max(map(len, full.splitlines())) == wide
    drawn = full.split("rank  owns")[0]
    for row in cells(many.schedules.forward):
        for cell in row:
            assert all(word.text in drawn for word in cell.words)
    assert sum(line.startswith("r") and "→r" in line for line in full.splitlines()) == len(many.link_bytes["backward"])


def test_of_many_ranks_and_links_the_first_and_last_are_listed():
    text = printed(study("ring", length=64, num_ranks=32, sizes=SIZES))
    assert [row[0] for row in rows_of(text, "rank  owns")] == [
        *(f"r{rank}" for rank in range(8)),
        "…",
        *(f"r{rank}" for rank in range(24, 32)),
    ]
    assert ["…", "16 more"] in rows_of(text, "link")


def test_the_numbers_of_the_contiguous_ring_are_right():
    text = printed(study("ring", layout="contiguous", length=16, num_ranks=4, sizes=SIZES))
    assert rows_of(text, "rank  owns") == [
        ["r0", "0–3", "4", "10", "7.4%"],
        ["r1", "4–7", "4", "26", "19.1%"],
        ["r2", "8–11", "4", "42", "30.9%"],
        ["r3", "12–15", "4", "58", "42.6%"],
    ]
    # A position of kv weighs 2 · 2 heads · 64 · 2 bytes, one of its gradient twice that; a shard has four.
    assert rows_of(text, "link") == [
        ["r0→r1", "2.00 KiB", "2.00 KiB"],
        ["r1→r2", "4.00 KiB", "8.00 KiB"],
        ["r2→r3", "6.00 KiB", "14.0 KiB"],
        ["r3→r0", "0 B", "4.00 KiB"],
        ["r3→r1", "0 B", "4.00 KiB"],
        ["r3→r2", "0 B", "4.00 KiB"],
        ["busiest", "6.00 KiB", "14.0 KiB"],
    ]
    assert rows_of(text, "rank  sends")[2] == ["r2", "6.00 KiB", "14.0 KiB", "4.00 KiB", "12.0 KiB"]
    assert rows_of(text, "rank  sends")[4] == ["all", "12.0 KiB", "36.0 KiB"]
    words = " ".join(text.split())
    assert "136 pairs, at most 58 on one rank: imbalance 1.71 (largest / mean). Idle: 41.4% of the ranks' time." in words
    assert "proved: every allowed pair exactly once (136) and no forbidden one, every send received" in words


def test_waiting_at_every_step_is_told_apart_from_waiting_at_the_end():
    words = " ".join(printed(study("pass_query", mask="window:5", length=32, num_ranks=4, sizes=SIZES)).split())
    assert "Idle: 7.8% of the ranks' time, 28.6% if all wait for the slowest at every step." in words


def test_a_rank_that_owns_nothing_and_a_single_rank_are_shown():
    text = printed(study("ring", length=2, num_ranks=4, sizes=SIZES))
    assert rows_of(text, "rank  owns")[3] == ["r3", "nothing", "0", "0", "0.0%"]
    alone = printed(study("ring", length=1, num_ranks=1, sizes=SIZES))
    assert "Nothing is sent." in alone and "1 rank · 1 position · forward" in alone and "1 pair, " in alone


def test_head_groups_are_named_and_their_heads_counted():
    text = printed(study("two_dimensional", length=32, num_ranks=4, sizes=piece_sizes(6, 2, 64, 2)))
    assert "(g0 = r0+r1, g1 = r2+r3)" in text and "kv1→g0" in text
    assert rows_of(text, "rank  owns")[3] == ["r3", "12–15, 16–19", "8", "264", "3", "25.0%"]


def test_a_pipe_gets_no_colour_and_a_terminal_the_colour_of_the_owner():
    shown = study("ring", layout="contiguous", length=8, num_ranks=2, sizes=SIZES)
    assert "\x1b" not in printed(shown)
    file = io.StringIO()
    print_study(shown, Console(file=file, width=80, force_terminal=True, color_system="truecolor"))
    colour = ";".join(str(int(rank_colours(2)[0][i : i + 2], 16)) for i in (1, 3, 5))
    assert f"q1×\x1b[38;2;{colour}mkv0\x1b[0m" in file.getvalue()
