"""One error explains the others: what a rank refused, else where one crashed, else which one fell silent."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from ringspan.errors import RankFailure, RingspanError
from ringspan.training.launch import diagnose
from ringspan.training.loop import Outcome
from ringspan.training.plan import RunFiles
from ringspan.training.post import Post, Report, report_of

LOST = Report(kind="lost", message="rank 0 exchanged with rank 1: the transfer broke off", time=1.0)


@pytest.mark.parametrize(
    ("reports", "exits", "kind", "expected"),
    [
        ({0: LOST, 1: Report(kind="error", message="no room", time=2.0)}, {0: 2, 1: 2}, RingspanError, "no room"),
        (
            {0: LOST, 1: Report(kind="crash", message="KeyError: 'x'", time=2.0)},
            {0: 2, 1: 2},
            RankFailure,
            "rank 1: it failed with KeyError: 'x'",
        ),
        ({0: LOST}, {0: 2, 1: -signal.SIGKILL}, RankFailure, "rank 1: it was ended by SIGKILL"),
        ({0: LOST, 2: LOST}, {0: 2, 1: -signal.SIGSEGV, 2: 2}, RankFailure, "rank 1: it was ended by SIGSEGV"),
        ({1: LOST}, {0: 3, 1: 2}, RankFailure, "rank 0: it ended with status 3 and without a word"),
        ({0: LOST, 1: LOST}, {0: 2, 1: 2}, RankFailure, "the transfer broke off"),
        ({}, {}, RankFailure, "rank 0: it ended"),
    ],
)
def test_the_cause_is_named_and_not_its_consequences(reports: dict, exits: dict, kind: type, expected: str):
    error = diagnose(3 if 2 in reports else 2, reports, exits, RunFiles(Path("a run")))
    assert type(error) is kind
    assert expected in str(error)


def test_the_rank_that_died_is_named_and_not_those_that_hung_or_were_ended_after_it():
    """Under NCCL a rank that lost another hangs, and is ended without a word."""
    killed = -signal.SIGKILL
    assert "rank 1: it was ended by SIGKILL" in str(diagnose(2, {}, {1: killed, 0: killed}, RunFiles(Path("a run"))))
    assert "rank 1: it was ended by SIGKILL" in str(diagnose(2, {}, {0: killed, 1: killed}, RunFiles(Path("a run")), hung={0}))


def test_a_rank_that_hung_and_was_ended_is_not_said_to_have_died():
    error = diagnose(2, {0: LOST}, {0: 2, 1: -signal.SIGKILL}, RunFiles(Path("a run")), hung={1})
    assert "rank 1: it did not answer" in str(error)
    assert "Try: --resume --out 'a run', which goes on" in str(error)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RingspanError("asked", "found"), "error"),
        (RankFailure("rank 1", "died"), "lost"),
        (RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:4242"), "lost"),
        (RuntimeError("Timed out waiting 1000ms for recv operation to complete"), "lost"),
        (RuntimeError("shape '[2]' is invalid for input of size 3"), "crash"),
        (OSError(28, "No space left on device", "metrics.jsonl"), "error"),
        (KeyError("x"), "crash"),
    ],
)
def test_a_rank_says_what_kind_of_end_it_had(error: BaseException, kind: str):
    assert report_of(error, Path("run")).kind == kind


def test_reports_cross_from_rank_to_launcher(tmp_path: Path):
    post = Post(tmp_path)
    outcome = Outcome(step=3, stopped_by="SIGINT", checkpoint="there")
    post.write_report(0, Report(kind="outcome", outcome=outcome))
    post.write_report(2, Report(kind="lost", message="gone"))
    reports = post.read_reports(3)
    assert reports[0].outcome == outcome
    assert reports[2].message == "gone"
    assert 1 not in reports
    assert reports[0].time <= reports[2].time


def test_each_start_of_the_ranks_has_reports_and_processes_of_its_own(tmp_path: Path):
    first = Post(tmp_path)
    assert first.attempts() == [first]
    first.enter(0)
    first.write_report(0, LOST)
    second = Post(tmp_path, 1)
    second.enter(0)
    assert first.attempts() == [first, second]
    assert second.read_reports(2) == {}
    assert first.read_reports(2)[0].kind == "lost"
    assert not second.has_died(0), "this process"


def test_ranks_are_not_started_again_for_what_was_refused_or_once_they_shall_stop(tmp_path: Path):
    post = Post(tmp_path, 2)
    assert not post.is_over(2)
    Post(tmp_path, 0).write_report(1, LOST)
    Post(tmp_path, 1).write_report(0, Report(kind="crash", message="KeyError: 'x'"))
    assert not post.is_over(2), "a lost peer and a crash are worth another start"
    Post(tmp_path, 0).write_report(0, Report(kind="error", message="no room"))
    assert post.is_over(2)
    (tmp_path / "stopped").mkdir()
    stopped = Post(tmp_path / "stopped", 1)
    stopped.stop.write_text("SIGINT")
    assert stopped.is_over(2)
