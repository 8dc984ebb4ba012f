"""What is short of the bars is said, and nothing else."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

PATH = Path(__file__).parents[2] / "benchmarks" / "bars.py"


@pytest.fixture(scope="module")
def bars() -> Any:
    spec = importlib.util.spec_from_file_location("bars", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def record(ratios: tuple[float, float] = (0.99, 0.98), both_ms: float = 200.0, strategy: str = "ring", **given: Any) -> dict[str, Any]:
    """A timed setting of 32,768 tokens on four GPUs."""
    forward, both = ({"median_ms": ms, "ratio_to_one_device": ratio} for ms, ratio in zip((55.0, both_ms), ratios, strict=True))
    shape = {"heads": 32, "kv_heads": 8, "head_dim": 128, "num_ranks": 4, "tokens": 32768, "mask": "causal", "document_lengths": []}
    made = {
        "kind": "ringspan",
        "status": "timed",
        "reason": "",
        "label": f"{strategy} zigzag flash4",
        "setting": {"strategy": strategy},
        "passes": {"forward": forward, "both": {**both, "ratio_to_peers": given.pop("peers", {})}},
        "extra_bytes": {"both": given.pop("extra", 100)},
        "promised_bytes": {"both": {"total": 100}},
    }
    return {**made, "shape": {**shape, **given.pop("shape", {})}, **given}


@pytest.mark.parametrize(
    ("records", "said"),
    [
        ([record()], []),
        # What one setting does not reach in both passes is not reached by two, each in one.
        ([record((0.99, 0.96)), record((0.95, 0.99), strategy="direct")], ["0.9600 of one device by ring zigzag flash4, the bar is 0.97"]),
        ([record((0.9699, 0.98))], ["0.9699 of one device"]),
        ([record(shape={"tokens": 8192}), record((0.59, 0.7), shape={"tokens": 2048})], ["0.5900 of one device"]),
        ([record((0.86, 0.86), shape={"document_lengths": [3, 4]}), record((0.74, 0.9), shape={"mask": "window:4095"})], ["0.7400"]),
        ([record(peers={"one": 1.3, "two": 1.2}), record(peers={"one": 1.3, "two": 1.1}, strategy="direct")], []),
        ([record(peers={"one": 1.3, "two": 1.1})], ["1.10 times as fast as the best peer, the bar is 1.15"]),
        ([record(extra=105)], []),
        ([record(extra=106)], ["takes 106 bytes, its schedule 100"]),
        ([record(), record(both_ms=220.0, strategy="auto")], []),
        ([record(), record(both_ms=223.0, strategy="auto")], ["auto takes 223.000 ms both, the best setting 200.000"]),
        ([record(), record(kind="one device", status="wrong", reason="err")], ["wrong: err"]),
        ([record(), record(kind="peer", status="failed", reason="err")], []),
    ],
)
def test_what_is_short_is_said(records: list[dict], said: list[str], bars: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "bench.json"
    path.write_text(json.dumps({"records": records}), encoding="utf-8")
    assert bars.main([str(path)]) == bool(said)
    table, _, rest = capsys.readouterr().out.partition("\n\n")
    assert len(table.splitlines()) == 2 + sum(each["kind"] == "ringspan" for each in records)
    lines = rest.strip().splitlines()
    assert (lines[0], len(lines) - 1) == (("Short:", len(said)) if said else ("Nothing is short.", 0))
    assert all(part in line for part, line in zip(said, lines[1:], strict=True))


def test_where_nothing_was_measured_all_is_short(bars: Any):
    assert bars.main([]) == 1
