"""What the processes of test_parallelize run over a tensor axis beside the cases: meshes in turn, families, half precision, breakages."""

from __future__ import annotations

import gc
import math
import time
from contextlib import nullcontext
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from ringspan.transformer import LiveBytes, parallelize, pieces, tensor_parallel
from tests.support.models import make_batch, tiny_llama
from tests.transformer.parallel_ranks import MODELS, SMALL, Case, labels_of, moved, run_case, step, whole_gradients

MESHES: tuple[dict[str, int], ...] = ({"shard": 2, "tensor": 2}, {"context": 4}, {"context": 2, "tensor": 2})
"""One after the other, a step on each."""
CLIP = 0.5
Steps = tuple[list[tuple[Tensor, Tensor]], dict[str, Tensor]]


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    # An eps that keeps a step from being the sign of a gradient that is nearly 0.
    return torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-3)


def _step_batches(number: int) -> list[tuple[dict[str, Tensor], None]]:
    return [(make_batch(1, 13 + 2 * part, seed=100 + 2 * number + part), None) for part in range(2)]


def never_stopped() -> Steps:
    """Loss and gradient norm of each step of the unsplit model, and its weights at the end."""
    model: Any = MODELS["qwen 2"]()
    optimizer, steps = _optimizer(model), []
    for number in range(len(MESHES)):
        batches = [batch for batch, _ in _step_batches(number)]
        counts = [int(labels_of(batch).ne(-100).sum()) for batch in batches]
        loss = sum(model(**batch).loss * count / sum(counts) for batch, count in zip(batches, counts, strict=True))
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        steps.append((loss.detach(), norm))
    return steps, {name: parameter.detach() for name, parameter in model.named_parameters()}


def carried_on(group: Any) -> Steps:
    """The same with every step on another mesh, each of which loads what the one before saved."""
    folder: list[Any] = [mkdtemp()]
    dist.broadcast_object_list(folder)
    steps, whole_weights = [], {}
    for number, axes in enumerate(MESHES):
        mesh = init_device_mesh("cpu", tuple(axes.values()), mesh_dim_names=tuple(axes))
        model = MODELS["qwen 2"]()
        parallel = parallelize(model, mesh, **SMALL)
        optimizer = _optimizer(model)
        if number:
            # Not at first: asked for the state of an optimizer that has none, this makes one that has counted a step.
            state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
            dcp.load(state, checkpoint_id=f"{folder[0]}/{number - 1}")
            set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        place, num_replicas = (mesh.get_local_rank("shard"), axes["shard"]) if "shard" in axes else (0, 1)
        loss = step(parallel, _step_batches(number)[place::num_replicas])
        norm = parallel.clip_gradients(CLIP)
        optimizer.step()
        optimizer.zero_grad()
        steps.append((loss, norm))
        state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        dcp.save(state, checkpoint_id=f"{folder[0]}/{number}")
        weights: Any = dict(model.named_parameters())
        whole_weights = {name: weight.full_tensor().detach() for name, weight in weights.items()}
    dist.barrier()
    if dist.get_rank() == 0:
        rmtree(folder[0])
    return steps, whole_weights


def split_in_half_precision(group: Any) -> Any:
    """As `in_half_precision`, over a tensor axis, and the norm by which its gradients are clipped, by both of its makers."""
    case = Case({"context": 1, "tensor": 2}, "even llama", how={**SMALL, "compute_dtype": torch.bfloat16})
    model = MODELS["even llama"]().float()
    parallel = parallelize(model, init_device_mesh("cpu", (1, 2), mesh_dim_names=("context", "tensor")), **case.how)
    loss = step(parallel, case.batches(0))
    norms = [nn.utils.clip_grad_norm_(model.parameters(), math.inf), parallel.clip_gradients(math.inf)]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return loss, whole_gradients(model), norms


SPLIT_FAMILIES = ("mistral", "smollm3", "gemma", "gemma3_text", "granite")
"""Those over a tensor axis that no case has."""


def of_family(name: str) -> nn.Module:
    """A model of a family, none of whose parameters is what it was at first."""
    from tests.transformer.test_parallelize_alone import family

    return moved(family(name))


def split_families(group: Any) -> dict[str, Any]:
    """A step of each over a tensor axis."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tensor",))
    found = {}
    for name in SPLIT_FAMILIES:
        model = of_family(name)
        parallel = parallelize(model, mesh, **SMALL)
        found[name] = step(parallel, [(make_batch(2, 11), None)]), whole_gradients(model)
    return found


def kept_bytes(group: Any) -> dict[str, float]:
    """What a layer more keeps for a token of a context shard until its backward, by mode."""
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("context", "tensor"))
    found = {}
    for mode in ("none", "attention_output", "full"):
        held = []
        for layers in (1, 3):
            model = tiny_llama(dtype=torch.float32, num_hidden_layers=layers, **KEPT_SIZES)
            how = {"shard_parameters": False, "kernel": "torch_cpu", "rematerialise": mode}
            parallel = parallelize(model, mesh, feed_forward_chunk=128, loss_tile=128, **how)
            part = parallel.context.sequence(128).shard_batch({"input_ids": torch.zeros(1, 128, dtype=torch.int64)})
            with LiveBytes() as live:
                parameters: Any = list(model.parameters())
                live.ignore(*(parameter.to_local() for parameter in parameters), *model.buffers())
                hidden = model.model(**part, use_cache=False).last_hidden_state
                held.append(_settled(live))
            assert hidden.requires_grad and hidden.shape[1] == 64
        found[mode] = (held[1] - held[0]) / 2 / 128
    return found


def _settled(live: LiveBytes) -> int:
    """What is held for good: a thread of gloo lets go of a message up to some milliseconds after it has arrived."""
    gc.collect()
    found = live.now()
    for _ in range(10):
        time.sleep(0.02)
        found = min(found, live.now())
    return found


KEPT_SIZES = {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 8, "num_key_value_heads": 2}


def broken_splits(group: Any) -> dict[str, Any]:
    """A case over a tensor axis with one thing wrong at a time."""
    case = Case({"tensor": 2}, "even llama", how=SMALL)
    breakages = {
        "gradients of norms that no one sums": (pieces.SumGradient, "backward", staticmethod(lambda ctx, gradient: (gradient, None))),
        "biases that every rank adds": (tensor_parallel, "bias_apart", lambda module: nullcontext()),
        "gradients of gathered tokens that are this rank's alone": (pieces.TensorGroup, "gather_rows", _gather_unsummed),
        "fillings that are labelled": (pieces.TensorGroup, "take", _take_and_repeat),
    }
    found = {}
    for name, (owner, attribute, wrong) in breakages.items():
        with mock.patch.object(owner, attribute, wrong):
            found[name] = run_case(case)
    return found


def _gather_unsummed(self: pieces.TensorGroup, x: Tensor) -> Tensor:
    return pieces._Moved.apply(x, self, pieces._gather, pieces._own_rows)


def _take_and_repeat(self: pieces.TensorGroup, x: Tensor, fill: float = 0) -> Tensor:
    piece = self.piece_length(x.shape[1])
    return torch.cat([x, x], 1)[:, self.rank * piece : (self.rank + 1) * piece]
