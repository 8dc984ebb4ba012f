"""Parameters sharded by FSDP2 over all ranks that compute with them, and gradients summed over these."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from ringspan.transformer.layers import causal_model, decoder_layers


def shard_parameters(
    model: nn.Module, mesh: DeviceMesh, *, compute_dtype: torch.dtype | None, on_host: bool, reshard_after_forward: bool
) -> None:
    """Shards layers, embeddings and the rest of `model` with `fully_shard`, in place.

    FSDP divides gradients by the size of its group, as if every rank's loss were a mean. Here it is a share of one mean, and shares add up:
    the divisor is set to 1, and the reduction is a plain sum, which every backend has.

    Args:
        model: a causal language model.
        mesh: `(shards,)` or `(replicas, shards)`.
        compute_dtype: what parameters are cast to; gradients are then reduced in float32. None: as they are.
        on_host: whether shards live in host memory.
        reshard_after_forward: whether a layer's parameters are given up until its backward.
    """
    num_shards = mesh.shape[-1]
    keywords: dict[str, Any] = {
        "mesh": mesh,
        "shard_placement_fn": lambda parameter: _placement(parameter, num_shards),
        "mp_policy": MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=None if compute_dtype is None else torch.float32),
        "offload_policy": CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if on_host else OffloadPolicy(),
    }
    for layer in decoder_layers(model):
        fully_shard(layer, **keywords, reshard_after_forward=reshard_after_forward)
    inner: Any = causal_model(model)
    embeddings, head = inner.get_input_embeddings(), inner.get_output_embeddings()
    if head is not None and embeddings.weight is not head.weight:
        # Where they are tied they are gathered together, with the whole model's group.
        fully_shard(embeddings, **keywords, reshard_after_forward=reshard_after_forward)
        # The head's backward follows its forward at once.
        fully_shard(head, **keywords, reshard_after_forward=False)
    fully_shard(model, **keywords)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    # Before FSDP's own, which gathers.
    hook: Any = torch.compiler.disable(_forget_backward)
    model.register_forward_pre_hook(hook, prepend=True)


def parameter_groups(module: nn.Module) -> list[Any]:
    """FSDP's groups of the parameters that `module` gathers; none where it gathers none. They are not public."""
    state: Any = module._get_fsdp_state() if callable(getattr(module, "_get_fsdp_state", None)) else None  # type: ignore[operator]
    groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]  # in torch 2.13, and in 2.11
    return [group for group in groups if group is not None]


def _forget_backward(model: nn.Module, inputs: Any) -> None:
    """Forgets a backward that an error has ended, or a forward, so that a loop that goes on has right gradients.

    FSDP does at the end of a backward what every backward needs, once; it takes the one that did not end for under way, and adds what it
    holds of its gradients to the next one's. What it has summed already is `.grad`, which the loop gives up as it does without FSDP. And
    within a forward, as which it takes the next one then, it does not wait for who has written parameters.
    """
    state: Any = cast(Any, model)._get_fsdp_state()
    context = state._state_ctx
    # A backward may compute the whole model again, and a model of which this is a part may be in its forward.
    if torch._C._current_graph_task_id() != -1 or not state._is_root:
        return
    if context.post_backward_final_callback_queued:
        for module in model.modules():
            for group in parameter_groups(module):
                for parameter in group.fsdp_params:
                    parameter.unsharded_accumulated_grad = None
                    if hasattr(parameter, "_unsharded_param"):
                        parameter.unsharded_param.grad = None
        state._root_post_backward_final_callback()
    for each in context.all_states:
        each._training_state = type(each._training_state).IDLE
    context.iter_forward_root = None


def reshard(model: nn.Module) -> None:
    """Gives up every parameter that a forward left whole, in place; `model.parameters()` are then those that an optimizer steps."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _placement(parameter: nn.Parameter, num_shards: int) -> Shard | None:
    """By columns where a tensor axis has split the rows and what is left of them does not divide: rows of rows of unlike numbers are
    put together by no DTensor. None: by rows."""
    if not isinstance(parameter, DTensor) or Shard(0) not in parameter.placements:
        return None
    return None if parameter.to_local().shape[0] % num_shards == 0 else Shard(1)
