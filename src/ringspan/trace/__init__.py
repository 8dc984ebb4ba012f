"""What really happened: one forward and one backward, each part timed on every rank, beside what the schedule foretells."""

from ringspan.trace.advice import Advice
from ringspan.trace.case import TraceCase
from ringspan.trace.chrome import chrome_trace
from ringspan.trace.findings import Culprit, Findings, find
from ringspan.trace.measured import RankRecord, measured_timeline
from ringspan.trace.predicted import predicted_timeline
from ringspan.trace.rates import measure_machine
from ringspan.trace.recorder import Clock, CudaClock, HostClock, Mark, Recorder
from ringspan.trace.report import as_json
from ringspan.trace.run import Setting, Trace, observe_rank, put_together, trace
from ringspan.trace.timeline import Event, Flight, Timeline
from ringspan.trace.words import Story, tell

__all__ = [
    "Advice",
    "Clock",
    "CudaClock",
    "Culprit",
    "Event",
    "Findings",
    "Flight",
    "HostClock",
    "Mark",
    "RankRecord",
    "Recorder",
    "Setting",
    "Story",
    "Timeline",
    "Trace",
    "TraceCase",
    "as_json",
    "chrome_trace",
    "find",
    "measure_machine",
    "measured_timeline",
    "observe_rank",
    "predicted_timeline",
    "put_together",
    "tell",
    "trace",
]
