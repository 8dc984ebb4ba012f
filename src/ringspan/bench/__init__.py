"""How fast is it here, beside one device and beside the peers? Correct first, then timed; every sample is kept."""

from ringspan.bench.about import about
from ringspan.bench.case import LAUNCHES, TRANSPORTS, Grid, Setting, Shape, parse_strategy
from ringspan.bench.clock import Clock, Timing
from ringspan.bench.documents import parse_documents, realistic_lengths
from ringspan.bench.energy import Meter, open_meter
from ringspan.bench.markdown import markdown
from ringspan.bench.peers import PEERS, Peer
from ringspan.bench.record import PASSES, BenchReport, Record
from ringspan.bench.run import Bench
from ringspan.bench.watch import Watch

__all__ = [
    "LAUNCHES",
    "PASSES",
    "PEERS",
    "TRANSPORTS",
    "Bench",
    "BenchReport",
    "Clock",
    "Grid",
    "Meter",
    "Peer",
    "Record",
    "Setting",
    "Shape",
    "Timing",
    "Watch",
    "about",
    "markdown",
    "open_meter",
    "parse_documents",
    "parse_strategy",
    "realistic_lengths",
]
