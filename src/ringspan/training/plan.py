"""What the launcher has settled before any rank starts, and the files of a run."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from ringspan.training.config import TrainingConfig
from ringspan.training.tokens import Split, TokenFile


@dataclass(frozen=True)
class RunFiles:
    """Where a run leaves what, under `--out`."""

    out: Path

    @property
    def config(self) -> Path:
        """The configuration."""
        return self.out / "config.json"

    @property
    def metrics(self) -> Path:
        """One line a step."""
        return self.out / "metrics.jsonl"

    @property
    def loss_curve(self) -> Path:
        """The curve as a picture."""
        return self.out / "loss.png"

    @property
    def samples(self) -> Path:
        """The generated texts."""
        return self.out / "samples.txt"

    @property
    def tensorboard(self) -> Path:
        """The folder of TensorBoard's files, where they are asked for."""
        return self.out / "tensorboard"

    @property
    def tokens(self) -> Path:
        """The folder of the token file."""
        return self.out / "tokens"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.out / "checkpoints"

    @property
    def logs(self) -> Path:
        """What each rank printed, and its traceback where it failed."""
        return self.out / "logs"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A checked run: `config` without open choices, its tokens, and the checkpoint to go on from (None starts anew)."""

    config: TrainingConfig
    tokens: TokenFile
    checkpoint: str | None
    first_step: int

    @property
    def files(self) -> RunFiles:
        """Where the run leaves what."""
        return RunFiles(Path(self.config.out))

    @property
    def split(self) -> Split:
        """Training and held-out tokens."""
        return Split.of(self.tokens, self.config.context)

    def save(self, path: Path) -> None:
        """Writes the plan for the ranks to read."""
        path.write_text(json.dumps(asdict(self)))

    @staticmethod
    def load(path: Path) -> Plan:
        """Reads what `save` wrote."""
        fields = json.loads(path.read_text())
        return Plan(**fields | {"config": TrainingConfig(**fields["config"]), "tokens": TokenFile(**fields["tokens"])})
