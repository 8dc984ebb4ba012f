"""What the ranks of test_cuda_interrupted run, each on its own GPU: steps after those that an error has ended in the middle.

torchrun --nproc-per-node 2 tests/gpu/interrupted_ranks.py
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from ringspan.transformer import Offload, ParallelModel, parallelize
from tests.gpu.tensor_ranks import model
from tests.gpu.torchrun import start
from tests.support.errors import relative
from tests.support.interruptions import interrupted
from tests.support.models import make_batch
from tests.transformer.parallel_ranks import step, whole_gradients

LENGTHS = {"cuda": (1023, 331), "cpu": (63, 21)}
BUDGET = 2e-2
"""Relative. Kernels add in another order at every call, and bfloat16 rounds; what is left of another step is as large as a gradient."""


def check(parallel: ParallelModel, device: torch.device) -> float:
    """How far gradients after an interrupted forward and an interrupted backward are off at most; raises beyond the budget."""
    batches: list[Any] = [
        ({name: each.to(device) for name, each in make_batch(2, length).items()}, None) for length in LENGTHS[device.type]
    ]
    optimizer, worst = torch.optim.SGD(parallel.model.parameters()), 0.0
    step(parallel, batches)
    right = whole_gradients(parallel.model)
    for _ in interrupted(parallel.model.model.layers[1].mlp, partial(step, parallel, batches)):
        for _ in range(2):
            optimizer.zero_grad()
            step(parallel, batches)
            for name, gradient in whole_gradients(parallel.model).items():
                assert gradient is not None
                error = relative(gradient, right[name])
                assert error <= BUDGET, f"{name} is off by {error:.1e}"
                worst = max(worst, error)
    return worst


def main() -> None:
    """With and without offload and shared checkpoints, parameters sharded."""
    device = start()
    mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("context",))
    for how in (
        {"rematerialise": "none"},
        {"rematerialise": "attention_output", "offload": Offload(in_flight=1)},
        {"rematerialise": "full", "layers_per_checkpoint": 2, "offload": Offload()},
    ):
        parallel = parallelize(model(device, torch.float32), mesh, compute_dtype=torch.bfloat16, **how)
        worst = check(parallel, device)
        if dist.get_rank() == 0:
            print(f"{how['rematerialise']}: gradients are off by {worst:.1e} at most", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
