"""Training: data, loop, checkpoints, metrics, and the ranks that run them.

To read in this order: `config`, `tokens` (what a step reads), `trainer` (what a step does), `loop`, `checkpoint`, `ranks`, `launch`.
"""

from ringspan.training.config import TrainingConfig

__all__ = ["TrainingConfig"]
