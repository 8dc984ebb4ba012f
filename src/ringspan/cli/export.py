"""`ringspan export`: a trained model as a folder that plain transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    source: Annotated[str, typer.Argument(help="A run's folder, or one of its checkpoints.", metavar="RUN")],
    target: Annotated[str, typer.Argument(help="Where to write the model.", metavar="DIR")],
) -> None:
    """Write the model of a run's last checkpoint, or of the checkpoint given, as a Hugging Face folder: plain transformers loads it.

    The checkpoint is compared with its manifest first.
    """
    from ringspan.training.config import TrainingConfig
    from ringspan.training.export import export, find_checkpoint
    from ringspan.training.notes import exported_note
    from ringspan.training.plan import RunFiles

    checkpoint = export(Path(source), Path(target))
    print(f"{checkpoint.name} is now a Hugging Face model: {target}")
    if note := exported_note(TrainingConfig.load(RunFiles(find_checkpoint(checkpoint)[1]).config)):
        print(f"note: {note}")
    raise typer.Exit(0)
