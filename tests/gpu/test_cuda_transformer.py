"""What only a GPU can show of the blockwise transformer: products in float32, copies on a side stream, memory that stays flat."""

from __future__ import annotations

import copy
import gc
import sys
from dataclasses import asdict
from typing import Any

import pytest
import torch

import ringspan
from ringspan.transformer import LossTerms, Offload, make_store, tiled_cross_entropy
from ringspan.transformer.accumulate import add_product_
from tests.support.errors import relative
from tests.support.models import gradients, make_batch, tiny_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here: streams and page-locked memory are a GPU's"),
]


def test_products_are_added_without_being_rounded_to_bfloat16():
    torch.manual_seed(0)
    left, right = (torch.randn(3000, columns, device="cuda").bfloat16() for columns in (384, 256))
    total = torch.ones(384, 256, device="cuda")
    add_product_(total, left, right)
    assert relative(total, left.double().T @ right.double() + 1) < 1e-5


@pytest.mark.parametrize("in_flight", [1, 2, 5])
def test_tensors_come_back_from_the_host_while_others_are_computed(in_flight: int):
    store = make_store(torch.device("cuda"), Offload(in_flight=in_flight))
    # Lengths that vary: buffers that are too large, and too small.
    for size in (4 << 20, 3 << 20, 5 << 20):
        x, parked = torch.zeros(size, device="cuda"), []
        for step in range(8):
            x = x * 0.5 + step
            parked.append((store.put(x.clone()), float(x[0])))
        noise = torch.randn(2048, 2048, device="cuda")
        while parked:
            each, expected = parked.pop()
            found = each()
            noise = noise @ noise / 2048**0.5
            assert bool((found == expected).all())
            del each, found
    torch.cuda.synchronize()
    assert store.bytes_used == 0 and store.most_bytes_used == store.bytes_held == 8 * 4 * (5 << 20)


TERMS = {
    "plain": LossTerms(),
    "smoothing": LossTerms(label_smoothing=0.2),
    "z": LossTerms(z_loss=0.03),
    "softcap": LossTerms(softcap=2.0),
    "all": LossTerms(label_smoothing=0.1, z_loss=0.02, softcap=3.0, multiplier=1.7),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [37, 4096, 50257, 128256])
@pytest.mark.parametrize("terms", TERMS)
def test_the_fused_token_loss_is_the_formula(terms: str, columns: int, dtype: torch.dtype):
    from ringspan.kernels.fused_token_loss import fused_token_loss_

    generator = torch.Generator("cuda").manual_seed(0)
    raw = (torch.randn(70, columns, device="cuda", generator=generator) * 4).to(dtype)
    labels = torch.randint(columns, (70,), device="cuda", generator=generator)
    labels[:3] = torch.tensor([0, columns - 1, -100], device="cuda")
    factor = torch.full((), 0.25, device="cuda")
    module = sys.modules["ringspan.transformer.tiled_loss"]
    expected = module._tile(raw.double(), labels, factor.double(), TERMS[terms], True)
    raw[2] = torch.nan  # a token that does not count has neither loss nor gradient, whatever its logits are
    kept = raw.clone()
    alone = fused_token_loss_(raw, labels, factor, **asdict(TERMS[terms]), with_gradient=False)
    torch.testing.assert_close(raw, kept, rtol=0, atol=0, equal_nan=True)
    loss = fused_token_loss_(raw, labels, factor, **asdict(TERMS[terms]), with_gradient=True)
    assert torch.equal(alone, loss)
    assert relative(loss, expected.loss) < 3e-6
    # A gradient is rounded once: its error is that of rounding the exact one.
    assert relative(raw.double(), expected.gradient) < 1.02 * relative(expected.gradient.to(dtype).double(), expected.gradient) + 3e-6
    assert not raw[2].any()
    labels[5] = columns
    assert fused_token_loss_(kept, labels, factor, **asdict(TERMS[terms]), with_gradient=False).isnan()


def test_a_tile_of_the_loss_takes_two_bytes_a_logit_and_equals_plain_torch(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    columns, tile = 50257, 4096
    hidden = (torch.randn(1, 3 * tile + 5, 256, device="cuda") / 4).bfloat16().requires_grad_()
    weight = (torch.randn(columns, 256, device="cuda") / 4).bfloat16()
    labels = torch.randint(columns, hidden.shape[:2], device="cuda")
    found = []
    for fused in (True, False):
        if not fused:
            monkeypatch.setattr(sys.modules["ringspan.transformer.tiled_loss"], "_fused", lambda: None)
        hidden.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = tiled_cross_entropy(hidden, weight, labels, tile=tile, scale=1 / labels.numel(), terms=LossTerms(z_loss=1e-4))
        peak = torch.cuda.max_memory_allocated() - before
        loss.backward()
        found.append((loss.detach(), hidden.grad, peak))
    (loss, gradient, peak), (plain_loss, plain_gradient, plain_peak) = found
    assert relative(loss, plain_loss) < 1e-5 and relative(gradient, plain_gradient) < 4e-3
    # The plain one holds the logits as they come and in float32: six bytes each.
    assert peak < 1.3 * 2 * columns * tile + 2 * hidden.numel() < plain_peak / 2


SIZES = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 2,
    "vocab_size": 32000, "max_position_embeddings": 1 << 20,
}  # fmt: skip
HOW: dict[str, dict[str, Any]] = {
    "none": {"rematerialise": "none"},
    "full": {"rematerialise": "full"},
    "attention_output": {"rematerialise": "attention_output"},
    "full, offloaded": {"rematerialise": "full", "offload": Offload()},
    "attention_output, offloaded": {"rematerialise": "attention_output", "offload": Offload()},
}


def run(model: Any, length: int, **how: Any) -> tuple[float, Any, int]:
    """Loss, gradients, and the most bytes beyond the model's."""
    # The model of the run before is in a cycle with its hooks: if it went during this one, less would seem to be taken.
    gc.collect()
    mine = copy.deepcopy(model)
    parallel = ringspan.parallelize(mine, feed_forward_chunk=2048, loss_tile=1024, **how)
    batch = {name: tensor.cuda() for name, tensor in make_batch(1, length).items()}
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = parallel.loss(parallel.shard_batch(batch))
    loss.backward()
    torch.cuda.synchronize()
    return float(loss.detach()), gradients(mine), torch.cuda.max_memory_allocated() - before


def test_fused_norms_and_gates_are_their_specification():
    from tests.transformer import interpreted

    interpreted.main()


def test_a_model_whose_parts_are_fused_has_the_gradients_that_it_has_as_transformers_wrote_it(monkeypatch: pytest.MonkeyPatch):
    model = tiny_llama("ringspan", torch.bfloat16, **SIZES).cuda()
    fused = run(model, 4096, **HOW["full"])
    for module in ("blockwise", "fused"):
        monkeypatch.setattr(sys.modules[f"ringspan.transformer.{module}"], "can_fuse", lambda x: False)
    unfused = run(model, 4096, **HOW["full"])
    assert abs(fused[0] - unfused[0]) <= 1e-3 * unfused[0]
    # Both round to bfloat16 at every step, at the same places on the way forward.
    assert max(relative(fused[1][key], gradient) for key, gradient in unfused[1].items()) < 2e-2


@pytest.mark.parametrize("name", HOW)
def test_every_mode_has_the_gradients_of_layers_that_keep_everything(name: str):
    model = tiny_llama("ringspan", torch.bfloat16, **SIZES).cuda()
    expected = run(model, 8192, **HOW["none"])
    found = run(model, 8192, **HOW[name])
    assert abs(found[0] - expected[0]) <= 1e-3 * expected[0]
    # The same kernels on the same inputs; their backward adds in an order of its own: some roundings of 4e-3.
    assert max(relative(found[1][key], gradient) for key, gradient in expected[1].items()) < 2e-2


def test_the_peak_grows_by_what_the_formula_says():
    model = tiny_llama("ringspan", torch.bfloat16, **SIZES).cuda()
    most = {name: [run(model, length, **how)[2] for length in (16384, 49152)] for name, how in HOW.items()}
    slope = {name: (long - short) / 32768 for name, (short, long) in most.items()}
    assert slope["full, offloaded"] < slope["full"] < slope["attention_output"] < slope["none"], (slope, most)
    saved = slope["attention_output"] - slope["full"]
    # Of six layers, each attention output and its statistics; the layer at work has its own either way.
    assert saved == pytest.approx(6 * (2 * 1024 + 4 * 8), rel=0.35), slope
