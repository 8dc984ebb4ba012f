"""A tensor axis without its ranks: how tokens are cut, what is refused, and what is clipped."""

from __future__ import annotations

import copy
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import ringspan
from ringspan.errors import RingspanError, UnsupportedError
from ringspan.transformer.gradients import clip_gradients
from ringspan.transformer.pieces import TensorGroup
from ringspan.transformer.tensor_parallel import FAMILIES, check_splits
from tests.support.attempts import said_of
from tests.support.errors import relative
from tests.support.models import gradients, make_batch, tiny_llama
from tests.transformer.parallel_ranks import MODELS
from tests.transformer.test_parallelize_alone import family


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("length", [1, 2, 7, 15])
def test_pieces_are_all_tokens_in_order_then_fillings_also_where_a_rank_owns_none(length: int, size: int):
    x = torch.arange(2 * length * 3).reshape(2, length, 3) + 1
    nobody: Any = None
    groups = [TensorGroup(nobody, rank, size) for rank in range(size)]
    parts = [group.take(x, fill=-100) for group in groups]
    assert {part.shape for part in parts} == {(2, groups[0].piece_length(length), 3)}
    whole = torch.cat(parts, 1)
    assert torch.equal(whole[:, :length], x) and bool((whole[:, length:] == -100).all())


EVEN = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "gemma2", "gemma3_text", "granite")


def test_families_that_are_known_to_split_do_and_others_are_refused_with_what_works():
    assert set(EVEN) == set(FAMILIES)
    for name in EVEN:
        check_splits(family(name), 2)
    for name in ("phi3", "cohere", "olmo2", "mixtral"):
        with pytest.raises(UnsupportedError, match=r"not known to split.*strategy='ulysses'"):
            check_splits(family(name), 2)


def test_heads_and_columns_that_do_not_divide_are_refused_with_the_axes_that_would():
    with pytest.raises(UnsupportedError, match=r"3 key heads and 9 query heads\. .*strategy='ulysses'"):
        check_splits(tiny_llama(), 2)
    model = tiny_llama(num_attention_heads=16, num_key_value_heads=4, hidden_size=64, intermediate_size=96)
    with pytest.raises(UnsupportedError, match="a tensor axis of 2 or 4 ranks"):
        check_splits(model, 8)
    with pytest.raises(UnsupportedError, match=r"rows of 64.*divides hidden_size"):
        check_splits(model, 2, num_shards=5)
    check_splits(model, 2, num_shards=64)


class Adapted(nn.Linear):
    """A linear map with something around it, as adapters are."""

    def forward(self, input: Tensor) -> Tensor:
        """Twice the map."""
        return 2 * super().forward(input)


def test_projections_that_are_more_than_linear_maps_and_parameters_without_a_place_are_refused():
    model: Any = MODELS["even llama"]()
    model.model.layers[1].mlp.up_proj = Adapted(16, 24)
    with pytest.raises(UnsupportedError, match="a projection is a Adapted"):
        check_splits(model, 2)
    model = MODELS["even llama"]()
    model.model.layers[0].self_attn.gate = nn.Linear(16, 4)
    with pytest.raises(UnsupportedError, match=r"layers\.0\.self_attn\.gate is a Linear with parameters"):
        check_splits(model, 2)


def clipped_alone(max_norm: float) -> tuple[dict[str, Tensor], Any, Tensor]:
    """A batch, the unsplit model with its gradients clipped, and the norm before."""
    batch, plain = make_batch(2, 13), tiny_llama()
    plain(**batch).loss.backward()
    return batch, plain, nn.utils.clip_grad_norm_(plain.parameters(), max_norm)


@pytest.mark.parametrize("max_norm", [0.3, 1e9])
def test_clipping_measures_the_unsplit_models_norm_and_scales_every_gradient(max_norm: float):
    batch, plain, expected = clipped_alone(max_norm)

    def run(group: Any) -> tuple[Tensor, dict[str, Tensor]]:
        model = copy.deepcopy(tiny_llama())
        parallel = ringspan.parallelize(model, group, feed_forward_chunk=5, loss_tile=4)
        parallel.loss(parallel.shard_batch(batch)).backward()
        parallel.sum_gradients()
        with pytest.raises(RingspanError, match="above 0"):
            parallel.clip_gradients(0.0 if group.rank else max_norm)
        return parallel.clip_gradients(max_norm), gradients(model)

    for norm, found in ringspan.run_in_process(2, run):
        assert relative(norm, expected) <= 2e-6
        for name, gradient in gradients(plain).items():
            assert relative(found[name], gradient) <= 2e-6, name


def test_gradients_in_host_memory_are_clipped_where_the_ranks_group_carries_the_gpus_tensors_alone():
    """As NCCL's does, under `parameters_on_host=True`: another rank's part has the norm 4."""

    class OfGPUs:
        devices = frozenset({"cuda"})

        def all_reduce(self, tensor: Tensor, operation: str = "sum") -> None:
            raise RuntimeError(f"No backend type associated with device type {tensor.device.type}")

        def gather_objects(self, mine: Any) -> list[Any]:
            return [mine, 16.0]

    parameter, transport = nn.Parameter(torch.zeros(2)), cast(Any, OfGPUs())
    parameter.grad = torch.tensor([0.0, 3.0])
    assert float(clip_gradients([parameter], 1.0, transport, is_counted=True)) == 5.0
    assert torch.allclose(parameter.grad, torch.tensor([0.0, 0.6]))


@pytest.mark.parametrize("max_norm", [0.3, 1e9])
def test_the_gradients_of_masters_are_clipped_where_they_are_given(max_norm: float):
    batch, plain, expected = clipped_alone(max_norm)

    def run(group: Any) -> tuple[Tensor, list[Tensor | None], list[str]]:
        model = copy.deepcopy(tiny_llama())
        parallel = ringspan.parallelize(model, group, feed_forward_chunk=5, loss_tile=4)
        masters = [nn.Parameter(parameter.detach().clone()) for parameter in model.parameters()]
        parallel.loss(parallel.shard_batch(batch)).backward()
        for master, parameter in zip(masters, model.parameters(), strict=True):
            master.grad, parameter.grad = parameter.grad, None
        parallel.sum_gradients(masters)
        said = said_of(
            [lambda: parallel.clip_gradients(max_norm), lambda: parallel.clip_gradients(max_norm, [] if group.rank else masters)]
        )
        return parallel.clip_gradients(max_norm, iter(masters)), [master.grad for master in masters], said

    for norm, found, said in ringspan.run_in_process(2, run, timeout_seconds=30.0):
        assert relative(norm, expected) <= 2e-6
        for gradient, parameter in zip(found, plain.parameters(), strict=True):
            assert gradient is not None and parameter.grad is not None and relative(gradient, parameter.grad) <= 2e-6
        assert "has a gradient" in said[0] and "masters" in said[0] and "none of 0 parameters" in said[1]
