"""What `ringspan trace` prints: each step measured and predicted, and the trace in words."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ringspan.trace import Story, Trace
from ringspan.trace.numbers import count_text, seconds_text
from ringspan.trace.words import step_rows

_MOST_ROWS = 18
_SHOWN = 6


def show(trace: Trace, story: Story, console: Console) -> None:
    """Prints `trace`."""
    case, setting = trace.case, trace.setting
    console.print(
        f"[bold]{escape(case.title)}[/bold]   {count_text(case.num_ranks)} rank{'' if case.num_ranks == 1 else 's'} · "
        f"{count_text(case.length)} positions · {case.heads}/{case.kv_heads} heads of {case.head_dim}, {case.dtype}, {setting.kernel}"
    )
    console.print(f"[dim]on {escape(setting.device)}, {setting.transport}, torch {setting.torch_version}[/dim]")
    if trace.reason:
        console.print(f"auto chose {escape(trace.reason)}")
    console.print()
    console.print(_steps(trace))
    console.print()
    parts = [("rates", (story.rates,)), ("hidden", (story.hidden,)), ("waiting", (story.waiting,)), ("held up", (story.held_up,))]
    parts += [("to change", story.change), ("mind", story.caveats)]
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, sentences in parts:
        for index, sentence in enumerate(sentences):
            table.add_row(name if index == 0 else "", escape(sentence))
    console.print(table)


def _steps(trace: Trace) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("step")
    for direction in ("forward", "backward"):
        for name in (f"{direction}\nmeasured", "\npredicted", "\nratio"):
            table.add_column(name, justify="right", no_wrap=True)
    rows = step_rows(trace)
    left_out = range(0)
    if len(rows) > _MOST_ROWS:
        left_out = range(_SHOWN, len(rows) - _SHOWN)
    for index, (step, pairs) in enumerate(rows):
        if index in left_out:
            if index == left_out.start:
                table.add_row("…")
            continue
        cells = []
        for measured, predicted in pairs:
            cells += [_or_nothing(measured), _or_nothing(predicted), _ratio(measured, predicted)]
        table.add_row(step, *cells, style="bold" if step == "all" else None)
    return table


def _ratio(measured: float, predicted: float) -> str:
    if not (measured and predicted):
        return ""
    return f"{measured / predicted:.{2 if measured < 10 * predicted else 0}f}"


def _or_nothing(seconds: float) -> str:
    return seconds_text(seconds) if seconds else ""
