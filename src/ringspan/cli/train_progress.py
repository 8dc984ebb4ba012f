"""What rank 0 shows while it trains: a live bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from ringspan.training.metrics import StepRecord
from ringspan.training.spread import num_replicas

if TYPE_CHECKING:
    from ringspan.training.plan import Plan

_PLAIN_SECONDS = 10.0
_SMOOTHING = 0.9


class TrainingProgress:
    """An observer of `ringspan.training.loop`. Use as a context manager around the training."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            SpinnerColumn(),
            BarColumn(bar_width=24),
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            _Column("loss", "bold", "{:.3f}"),
            _Column("validation", "green", "{:.3f}"),
            _Column("tokens_per_second", "cyan", "{:,.0f} tokens/s"),
            TextColumn("[dim]{task.fields[shape]}[/dim]"),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=console,
            transient=False,
            refresh_per_second=5,
        )
        self._live = console.is_terminal
        self._task = self._bar.add_task("", total=1, start=False, shape="", visible=False)
        self._last_line = -_PLAIN_SECONDS
        self._speed: float | None = None
        self._loss: float | None = None

    def __enter__(self) -> TrainingProgress:
        if self._live:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Leaves the bar as it stands."""
        self._bar.stop()

    def started(self, plan: Plan, num_parameters: int, notes: Sequence[str] = ()) -> None:
        """Names the model and its data, and shows the bar."""
        config = plan.config
        unit = "bytes" if plan.tokens.token_bytes == 1 else "tokens"
        split = plan.split
        self._say(f"[bold]{config.model}[/bold]: {num_parameters / 1e6:.2f} million parameters; text: {plan.tokens.data}")
        self._say(f"{split.num_training:,} {unit} to train on, {split.num_held_out:,} held out")
        for note in notes:
            self._say(f"[dim]{note}[/dim]")
        if plan.checkpoint:
            self._say(f"going on after step {plan.first_step}, from {plan.checkpoint}")
        shape = f"context {config.context:,} over {config.ranks} rank{'s' if config.ranks > 1 else ''}"
        if (groups := num_replicas(config)) > 1:
            shape = f"{groups} × context {config.context:,} over {config.ranks} ranks"
        self._bar.update(self._task, total=config.steps, completed=plan.first_step, shape=shape, visible=True)
        self._bar.start_task(self._task)
        self._total, self._shape = config.steps, shape

    def stepped(self, record: StepRecord) -> None:
        """Moves the bar, or every ten seconds prints a line."""
        fields: dict[str, float] = {}
        if record.validation_loss is not None:
            fields["validation"] = record.validation_loss
        if record.loss is not None and record.tokens_per_second is not None:
            self._loss = fields["loss"] = record.loss if self._loss is None else _SMOOTHING * self._loss + (1 - _SMOOTHING) * record.loss
            before = self._speed or record.tokens_per_second
            self._speed = fields["tokens_per_second"] = _SMOOTHING * before + (1 - _SMOOTHING) * record.tokens_per_second
        self._bar.update(self._task, completed=record.step, **fields)  # type: ignore[arg-type]
        now = time.monotonic()
        if not self._live and (now - self._last_line >= _PLAIN_SECONDS or record.validation_loss is not None):
            self._last_line = now
            self._say(self._line(record))

    def sampled(self, step: int, prompt: str, text: str) -> None:
        """Shows the prompt dimly and what the model added."""
        when = "before training" if step == 0 else f"after step {step}"
        body = Text.assemble((printable(prompt), "dim"), printable(text))
        if self._live:
            self._bar.console.print(Panel(body, title=f"sample {when} (the dim part is given)", title_align="left", border_style="dim"))
        else:
            self._console.print(
                Text(f"--- sample {when}, after a prompt that ends in {printable(prompt)[-40:]!r}:\n{printable(text)}\n---"), soft_wrap=True
            )

    def saved(self, step: int, folder: Path) -> None:
        """Says where."""
        self._say(f"[dim]checkpoint of step {step}: {folder}[/dim]")

    def _line(self, record: StepRecord) -> str:
        parts = [f"step {record.step}/{self._total}"]
        if record.loss is not None:
            parts += [f"loss {self._loss:.3f}", f"{self._speed:,.0f} tokens/s"]
        if record.validation_loss is not None:
            parts.append(f"validation loss {record.validation_loss:.3f}")
        return "  ".join([*parts, self._shape])

    def _say(self, line: str) -> None:
        self._bar.console.print(line, highlight=False, soft_wrap=True)


class _Column(ProgressColumn):
    """A number of the task that is empty until there is one."""

    def __init__(self, field: str, style: str, form: str) -> None:
        super().__init__()
        self._field, self._style, self._form = field, style, form

    def render(self, task: Task) -> Text:
        value = task.fields.get(self._field)
        if value is None:
            return Text("")
        name = "" if "tokens" in self._form else f"{self._field} "
        return Text(name + self._form.format(value), style=self._style)


def printable(text: str) -> str:
    """`text` without what would move a terminal's cursor; NUL, which stands between files, shows as a rule."""
    text = text.replace("\0", "\n────\n")
    return "".join(character if character.isprintable() or character in "\n\t" else "\N{REPLACEMENT CHARACTER}" for character in text)
