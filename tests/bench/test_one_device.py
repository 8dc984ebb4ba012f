"""The baseline is the kernel alone: one call for a mask of one tile, and right for every mask."""

from __future__ import annotations

import pytest
import torch

from ringspan.bench.case import Shape
from ringspan.bench.check import LAW_5, Yardstick, dense_yardstick, errors, limits, probe, wrong
from ringspan.bench.one_device import CallEach, OneCall, Varlen, _varlen, capable_kernels, make_whole, one_device
from ringspan.bench.passes import whole_inputs
from ringspan.geometry import make_layout, tiles
from ringspan.verify import Error

CPU = torch.device("cpu")
MASKS = {
    "causal": OneCall,
    "full": OneCall,
    "window:20": OneCall,
    "causal&documents:1,60,45,5": CallEach,
    "window:9&documents:31,40,40": CallEach,
    "causal&prefix:13": type(None),
}


def shape_of(mask: str, **fields) -> Shape:
    return Shape(**{"tokens": 37, "num_ranks": 3, "mask": mask, "heads": 4, "kv_heads": 2, "head_dim": 16, "dtype": "float32", **fields})


@pytest.mark.parametrize("kernel", ["torch_cpu", "reference"])
@pytest.mark.parametrize("mask", MASKS)
def test_one_kernel_over_the_whole_sequence_is_dense_attention(mask: str, kernel: str):
    shape = shape_of(mask, batch=2)
    inputs = whole_inputs(shape, CPU)
    yardstick = dense_yardstick(shape, inputs)
    assert yardstick is not None and isinstance(make_whole(kernel, shape, CPU), MASKS[mask])
    passes, _ = one_device(kernel, shape, inputs)
    found = errors(passes.both(), yardstick, passes.mine, None)
    assert not wrong(found, limits(shape, yardstick, found, LAW_5)), found
    assert found.keys() == {"out", "dq", "dk", "dv"}
    (out,) = passes.forward()
    assert not out.requires_grad and errors((out,), yardstick, passes.mine, None)["out"].relative < 2e-5
    assert probe(shape, inputs, out) < 2e-5
    assert probe(shape, inputs, out * 1.001) > 5e-4, "rows that are off are seen"


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ("causal&documents:1,60,45,5", (True, None, 60)),
        ("full&documents:61,50", (False, None, 61)),
        ("window:9&documents:31,75,5", (True, 9, 75)),
        ("causal&prefix:13&documents:60,51", None),
    ],
)
def test_documents_are_one_varlen_call_where_one_band_holds_for_all(mask: str, expected: tuple | None):
    shape = shape_of(mask)
    found = _varlen("flash2", tiles(make_layout("contiguous", 111, 1), shape.made_mask, 0, 0), 111, 0.25, CPU)
    if expected is None:
        assert found is None
        return
    assert isinstance(found, Varlen) and (found.causal, found.left, found.longest) == expected
    assert found.borders[-1] == 111 and found.borders.dtype == torch.int32


def test_the_reference_is_no_baseline_unless_it_is_asked_for():
    shape = shape_of("causal")
    assert not capable_kernels(shape, CPU)["torch_cpu"]
    assert "too slow" in capable_kernels(shape, CPU)["reference"]
    assert not capable_kernels(shape, CPU, ("reference",))["reference"]
    assert "it runs on cuda" in capable_kernels(shape, CPU)["cudnn"]


def test_beyond_the_dense_yardstick_results_are_compared_with_one_device():
    shape = shape_of("causal", tokens=4096, dtype="bfloat16")
    assert dense_yardstick(shape, whole_inputs(shape_of("causal", tokens=1), CPU)) is None
    yardstick = Yardstick("torch_cpu", {})
    # Four roundings of 2⁻⁸: two kernels in bfloat16.
    assert limits(shape, yardstick, {}, LAW_5)["dk"].limit == 4 * 2.0**-8


def test_what_is_not_a_number_is_wrong():
    shape = shape_of("causal")
    allowed = limits(shape, Yardstick("float64", {}), {}, LAW_5)
    found = {name: Error(0.0, 0.0, 10) for name in ("out", "dq", "dk")} | {"dv": Error(float("nan"), 0.0, 10)}
    assert "dv by nan" in wrong(found, allowed)
