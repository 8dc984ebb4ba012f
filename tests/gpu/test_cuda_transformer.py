"""What only a GPU can show of the blockwise transformer: products in float32, copies on a side stream, memory that stays flat."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import ringspan
from ringspan.transformer import Offload, make_store
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
    for _ in range(3):
        x, parked = torch.zeros(1 << 22, device="cuda"), []
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
    assert store.bytes_used == 0 and store.most_bytes_used == 8 * (1 << 24)


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
    monkeypatch.setattr("ringspan.transformer.blockwise.can_fuse", lambda x: False)
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
    assert slope["full, offloaded"] < slope["full"] < slope["attention_output"] < slope["none"], slope
    saved = slope["attention_output"] - slope["full"]
    # Of six layers, each attention output and its statistics; the layer at work has its own either way.
    assert saved == pytest.approx(6 * (2 * 1024 + 4 * 8), rel=0.35), slope
