"""Every number of a report is computed from samples: medians, TFLOP/s, ratios; and the report says them."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest

from ringspan.bench import BenchReport, Record, Setting, Shape, Timing, markdown
from ringspan.bench.case import EVERYTHING_ON
from ringspan.bench.clock import slowest
from ringspan.bench.peers.protocol import plain_mask
from ringspan.bench.record import PASSES
from ringspan.viz.speed_curve import curves, draw_speed_curve

SHAPE = Shape(tokens=512, num_ranks=4, heads=8, kv_heads=2, head_dim=64)


def record(kind: str, name: str, forward: tuple[float, ...], both: tuple[float, ...], **fields) -> Record:
    timings = {"forward": Timing((forward, tuple(each / 2 for each in forward)), 1), "both": Timing((both,), 3)}
    return Record(**{"kind": kind, "name": name, "shape": SHAPE, "kernel": name, "timings": timings, **fields})


@pytest.fixture
def report() -> BenchReport:
    records = (
        record("one device", "cudnn", (8.0, 7.0, 9.0), (40.0, 41.0, 42.0)),
        record("one device", "flash4", (6.0, 6.0, 60.0), (44.0, 44.0, 44.0)),
        record("one device", "cudnn", (4.0,), (20.0,), launch="graph"),
        record("ringspan", "ring", (2.0, 1.0, 3.0), (12.0, 11.0, 13.0), setting=Setting(note=EVERYTHING_ON), kernel="cudnn"),
        record("ringspan", "auto", (2.5,), (11.0,), setting=Setting(strategy="auto"), kernel="cudnn"),
        record("ringspan", "ring", (1.25,), (5.0,), setting=Setting(launch="graph"), launch="graph", kernel="cudnn"),
        record("ringspan", "ring", (9.0,), (9.5,), setting=Setting(overlap=False, note="no overlap"), kernel="cudnn"),
        record("peer", "rfa_zigzag", (4.0,), (18.0,), kernel="flash2"),
        record("peer", "pytorch_allgather", (3.0,), (15.0,), kernel="cudnn"),
        Record(kind="peer", name="yunchang_ulysses", shape=SHAPE, status="refused", reason="it is not installed"),
    )
    return BenchReport({"commit": "abc", "samples": 3, "warmup": 1, "num_ranks": 4, "device": "X", "versions": {}}, records)


def test_ratios_are_of_medians_of_samples_launched_in_the_same_way(report: BenchReport):
    ring, auto, graph = report.records[3:6]
    # Forward: flash4 has the median 6, a quarter of which is 1.5, against 2. Both: cudnn wins with 41.
    assert report.ratio(ring, "forward") == 1.5 / 2.0
    assert report.ratio(ring, "both") == 41.0 / 4 / 12.0
    assert report.ratio_to_same_kernel(ring, "forward") == 8.0 / 4 / 2.0
    best = report.best_one_device(SHAPE, "eager", "both")
    assert best is not None and best.name == "cudnn"
    assert report.ratio(graph, "forward") == 1.0 / 1.25, "a graph is compared with a graph"
    assert report.ratios_to_peers(ring, "both") == {"rfa_zigzag": 18.0 / 12.0, "pytorch_allgather": 15.0 / 12.0}
    assert report.auto_to_best(SHAPE, "eager", "both") == 1.0, "what an ablation took away does not count"
    assert report.auto_to_best(SHAPE, "eager", "forward") == 2.0 / 2.5
    assert report.ratio(report.records[0], "forward") is None and auto.label.startswith("auto")


def test_a_ratio_is_of_the_samples_that_were_taken_in_turns(report: BenchReport):
    turns = {"forward": ("cudnn", Timing(((6.0, 3.0, 4.0), (2.0, 8.0, 1.0)), 1))}
    ring = replace(report.records[3], beside=turns)
    assert report.ratio(ring, "forward") == 6.0 / 4 / 2.0 == report.ratio_to_same_kernel(ring, "forward")
    assert report.ratio(ring, "both") == report.ratio(report.records[3], "both"), "of that pass alone"
    other = replace(ring, kernel="flash4")
    assert report.ratio(other, "forward") == 6.0 / 4 / 2.0
    assert report.ratio_to_same_kernel(other, "forward") == 6.0 / 4 / 2.0, "flash4's own median, 6"
    found = replace(report, records=(*report.records[:3], ring)).as_json()["records"][3]["passes"]
    assert found["forward"]["one_device_samples_ms"] == [6.0, 8.0, 4.0] and found["forward"]["one_device_kernel"] == "cudnn"
    assert found["both"]["one_device_samples_ms"] is found["both"]["one_device_rank_medians_ms"] is None
    assert found["forward"]["one_device_rank_medians_ms"] == [4.0, 2.0] and found["forward"]["rank_medians_ms"] == [2.0, 1.0]


def test_a_ratio_to_a_share_is_of_one_device_with_its_part_of_the_heads(report: BenchReport):
    ring = replace(report.records[3], share={"both": Timing(((9.0, 12.0, 10.0), (11.0, 8.0, 7.0)), 1)})
    assert report.ratio_to_share(ring, "both") == 11.0 / 12.0 and report.ratio_to_share(ring, "forward") is None
    shared = replace(report, records=(*report.records[:3], ring))
    found = shared.as_json()["records"][3]["passes"]
    assert found["both"]["share_samples_ms"] == [11.0, 12.0, 10.0] and found["both"]["ratio_to_share"] == 11.0 / 12.0
    assert found["forward"]["share_samples_ms"] is found["forward"]["ratio_to_share"] is None
    assert "0.917 of one device with its share of the heads alone, 11.000 ms" in markdown(shared)
    assert "its share of the heads" not in markdown(report)


def test_samples_taken_later_are_each_ranks_own():
    early, late = Timing(((1.0, 5.0), (3.0, 4.0)), 1), Timing(((2.0,), (2.5,)), 1)
    both = early.with_more(late)
    assert both.samples_ms == (3.0, 5.0, 2.5) and both.rank_medians_ms == (2.0, 3.0)


def test_tflops_count_the_pairs_of_the_mask_on_one_device(report: BenchReport):
    ring = report.records[3]
    flops = 4 * 64 * 8 * (2048 * 2049 // 2)
    assert ring.tflops("forward") == pytest.approx(flops / 4 / 2e-3 / 1e12)
    assert ring.tflops("both") == pytest.approx(3.5 * flops / 4 / 12e-3 / 1e12)
    # A device that does all of it does it at its own speed, not at four times that.
    assert report.records[0].tflops("forward") == pytest.approx(flops / 8e-3 / 1e12)


def test_the_slowest_rank_counts_sample_by_sample():
    assert slowest([[1.0, 5.0, 2.0], [3.0, 4.0, 2.5]]) == (3.0, 5.0, 2.5)


def test_json_keeps_every_sample_and_markdown_says_what_was_not_timed(report: BenchReport):
    found = json.loads(json.dumps(report.as_json(), allow_nan=False))
    assert found["passed"] and len(found["records"]) == 10
    passes = found["records"][3]["passes"]["both"]
    assert passes["samples_ms"] == [12.0, 11.0, 13.0] and passes["repeats"] == 3 and passes["one_device_kernel"] == "cudnn"
    text = markdown(report)
    assert "yunchang_ulysses, eager: refused: it is not installed" in text
    assert "1.36 times as fast as the best peer, pytorch_allgather" in text
    assert "no ring: one device over the whole | 6.000 | 3.00 | 41.000 | 3.42" in text
    assert "| no overlap | 9.000 | 4.50 | 9.500 | 0.79 |" in text
    assert "auto reaches 0.80 of the best setting" in text


def test_a_report_with_something_wrong_of_ours_has_not_passed_and_one_with_a_wrong_peer_has(report: BenchReport):
    wrong = Record(kind="ringspan", name="ring", shape=SHAPE, setting=Setting(), status="wrong", reason="errs")
    peer = Record(kind="peer", name="rfa_ring", shape=SHAPE, status="wrong", reason="errs")
    assert not BenchReport(report.about, (*report.records, wrong)).passed
    assert BenchReport(report.about, (*report.records, peer)).passed


def test_a_report_of_a_run_that_goes_on_or_was_cut_off_says_so_and_has_not_passed(report: BenchReport):
    assert report.passed and report.as_json()["finished"] and "Not finished" not in markdown(report)
    cut = replace(report, finished=False)
    assert not cut.passed and not cut.as_json()["finished"] and not cut.as_json()["passed"]
    assert "**Not finished**" in markdown(cut) and "| one device, flash4 |" in markdown(cut)


def test_a_report_in_which_all_of_ours_was_refused_has_not_passed(report: BenchReport):
    refused = Record(kind="ringspan", name="ring:parts=0", shape=SHAPE, setting=Setting(), status="refused", reason="there is no such part")
    alone = tuple(record for record in report.records if record.kind != "ringspan")
    assert not BenchReport(report.about, (*alone, refused)).passed
    assert BenchReport(report.about, (*report.records, refused)).passed, "one of several"
    assert BenchReport(report.about, alone).passed


def test_the_plot_has_a_line_for_each_solver_and_the_best_kernel_of_one_device(report: BenchReport, tmp_path):
    lines = curves([each for each in report.records if each.is_timed], "forward")
    assert len([label for label in lines if label.startswith("peer ")]) == 2
    ((tokens, speed),) = lines["one device, best kernel, eager"]
    assert tokens == 512 and speed == pytest.approx(report.records[1].tflops("forward"))
    draw_speed_curve(report, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_a_mask_is_plain_where_it_is_causal_or_full_alone():
    assert plain_mask(SHAPE) == "causal"
    assert not plain_mask(Shape(tokens=8, num_ranks=2, mask="window:4"))
    assert not plain_mask(Shape(tokens=8, num_ranks=2, documents="realistic:0"))


def test_benches_that_were_written_are_drawn_as_one(report: BenchReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    spec = importlib.util.spec_from_file_location("draw", Path(__file__).parents[2] / "benchmarks" / "draw.py")
    assert spec is not None and spec.loader is not None
    draw = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(draw)
    drawn: list[tuple[BenchReport, Path]] = []
    monkeypatch.setattr(draw, "draw_speed_curve", lambda *given: drawn.append(given))
    others = BenchReport({**report.about, "num_ranks": 8}, report.records)
    paths = [tmp_path / f"{index}.json" for index in range(3)]
    for path, bench in zip(paths, (report, others, report), strict=True):
        path.write_text(json.dumps(bench.as_json()), encoding="utf-8")
    with pytest.raises(SystemExit, match=r"different devices[^:]*:\n.*0\.json: 4 × X\n.*1\.json: 8 × X\n"):
        draw.main("speed.png", "def", *map(str, paths))
    assert not drawn
    draw.main("speed.png", "def", str(paths[0]), str(paths[2]))
    [(together, picture)] = drawn
    assert (together.about["commit"], picture) == ("def", Path("speed.png"))
    timed = [each for each in report.records if each.is_timed]
    assert len(timed) < len(report.records), "what was not timed is left out"
    for which in PASSES:
        assert curves(list(together.records), which) == curves(timed, which)
