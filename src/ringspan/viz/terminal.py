"""A study on a terminal, or in a pipe: the table of its schedule, and the numbers behind it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ringspan.schedule.draw import Cell, Word, cells, compact_cells
from ringspan.viz.palette import rank_colours
from ringspan.viz.study import DIRECTIONS, Study
from ringspan.viz.words import bytes_text, counted, grouped, percent, spans_text

_MOST_ROWS = 16
_GAP = 2


def print_study(study: Study, console: Console, *, direction: str = "forward", full: bool = False) -> None:
    """Prints the schedule of `direction`, who owns what, work, bytes and the proof.

    Args:
        study: what is shown.
        console: its width decides how much of the table fits.
        direction: `forward` or `backward`; bytes and proof are given for both.
        full: prints the table and every link however wide and long that gets.
    """
    facts = f"{counted(study.num_ranks, 'rank')} · {counted(study.layout.length, 'position')} · {direction}"
    console.print(Text.assemble((study.title, "bold"), f"   {facts}"))
    if study.reason:
        console.print(f"auto chose {study.reason}.", highlight=False)
    console.print()
    _print_schedule(study, console, direction, full)
    console.print()
    _print(console, _work_table(study, direction, full))
    console.print(work_sentence(study, direction), highlight=False)
    console.print()
    _print(console, _bytes_table(study, full))
    console.print(f"A visitor's room: for each kind of piece the most that lies there at once. {bytes_assumption(study)}", highlight=False)
    console.print()
    _print(console, _links_table(study, full))
    console.print()
    console.print(Text(proof_sentence(study), style="green"))


# ---- the schedule ----------------------------------------------------------------------------------------------------------------


def _print_schedule(study: Study, console: Console, direction: str, full: bool) -> None:
    schedule = study.schedule(direction)
    colours, letter = rank_colours(study.num_lanes), study.lane_letter
    if study.schedules.grid is not None:
        console.print(exchange_sentence(study), highlight=False)
    table = cells(schedule, letter)
    forms = [[[form(cell, colours) for cell in row] for row in table] for form in (_one_line, _stacked, _broken)]
    chosen = forms[0] if full else next((form for form in forms if table_width(form) <= console.width), None)
    if chosen is not None:
        _print(console, _schedule_table(chosen, letter))
        console.print(_explanation(table, letter), style="dim", highlight=False)
        return
    compact = [[Text(text, style=_compact_style(text, colours)) for text in row] for row in compact_cells(schedule)]
    needed = f"--full prints it, {table_width(forms[0])} columns wide; --png draws it."
    if table_width(compact, gap=1) <= console.width:
        _print(console, _schedule_table(compact, letter, gap=1))
        console.print(
            "Each cell names whose keys visit (q: whose queries); → something only moves. "
            f"The table of every action does not fit: {needed}",
            style="dim",
            highlight=False,
        )
        return
    steps = schedule.num_steps
    console.print(
        f"The table of {study.num_lanes} columns × {steps} steps does not fit in {console.width} columns: {needed}", highlight=False
    )


def table_width(rows: Sequence[Sequence[Text]], gap: int = _GAP) -> int:
    """The columns that a table of `rows` takes, one for each rank and one for the step."""
    width = len("step")
    for rank, column in enumerate(zip(*rows, strict=True)):
        width += gap + max(len(f"r{rank}"), *(max((len(line) for line in text.plain.split("\n")), default=0) for text in column))
    return width


def _schedule_table(rows: Sequence[Sequence[Text]], letter: str, gap: int = _GAP) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style="bold")
    table.add_column("step", no_wrap=True)
    for rank, colour in enumerate(rank_colours(len(rows[0]))):
        table.add_column(Text(f"{letter}{rank}", style=f"bold {colour}"), no_wrap=True)
    tall = any("\n" in text.plain for row in rows for text in row)
    for step, row in enumerate(rows):
        if tall and step:
            table.add_row()
        table.add_row(str(step), *row)
    return table


def _coloured(word: Word, colours: Sequence[str], break_before: str = "") -> Text:
    text = Text()
    for part, owner in word.parts:
        if break_before and part.startswith(break_before) and text:
            text.append("\n")
        text.append(part, style=None if owner is None else colours[owner])
    return text


def _one_line(cell: Cell, colours: Sequence[str]) -> Text:
    return Text("  ").join(_coloured(word, colours) for word in cell.words)


def _stacked(cell: Cell, colours: Sequence[str]) -> Text:
    return Text("\n").join(_coloured(word, colours) for word in cell.words)


def _broken(cell: Cell, colours: Sequence[str]) -> Text:
    """Stacked, and what is computed or sent is broken once more, before the sign."""
    lines = [_coloured(word, colours, "×") for word in cell.attends]
    lines += [_coloured(word, colours, "←") for word in cell.combines]
    lines += [_coloured(word, colours, "→") for word in cell.sends]
    return Text("\n").join(lines)


def _compact_style(text: str, colours: Sequence[str]) -> str:
    number = text.lstrip("q")
    return colours[int(number)] if number.isdigit() else ""


def _explanation(table: Sequence[Sequence[Cell]], letter: str) -> str:
    """How the words of `table` read; only of those that stand in it."""
    cells_ = [cell for row in table for cell in row]
    text = " ".join(word.text for cell in cells_ for word in cell.words)
    apart = "×v" in text
    keys = "k1" if apart else "kv1"
    words = [f"q0×{keys}: queries of {letter}0 against keys{' (v1: values)' if apart else ' and values'} of {letter}1"]
    if "+kv" in text:
        words.append("kv1+kv2: both at once")
    if any(cell.sends for cell in cells_):
        words.append(f"{keys}→{letter}2: sent to {letter}2, there at the next step{' (@4: at step 4)' if '@' in text else ''}")
    if combined := next((word for cell in cells_ for word in cell.combines), None):
        words.append(f"{combined.text}: what {combined.parts[-1][0][1:]} computed of it comes home or grows")
    if "[" in text:
        words.append("[2:4]: of the owner's positions only the third and fourth")
    return "; ".join(words) + "."


def exchange_sentence(study: Study) -> str:
    """What two-dimensional attention does around its schedule."""
    grid = study.schedules.grid
    assert grid is not None
    groups = ", ".join(f"g{group} = {'+'.join(f'r{rank}' for rank in grid.head_group(group))}" for group in range(min(grid.num_groups, 4)))
    more = ", …" if grid.num_groups > 4 else ""
    return (
        f"Before and after, the ranks of each head group exchange positions for heads; the table is the head groups' ({groups}{more}), "
        "and each rank runs its group's column for its own heads."
    )


# ---- the numbers -----------------------------------------------------------------------------------------------------------------


def _numbers_table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 or column == "owns" else "right", no_wrap=column != "owns")
    return table


def _add_rows(table: Table, rows: Iterable[Sequence[str | Text]], full: bool) -> None:
    """Adds `rows`, of many only the first and the last."""
    rows = list(rows)
    left_out = 0 if full else max(0, len(rows) - _MOST_ROWS)
    for index, row in enumerate(rows):
        if left_out and index == _MOST_ROWS // 2:
            table.add_row("…", f"{left_out} more")
        if not left_out or index < _MOST_ROWS // 2 or index >= _MOST_ROWS // 2 + left_out:
            table.add_row(*row)


def _names(study: Study) -> list[Text]:
    colours = rank_colours(study.num_lanes)
    return [Text(f"r{rank}", style=f"bold {colours[study.lane(rank)]}") for rank in range(study.num_ranks)]


def _work_table(study: Study, direction: str, full: bool) -> Table:
    pairs, work = study.timeline(direction).pairs_per_rank, study.work(direction)
    total = max(sum(work), 1)
    grouped_heads = study.schedules.grid is not None
    table = _numbers_table("rank", "owns", "positions", "computes pairs", *(["heads"] if grouped_heads else []), "share")
    layout = study.layout
    rows = [
        (
            name,
            spans_text(layout.shards[rank]),
            grouped(layout.shard_length(rank)),
            grouped(pairs[study.lane(rank)]),
            *([str(study.rank_sizes[rank].heads)] if grouped_heads else []),
            percent(work[rank] / total),
        )
        for rank, name in enumerate(_names(study))
    ]
    _add_rows(table, rows, full)
    return table


def work_sentence(study: Study, direction: str) -> str:
    """How the work is shared, and what of the ranks' time is lost by it."""
    pairs = study.timeline(direction).pairs_per_rank
    imbalance = study.imbalance(direction)
    shared = (
        f"{counted(sum(pairs), 'pair')}, at most {grouped(max(pairs))} on one {'rank' if study.schedules.grid is None else 'head group'}"
    )
    least, most = percent(1 - 1 / imbalance), percent(study.idle_fraction(direction))
    idle = (
        f"{most} of the ranks' time" if least == most else f"{least} of the ranks' time, {most} if all wait for the slowest at every step"
    )
    return f"{shared}: imbalance {imbalance:.2f} (largest / mean). Idle: {idle}."


def _bytes_table(study: Study, full: bool) -> Table:
    table = _numbers_table("rank", *(f"{what} {direction}" for what in ("sends", "visitors") for direction in DIRECTIONS))
    rows = [
        (
            name,
            *(bytes_text(study.sent_bytes[direction][rank]) for direction in DIRECTIONS),
            *(bytes_text(study.visiting_bytes(direction, rank)) for direction in DIRECTIONS),
        )
        for rank, name in enumerate(_names(study))
    ]
    _add_rows(table, rows, full)
    sent = [bytes_text(sum(study.link_bytes[direction].values())) for direction in DIRECTIONS]
    table.add_row("all", *sent, "", "")
    return table


def bytes_assumption(study: Study) -> str:
    """What the bytes are counted for."""
    sizes = study.sizes
    return (
        f"Bytes for one sequence and one layer: {sizes.heads} heads, {sizes.kv_heads} KV heads, {sizes.head_dim} wide, "
        f"{sizes.element_bytes} bytes an element, {sizes.accumulator_bytes} in results."
    )


def _links_table(study: Study, full: bool) -> Table | str:
    links = sorted({link for direction in DIRECTIONS for link in study.link_bytes[direction]})
    if not links:
        return "Nothing is sent."
    names = _names(study)
    table = _numbers_table("link", *DIRECTIONS)
    rows = [
        (
            names[source] + "→" + names[target],
            *(bytes_text(study.link_bytes[direction].get((source, target), 0)) for direction in DIRECTIONS),
        )
        for source, target in links
    ]
    _add_rows(table, rows, full)
    if len(links) > 1:
        busiest = [max(study.link_bytes[direction].values(), default=0) for direction in DIRECTIONS]
        table.add_row("busiest", *map(bytes_text, busiest))
    return table


def proof_sentence(study: Study) -> str:
    """What the validator has proved; there is no study without it."""
    pairs = grouped(sum(study.timeline("forward").pairs_per_rank))
    return (
        f"proved: every allowed pair exactly once ({pairs}) and no forbidden one, every send received, no deadlock, "
        "every result and gradient home once, nothing sent that is not read; forward and backward."
    )


def _print(console: Console, table: Table | str) -> None:
    """Prints `table` as wide as it is, if need be wider than the terminal: only `--full` asks for that."""
    narrow, wide = console.width, 0
    if isinstance(table, Table):
        wide = console.measure(table, options=console.options.update(max_width=1_000_000)).maximum
    console.width = max(narrow, wide)
    console.print(table, highlight=False)
    console.width = narrow
