"""What the processes of test_parallelize run: the same models and batches as the unsplit yardstick beside them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import ringspan
from ringspan.transformer import Offload, ParallelModel, gradients, parallelize
from ringspan.transformer.parallel_model import TOTAL_KEYWORD
from tests.support.attempts import said_of
from tests.support.models import VOCABULARY, make_batch, seeded, tiny_llama

_SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "attn_implementation": "eager",
}  # fmt: skip
MODELS = {
    "llama": tiny_llama,
    "deep llama": lambda: tiny_llama(num_hidden_layers=5),
    "tied llama": lambda: tiny_llama(tie_word_embeddings=True),
    "qwen 3": lambda: seeded(Qwen3ForCausalLM, Qwen3Config(**_SMALL)),
    # A window wider than any padding: where a row sees nothing, eager attention in float64 gives NaN.
    "gemma 2": lambda: seeded(Gemma2ForCausalLM, Gemma2Config(**_SMALL, sliding_window=9, query_pre_attn_scalar=4)),
    "qwen 2": lambda: moved(seeded(Qwen2ForCausalLM, Qwen2Config(**{**_SMALL, "intermediate_size": 26, "tie_word_embeddings": True}))),
    "even llama": lambda: moved(seeded(LlamaForCausalLM, LlamaConfig(**_SMALL, attention_bias=True, mlp_bias=True))),
    "frozen even llama": lambda: freeze(MODELS["even llama"]()),
    "llama of threes": lambda: tiny_llama(intermediate_size=42),
    "bfloat16 even llama": lambda: MODELS["even llama"]().bfloat16(),
    "bfloat16 llama": lambda: tiny_llama(dtype=torch.bfloat16),
    "frozen": lambda: freeze(tiny_llama()),
}


def moved(model: nn.Module) -> nn.Module:
    """Biases and norms are no longer what they are at first: zeros and ones would hide which of them is used where."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 4)
    return model


def freeze(model: nn.Module) -> nn.Module:
    """Everything but the feed-forward's up projections stands still."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("up_proj" in name)
    return model


DOCUMENTS = (7, 1, 11, 4)


def packed_batch(seed: int) -> tuple[dict[str, Tensor], ringspan.Mask]:
    """Documents in one sequence, none of which sees or predicts another."""
    batch = make_batch(2, sum(DOCUMENTS), seed=seed)
    borders = [0, *torch.tensor(DOCUMENTS).cumsum(0).tolist()]
    batch["labels"][:, borders[:-1]] = -100
    batch["position_ids"] = torch.cat([torch.arange(length) for length in DOCUMENTS]).expand(2, -1)
    return batch, ringspan.causal() & ringspan.documents(borders)


def apart(batch: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The documents of a packed batch, each as a batch of its own."""
    borders = [0, *torch.tensor(DOCUMENTS).cumsum(0).tolist()]
    return [{key: batch[key][:, start:stop] for key in ("input_ids", "labels")} for start, stop in pairwise(borders)]


@dataclass(frozen=True)
class Case:
    """A model over a mesh. `batches(replica)` are the micro-batches of one step."""

    mesh: dict[str, int]
    model: str = "llama"
    data: str = "padded"
    how: dict[str, Any] = field(default_factory=dict)

    @property
    def num_replicas(self) -> int:
        return self.mesh.get("shard", 1) * self.mesh.get("replicate", 1)

    def batches(self, replica: int) -> list[tuple[dict[str, Tensor], ringspan.Mask | None]]:
        if self.data == "short":
            # Three tokens on two ranks of two pieces: one rank owns none.
            return [(make_batch(2, 3, seed=replica), None), (make_batch(1, 17, seed=60 + replica), None)]
        if self.data == "packed":
            return [packed_batch(seed=replica), (make_batch(1, 17, seed=50 + replica), None)]
        # Unlike lengths and numbers of labels everywhere: an average of averages is not the average.
        first = make_batch(2, 19 + 4 * replica, seed=replica, padded=(0, 5 + 3 * replica))
        second = make_batch(1, 13 + 6 * replica, seed=20 + replica)
        if self.data == "nothing on one":
            second["labels"].fill_(-100)
        return [(first, None), (second, None)]


def whole(case: Case) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Loss and gradients of the unsplit model, each labelled token weighing the same."""
    model: Any = MODELS[case.model]()
    batches = []
    for replica in range(case.num_replicas):
        for batch, mask in case.batches(replica):
            batches += [batch] if mask is None else apart(batch)
    counts = [int(labels_of(batch).ne(-100).sum()) for batch in batches]
    total = torch.zeros((), dtype=torch.float64)
    for batch, count in zip(batches, counts, strict=True):
        if count:
            loss = model(**batch).loss * count / sum(counts)
            loss.backward()
            total += loss.detach()
    return total, {name: parameter.grad for name, parameter in model.named_parameters()}


def labels_of(batch: Mapping[str, Tensor]) -> Tensor:
    """What the model is to predict, without padding."""
    labels = batch["labels"][:, 1:]
    return labels if "attention_mask" not in batch else labels.masked_fill(batch["attention_mask"][:, 1:] == 0, -100)


def step(parallel: ParallelModel, batches: list[tuple[dict[str, Tensor], Any]]) -> Tensor:
    """The loss of one step, its gradients left on the model."""
    masks = [mask if mask is not None else ringspan.causal() for _, mask in batches]
    loss = torch.zeros((), dtype=torch.float64)
    for part in parallel.shard_batches([batch for batch, _ in batches], masks):
        share = parallel.loss(part)
        share.backward()
        loss += share.detach().cpu()
    parallel.sum_gradients()
    return loss


def whole_gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """Every gradient, put together where it is sharded. Collective."""
    found = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        found[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return found


def run_case(case: Case) -> tuple[Tensor, dict[str, Tensor | None]]:
    """A case on the ranks of the default group."""
    mesh = init_device_mesh("cpu", tuple(case.mesh.values()), mesh_dim_names=tuple(case.mesh))
    model = copy.deepcopy(MODELS[case.model]())
    parallel = parallelize(model, mesh, **case.how)
    place = {name: mesh.get_local_rank(name) for name in case.mesh}
    replica = place.get("replicate", 0) * case.mesh.get("shard", 1) + place.get("shard", 0)
    given: list[Tensor] = []
    with mock.patch.object(gradients, "give_away", lambda *tensors: given.extend(tensors)):
        loss = step(parallel, case.batches(replica))
    known = {tensor.data_ptr() for tensor in given}
    for name, parameter in parallel.model.named_parameters():
        if parallel._is_sharded and parameter.grad is not None:
            assert isinstance(parameter.grad, DTensor)
            assert parameter.grad.to_local().data_ptr() in known, f"FSDP's stream may unmap the gradient of {name} while another reads it"
    return loss, whole_gradients(parallel.model)


SMALL: dict[str, Any] = {"feed_forward_chunk": 5, "loss_tile": 4}
CASES: dict[int, list[Case]] = {
    2: [
        Case({"context": 2}, how={**SMALL, "rematerialise": "full"}),
        Case({"context": 2}, "tied llama", "packed", {**SMALL, "rematerialise": "attention_output"}),
        Case({"shard": 2}, "qwen 3", how={**SMALL, "rematerialise": "none"}),
        Case({"replicate": 2}, "gemma 2", how={**SMALL, "rematerialise": "full"}),
        Case({"shard": 2}, "llama", "nothing on one", how={**SMALL, "reshard_after_forward": False}),
        Case({"context": 2}, "frozen", how=SMALL),
        Case({"context": 2}, how={"shard_parameters": False, **SMALL}),
        Case({"context": 2}, "gemma 2", how={"loss_tile": None, "feed_forward_chunk": None, "rematerialise": "none"}),
        Case({"tensor": 2}, "even llama", how={**SMALL, "rematerialise": "full"}),
        Case({"tensor": 2}, "qwen 3", "packed", {"loss_tile": None, "feed_forward_chunk": None, "rematerialise": "none"}),
        Case({"context": 1, "tensor": 2}, "qwen 2", "packed", {**SMALL, "rematerialise": "attention_output", "offload": Offload()}),
        Case({"context": 1, "tensor": 2}, "frozen even llama", how=SMALL),
        Case({"context": 1, "tensor": 2}, "gemma 2", how={**SMALL, "shard_parameters": False}),
        Case({"context": 2}, "deep llama", how={**SMALL, "rematerialise": "full", "layers_per_checkpoint": 2, "offload": Offload()}),
        Case({"shard": 2}, "deep llama", "packed", {**SMALL, "rematerialise": "attention_output", "layers_per_checkpoint": 3}),
        Case({"context": 1, "tensor": 2}, "even llama", how={**SMALL, "rematerialise": "full", "layers_per_checkpoint": 2}),
    ],
    3: [
        Case({"context": 3}, "llama", "packed", {**SMALL, "strategy": "ulysses"}),
        Case({"shard": 3}, "tied llama", how={**SMALL, "offload": Offload()}),
        Case({"tensor": 3}, "llama of threes", "short", {**SMALL, "rematerialise": "full", "offload": Offload()}),
    ],
    4: [
        Case({"shard": 2, "context": 2}, how={**SMALL, "rematerialise": "attention_output"}),
        Case({"shard": 2, "context": 2}, "tied llama", "packed", {**SMALL, "rematerialise": "full", "offload": Offload()}),
        Case({"replicate": 2, "context": 2}, "gemma 2", how={**SMALL, "layout": "striped"}),
        Case({"replicate": 2, "shard": 2}, "qwen 3", how=SMALL),
        Case({"replicate": 2, "shard": 1, "context": 2}, how=SMALL),
        Case({"context": 4}, "llama", "packed", {**SMALL, "strategy": "two_dimensional", "options": {"ulysses": 2}}),
        Case({"context": 2, "shard": 2}, "frozen", "nothing on one", SMALL),
        Case({"context": 2, "tensor": 2}, "qwen 2", "packed", {**SMALL, "rematerialise": "attention_output"}),
        Case({"context": 2, "tensor": 2}, "even llama", "short",
             {**SMALL, "strategy": "ulysses", "rematerialise": "none", "shard_parameters": False}),
        Case({"shard": 2, "tensor": 2}, "even llama", "nothing on one", {**SMALL, "rematerialise": "full"}),
        Case({"replicate": 2, "shard": 1, "context": 1, "tensor": 2}, "qwen 3", how=SMALL),
    ],
}  # fmt: skip


def every_case(group: Any) -> list[Any]:
    """All cases for this number of ranks; on four, then what `carried_on` returns."""
    from tests.transformer.tensor_ranks import carried_on

    found: list[Any] = [run_case(case) for case in CASES[dist.get_world_size()]]
    return [*found, carried_on(group)] if dist.get_world_size() == 4 else found


def in_half_precision(group: Any) -> Any:
    """float32 masters, computing in bfloat16: the dtype of the gradients, the loss, and the gradients."""
    case = Case({"context": 2}, how={**SMALL, "compute_dtype": torch.bfloat16})
    model = tiny_llama(dtype=torch.float32)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("context",))
    parallel = parallelize(model, mesh, **case.how)
    loss = step(parallel, case.batches(0))
    dtypes = {str(parameter.grad.dtype) for parameter in model.parameters() if parameter.grad is not None}
    return dtypes, loss, whole_gradients(model)


def from_meta(group: Any) -> Any:
    """A model that had no memory when it was prepared."""
    weights = MODELS["llama"]()
    with torch.device("meta"):
        model = type(weights)(weights.config).double()
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("shard",))
    parallel = parallelize(model, mesh, **SMALL)
    model.to_empty(device="cpu")
    given = dict(weights.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(distribute_tensor(given[name].detach(), parameter.device_mesh, parameter.placements))
    model.model.rotary_emb = type(weights.model.rotary_emb)(weights.config)
    case = Case({"shard": 2})
    return step(parallel, case.batches(mesh.get_rank())), whole_gradients(model)


def refusals(group: Any) -> list[str]:
    """What is wrong with a mesh, or asked for by one rank alone; the group goes on working."""
    rank = dist.get_rank()
    nameless = init_device_mesh("cpu", (2,))
    strange = init_device_mesh("cpu", (2, 1), mesh_dim_names=("context", "pipeline"))
    tensor = init_device_mesh("cpu", (1, 2), mesh_dim_names=("context", "tensor"))
    context = init_device_mesh("cpu", (2,), mesh_dim_names=("context",))
    late = init_device_mesh("cpu", (2, 1), mesh_dim_names=("shard", "replicate"))
    shard = init_device_mesh("cpu", (2,), mesh_dim_names=("shard",))
    parallel = parallelize(tiny_llama(), shard, **SMALL)
    attempts = (
        lambda: parallelize(tiny_llama(), nameless),
        lambda: parallelize(tiny_llama(), strange),
        lambda: parallelize(tiny_llama(), tensor),
        lambda: parallelize(tiny_llama(), late),
        lambda: parallelize(tiny_llama(), context, context=("context", "shard"), shard="shard"),
        lambda: parallelize(tiny_llama(), context, loss_tile=0 if rank else 4),
        lambda: parallelize(tiny_llama(), context, rematerialise="full" if rank else "none"),
        lambda: parallelize(tiny_llama(), shard, shard_parameters=bool(rank)),
        lambda: parallelize(tiny_llama(), shard, compute_dtype=torch.bfloat16 if rank else None),
        lambda: parallelize(tiny_llama(), shard, parameters_on_host=bool(rank)),
        lambda: parallelize(tiny_llama(), shard, reshard_after_forward=bool(rank)),
        lambda: parallelize(MODELS["bfloat16 llama"]() if rank else tiny_llama(), shard),
        lambda: parallelize(MODELS["frozen"]() if rank else tiny_llama(), shard),
        lambda: parallel.shard_batches([make_batch(1, 9)] * (1 + rank)),
        lambda: parallel.shard_batch({**make_batch(1, 9), **({"extra": 1} if rank else {})}),
        lambda: parallelize(parallel.model, shard),
        lambda: parallelize(parallel.model, group),
        lambda: parallel.model.save_pretrained("nowhere"),
        lambda: parallel.model.save_pretrained("nowhere", state_dict=parallel.model.state_dict()),
    )
    said = said_of(attempts)
    parallel.loss(parallel.shard_batch(make_batch(1, 9 + rank)))
    return said


def sharded_parameters(group: Any) -> dict[str, int]:
    """How many parameters are sharded over a mesh of one axis, by its name."""
    found = {}
    for name in ("replicate", "shard", "context"):
        model = tiny_llama()
        parallelize(model, init_device_mesh("cpu", (2,), mesh_dim_names=(name,)), **SMALL)
        found[name] = sum(isinstance(parameter, DTensor) for parameter in model.parameters())
    return found


def extras(group: Any) -> dict[str, Any]:
    """Everything else for two ranks."""
    from tests.transformer.loop_ranks import after_interruptions, by_other_loops
    from tests.transformer.tensor_ranks import broken_splits, kept_bytes, split_families, split_in_half_precision
    from tests.transformer.validation_ranks import validated

    return {
        "half": in_half_precision(group),
        "meta": from_meta(group),
        "refusals": refusals(group),
        "sharded": sharded_parameters(group),
        "validated": validated(group),
        "split half": split_in_half_precision(group),
        "families": split_families(group),
        "kept": kept_bytes(group),
        "broken splits": broken_splits(group),
        "interrupted": after_interruptions(group),
        "loops": by_other_loops(group),
    }


def broken_by_averaged_gradients(group: Any) -> Any:
    """FSDP divides by the size of its group, as it does if nobody says otherwise."""
    from torch.distributed.fsdp import FSDPModule

    FSDPModule.set_gradient_divide_factor = lambda self, factor: None  # type: ignore[method-assign]
    FSDPModule.set_force_sum_reduction_for_comms = lambda self, enable: None  # type: ignore[method-assign]
    return run_case(Case({"shard": 2}))


def broken_by_averaged_averages(group: Any) -> Any:
    """Each micro-batch is a mean of its own, and these are averaged."""
    right = ParallelModel.shard_batches

    def wrong(self: ParallelModel, batches: Any, masks: Any = None) -> Any:
        return [{**part, TOTAL_KEYWORD: int(part["num_items_in_batch"]) * len(batches) * 2} for part in right(self, batches, masks)]

    ParallelModel.shard_batches = wrong  # type: ignore[method-assign]
    return run_case(Case({"shard": 2}))


def broken_by_tokens_of_this_replica_alone(group: Any) -> Any:
    """The weight of a token is one in its replica's tokens, halved for two replicas."""
    right = ParallelModel.shard_batches

    def wrong(self: ParallelModel, batches: Any, masks: Any = None) -> Any:
        parts = right(self, batches, masks)
        count = sum(int(part["num_items_in_batch"]) for part in parts)
        return [{**part, TOTAL_KEYWORD: 2 * count} for part in parts]

    ParallelModel.shard_batches = wrong  # type: ignore[method-assign]
    return run_case(Case({"shard": 2}))
