"""What the ranks of test_cuda_tensor_parallel run, each on its own GPU: a step over a tensor axis beside the unsplit model's.

torchrun --nproc-per-node 2 tests/gpu/tensor_ranks.py       # or 4: then two ranks share the context too
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from ringspan.transformer import parallelize
from tests.gpu.torchrun import start
from tests.support.errors import relative
from tests.support.models import make_batch, tiny_llama
from tests.transformer.parallel_ranks import whole_gradients

SIZES = {
    "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 4,
    "vocab_size": 1000, "attention_bias": True, "tie_word_embeddings": True, "max_position_embeddings": 4096,
}  # fmt: skip
LENGTHS = (1023, 331)


def model(device: torch.device, dtype: torch.dtype) -> Any:
    """The same weights at every call."""
    return tiny_llama("eager", dtype, **SIZES).to(device)


def whole(device: torch.device, dtype: torch.dtype) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the unsplit model in `dtype`."""
    mine = model(device, dtype)
    batches = [{name: tensor.to(device) for name, tensor in make_batch(2, length).items()} for length in LENGTHS]
    counts = [int(batch["labels"][:, 1:].ne(-100).sum()) for batch in batches]
    loss = sum(mine(**batch).loss * count / sum(counts) for batch, count in zip(batches, counts, strict=True))
    loss.backward()
    return float(loss.detach()), {name: parameter.grad for name, parameter in mine.named_parameters()}


def split(device: torch.device, compute_dtype: torch.dtype | None, mode: str) -> tuple[float, dict[str, Tensor | None]]:
    """The same over the mesh, from float32 parameters."""
    mine = model(device, torch.float32)
    mesh = init_device_mesh(device.type, (dist.get_world_size() // 2, 2), mesh_dim_names=("context", "tensor"))
    parallel = parallelize(mine, mesh, compute_dtype=compute_dtype, rematerialise=mode, feed_forward_chunk=256, loss_tile=128)
    batches = [{name: tensor.to(device) for name, tensor in make_batch(2, length).items()} for length in LENGTHS]
    loss = 0.0
    for part in parallel.shard_batches(batches):
        share = parallel.loss(part)
        share.backward()
        loss += float(share.detach())
    parallel.sum_gradients()
    return loss, whole_gradients(mine)


def main() -> None:
    """Every mode in float32, and the default in bfloat16 over float32; raises where one is off."""
    device = start()
    loss, gradients = whole(device, torch.float64)
    _, rounded = whole(device, torch.bfloat16)
    unsplit = max(relative(rounded[name], gradient) for name, gradient in gradients.items())
    cases = [(None, mode, 1e-4) for mode in ("none", "attention_output", "full")] + [(torch.bfloat16, "attention_output", 1.5 * unsplit)]
    for compute_dtype, mode, budget in cases:
        found, ours = split(device, compute_dtype, mode)
        errors: dict[str, float] = {name: relative(ours[name], gradient) for name, gradient in gradients.items()}
        worst = max(errors, key=lambda name: errors[name])
        if dist.get_rank() == 0:
            print(
                f"{compute_dtype or torch.float32} {mode}: loss {found:.6f} of {loss:.6f}, {worst} off by {errors[worst]:.1e}", flush=True
            )
        assert abs(found - loss) <= 10 * budget * loss and errors[worst] <= budget, f"{mode}: {worst} is off by {errors[worst]:.1e}"
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
