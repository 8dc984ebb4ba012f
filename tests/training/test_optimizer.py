"""The optimizer steps float32 masters, and goes on from its moments as if it had never stopped."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ringspan.training.optimizer import Optimizer, learning_rate_at


def test_the_learning_rate_rises_to_its_peak_and_falls_to_a_tenth():
    rates = [learning_rate_at(step, peak=1.0, warmup_steps=10, steps=100) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert max(rates) == rates[9]
    assert all(after < before for before, after in pairwise(rates[9:]))
    assert rates[-1] == pytest.approx(0.1)
    assert learning_rate_at(54 + 1, peak=1.0, warmup_steps=10, steps=100) == pytest.approx(0.55)


def test_without_warm_up_the_first_step_is_near_the_peak():
    assert learning_rate_at(1, peak=2.0, warmup_steps=0, steps=1) == pytest.approx(0.2)
    assert learning_rate_at(1, peak=2.0, warmup_steps=0, steps=1000) == pytest.approx(2.0, rel=1e-4)


def small_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3)).to(dtype)


def one_step(model: nn.Module, optimizer: Optimizer, step: int) -> float:
    inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(step)).to(next(model.parameters()).dtype)
    loss = model(inputs).square().mean()
    loss.backward()
    optimizer.step(1e-2)
    return loss.item()


def test_float32_equals_torch_adamw_with_decay_on_matrices_alone():
    model, reference = small_model(), small_model()
    optimizer = Optimizer(model, weight_decay=0.1, gradient_clip=1e9)
    matrices = [parameter for parameter in reference.parameters() if parameter.dim() == 2]
    vectors = [parameter for parameter in reference.parameters() if parameter.dim() == 1]
    adam = torch.optim.AdamW([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(5):
        one_step(model, optimizer, step)
        reference(torch.randn(8, 6, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        adam.step()
        adam.zero_grad()
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_gradients_are_clipped_and_their_norm_before_that_is_returned():
    model = small_model()
    optimizer = Optimizer(model, weight_decay=0.0, gradient_clip=1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert float(optimizer.step(1e-2)) == pytest.approx(count**0.5, rel=1e-6)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_bfloat16_weights_follow_float32_masters_that_take_steps_too_small_for_them():
    model = small_model(torch.bfloat16)
    optimizer = Optimizer(model, weight_decay=0.0, gradient_clip=1.0)
    before = {name: master.clone() for name, master in optimizer.masters.items()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(1e-5)
    for name, parameter in model.named_parameters():
        moved = (optimizer.masters[name] - before[name]).detach().abs()
        assert optimizer.masters[name].dtype == torch.float32
        assert float(moved.min()) > 5e-6
        assert torch.equal(parameter, optimizer.masters[name].bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_restored_optimizer_goes_on_as_if_it_had_never_stopped(dtype: torch.dtype):
    model = small_model(dtype)
    optimizer = Optimizer(model, weight_decay=0.1, gradient_clip=1.0)
    for step in range(3):
        one_step(model, optimizer, step)
    kept = {name: master.detach().clone() for name, master in optimizer.masters.items()}
    moments = {name: moment.clone() for name, moment in optimizer.moments().items()}
    goes_on = [one_step(model, optimizer, step) for step in range(3, 6)]

    other = small_model(dtype)
    resumed = Optimizer(other, weight_decay=0.1, gradient_clip=1.0)
    with torch.no_grad():
        for name, master in resumed.masters.items():
            master.copy_(kept[name])
    resumed.restore(moments, step=3)
    assert [one_step(other, resumed, step) for step in range(3, 6)] == goes_on


def test_rows_that_two_axes_split_are_counted_once_each_in_the_norm():
    # As FSDP leaves what a tensor axis has split already: four parts, of which one axis' is a strided shard.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from ringspan.training.optimizer import _num_parts

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("context", "tensor"))
        for placements, parts in (
            ([_StridedShard(0, split_factor=2), Shard(0)], 4),
            ([Shard(0), Replicate()], 2),
            ([Replicate(), Replicate()], 1),
        ):
            assert _num_parts(DTensor.from_local(torch.zeros(2, 3), mesh, placements, run_check=False)) == parts
    finally:
        dist.destroy_process_group()
    assert _num_parts(torch.zeros(2)) == 1
