"""Pictures and terminal tables of schedules, and the loss curve of a training run."""

from ringspan.viz.picture import draw_schedule
from ringspan.viz.study import Study, study

__all__ = ["Study", "draw_schedule", "study"]
