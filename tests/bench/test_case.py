"""What is timed: grids, ablations, documents, and the FLOPs that count as useful."""

from __future__ import annotations

import statistics

import pytest
import torch

from ringspan.bench import Grid, Setting, parse_documents, parse_strategy, realistic_lengths
from ringspan.bench.case import EVERYTHING_ON, Shape
from ringspan.errors import RingspanError
from ringspan.verify import allowed_pairs


def grid(**fields) -> Grid:
    made = {"num_ranks": 2, "tokens": (64,), "heads": ((4, 2),), "head_dims": (16,), "dtypes": ("float32",), **fields}
    return Grid(**made)


def test_a_mixture_of_documents_fills_the_sequence_and_is_as_uneven_as_text():
    lengths = realistic_lengths(131072, 0)
    assert sum(lengths) == 131072 and min(lengths) >= 1
    assert lengths == realistic_lengths(131072, 0) != realistic_lengths(131072, 1)
    assert 400 < statistics.median(lengths) < 900, "the median is 600 tokens"
    # Of a log-normal with a spread of 1.3 the longest tenth holds about half of all tokens.
    longest = sorted(lengths)[-len(lengths) // 10 :]
    assert 0.35 < sum(longest) / 131072 < 0.7


@pytest.mark.parametrize("text", ["realistic", "realistic:", "realistic:x", "short:1"])
def test_a_mixture_that_does_not_read_is_refused(text: str):
    with pytest.raises(RingspanError, match="realistic:SEED"):
        parse_documents(text)


@pytest.mark.parametrize(
    ("mask", "documents"), [("causal", ""), ("full", ""), ("window:5", ""), ("causal&prefix:9", ""), ("causal", "realistic:3")]
)
def test_useful_flops_are_the_pairs_that_the_mask_allows(mask: str, documents: str):
    shape = Shape(tokens=37, num_ranks=3, mask=mask, documents=documents, heads=6, kv_heads=2, head_dim=8, batch=2)
    pairs = int(allowed_pairs(shape.made_mask, 111).sum())
    assert shape.forward_flops == 4 * 8 * 6 * 2 * pairs
    assert pairs < 111 * 111 or mask == "full"


def test_a_grid_is_every_combination_with_the_longest_last():
    made = grid(
        tokens=(64, 32), masks=("causal", "full"), heads=((4, 2), (8, 8)), strategies=("ring", "direct"), layouts=("zigzag", "striped")
    )
    made.check("cpu")
    shapes = made.shapes()
    assert len(shapes) == 8 and [shape.tokens for shape in shapes[:2]] == [32, 64]
    assert {(setting.strategy, setting.layout) for setting in made.settings()} == {
        (strategy, layout) for strategy in ("ring", "direct") for layout in ("zigzag", "striped")
    }


def test_an_ablation_takes_one_thing_away_at_a_time():
    made = grid(num_ranks=4, ablate=True).settings()
    whole = made[0]
    assert whole.note == EVERYTHING_ON and whole.overlap and whole.strategy == "ring"
    notes = {setting.note: setting for setting in made[1:]}
    stages = [setting.strategy for setting in made if setting.strategy != "ring"]
    assert stages == ["ring:kv_heads_per_stage=1", *(f"all_gather:stages={count}" for count in (1, 2, 3))]
    assert not notes["no overlap"].overlap and notes["no overlap"].layout == whole.layout
    assert notes["contiguous, not zigzag"].layout == "contiguous" and notes["contiguous, not zigzag"].overlap


def test_a_strategy_is_read_with_its_options():
    assert parse_strategy("ring") == ("ring", {})
    assert parse_strategy("auto") == ("auto", {})
    assert parse_strategy("all_gather:stages=3") == ("all_gather", {"stages": 3})
    assert parse_strategy("all_gather:stages=3&kv_heads_per_stage=2") == ("all_gather", {"stages": 3, "kv_heads_per_stage": 2})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokens": (0,)}, "--length 0"),
        ({"heads": ((6, 4),)}, "6 / 4 leaves 2"),
        ({"strategies": ("spiral",)}, "the strategies are"),
        ({"strategies": ("ring:stages=2",)}, "it takes"),
        ({"strategies": ("all_gather:stages=two",)}, "no whole number"),
        ({"layouts": ("spiral",)}, "contiguous"),
        ({"kernels": ("fast",)}, "auto"),
        ({"transports": ("pigeon",)}, "peer_memory"),
        ({"launches": ("later",)}, "eager"),
        ({"launches": ("eager", "graph")}, "CUDA graph"),
        ({"peers": ("nobody",)}, "rfa_zigzag"),
        ({"dtypes": ("float8",)}, "bfloat16"),
        ({"masks": ("causal&documents:5,6",)}, "128 tokens"),
        ({"documents": "random:1"}, "realistic:SEED"),
        ({"num_ranks": 0}, "--ranks 0"),
    ],
)
def test_what_does_not_exist_is_refused_by_name(fields: dict, message: str):
    with pytest.raises(RingspanError, match=message):
        grid(**fields).check("cpu")


def test_a_shape_has_the_bytes_of_its_dtype():
    shape = Shape(tokens=8, num_ranks=2, heads=4, kv_heads=2, head_dim=16, dtype="float64")
    assert (shape.sizes.element_bytes, shape.sizes.accumulator_bytes) == (8, 8)
    assert shape.torch_dtype is torch.float64 and Setting().overlap
