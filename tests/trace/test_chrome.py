"""The Chrome JSON is one that Perfetto reads: known phases, named lanes, and nothing that overlaps in one lane."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import pairwise

import pytest

from ringspan.trace import TraceCase, as_json, chrome_trace, tell
from ringspan.trace.chrome import rows_of
from tests.trace.support import trace_with


@pytest.fixture(scope="module", params=["ring", "all_gather", "two_dimensional", "pass_query"])
def trace(request: pytest.FixtureRequest):
    return trace_with(TraceCase(num_ranks=4, strategy=request.param, length=61, heads=4, kv_heads=2, head_dim=8), lambda group: group)


def test_every_event_has_what_its_phase_wants_and_every_lane_its_name(trace):
    read = json.loads(json.dumps(chrome_trace(trace), allow_nan=False))
    lanes, named = set(), set()
    for event in read["traceEvents"]:
        assert event["ph"] in ("X", "M")
        assert 0 <= event["pid"] < 2 * trace.case.num_ranks
        if event["ph"] == "X":
            assert event["ts"] >= 0
            assert event["dur"] >= 0
            assert event["name"]
            lanes.add((event["pid"], event["tid"]))
        elif event["name"] == "thread_name":
            named.add((event["pid"], event["tid"]))
    assert lanes <= named
    names = {event["pid"]: event["args"]["name"] for event in read["traceEvents"] if event["name"] == "process_name"}
    assert names[1] == "rank 1"
    assert names[trace.case.num_ranks + 1] == "rank 1 predicted"


def test_nothing_overlaps_within_a_lane_and_nothing_is_lost(trace):
    lanes = defaultdict(list)
    for event in chrome_trace(trace)["traceEvents"]:
        if event["ph"] == "X":
            lanes[(event["pid"], event["tid"])].append((event["ts"], event["ts"] + event["dur"]))
    for spans in lanes.values():
        spans.sort()
        # A tenth of a nanosecond: the sum of two decimal fractions.
        assert all(after[0] >= before[1] - 1e-4 for before, after in pairwise(spans))
    parts = sum(len(timeline.events) + len(timeline.flights) for timeline in (trace.measured, trace.predicted))
    assert sum(map(len, lanes.values())) == parts


def test_a_rank_computes_in_one_lane_as_measured(trace):
    for rank in range(trace.case.num_ranks):
        for direction in ("forward", "backward"):
            assert set(rows_of([(event.start, event.stop) for event in trace.measured.of(direction, rank)])) == {0}


def test_rows_are_as_few_as_there_are_intervals_at_once():
    assert rows_of([(0, 2), (1, 3), (2, 4), (3, 5)]) == [0, 1, 0, 1]
    assert rows_of([]) == []


def test_the_whole_of_it_is_plain_values(trace):
    found = json.loads(json.dumps(as_json(trace, tell(trace)), allow_nan=False))
    assert found["case"]["strategy"] == trace.case.strategy
    assert found["setting"]["shared"].startswith("4 ranks are threads")
    for name in ("measured", "predicted"):
        assert found[name]["seconds"]["forward"] > 0
        assert len(found[name]["flights"]) > 0
    assert set(found["words"]) == {"hidden", "waiting", "held_up", "change", "caveats"}
