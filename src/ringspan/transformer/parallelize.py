"""`parallelize`: an unmodified Hugging Face decoder, its context, parameters and batches spread over the ranks of a mesh."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ringspan.attention import ContextParallel
from ringspan.attention.checks import problem_of
from ringspan.attention.gradients import check_same_weights
from ringspan.errors import RingspanError
from ringspan.transformer.admission import check_model, guard_saving, is_sharded
from ringspan.transformer.axes import Group, Names, find_axes
from ringspan.transformer.blockwise import blockwise, check_position_wise, norms_of, take_back
from ringspan.transformer.chance import check_no_dropout
from ringspan.transformer.fused import fuse_rotation
from ringspan.transformer.head import loss_terms, prepare_loss
from ringspan.transformer.hook import ATTENTION_NAME, register
from ringspan.transformer.layers import attention_of, causal_model, decoder, decoder_layers, feed_forward_of
from ringspan.transformer.memory import (
    CPU_BYTES,
    auto_feed_forward_chunk,
    auto_loss_tile,
    auto_rematerialise,
    device_bytes,
    layer_shape,
)
from ringspan.transformer.offload import HostStore, Offload, make_store
from ringspan.transformer.parallel_model import Chosen, ParallelModel, Ranks
from ringspan.transformer.rematerialise import check_mode
from ringspan.transformer.rematerialise import rematerialise as make_rematerialised
from ringspan.transformer.rotary import prepare_rotary
from ringspan.transformer.tiled_loss import LossTerms
from ringspan.transport import Transport, agree, make_transport

_SHARDED_OR_CAST = "a DeviceMesh with a shard or context axis, of one rank if need be, and shard_parameters=True; or model.to(dtype)"
Auto = Literal["auto"]


def parallelize(
    model: nn.Module,
    mesh: Group = None,
    *,
    context: Names = "context",
    shard: Names = "shard",
    replicate: Names = "replicate",
    tensor: Names = "tensor",
    strategy: str = "ring",
    layout: str = "zigzag",
    kernel: str = "auto",
    weights: tuple[float, ...] | None = None,
    kv_heads_per_stage: int | None = None,
    transport: str = "auto",
    deterministic: bool = False,
    options: Mapping[str, int | str] | None = None,
    feed_forward_chunk: int | Auto | None = "auto",
    loss_tile: int | Auto | None = "auto",
    rematerialise: str = "attention_output",
    offload: Offload | None = None,
    layers_per_checkpoint: int = 1,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    shard_parameters: bool = True,
    compute_dtype: torch.dtype | None = None,
    parameters_on_host: bool = False,
    reshard_after_forward: bool = True,
    tokens_per_rank: int | None = None,
    memory_bytes: int | None = None,
    same_weights: bool = True,
) -> ParallelModel:
    """Makes a Hugging Face decoder long-context, in place: attention over all ranks, and nothing else that grows with the length.

    The loss and every gradient are those of the unsplit model, whatever the mix of context, replicas, shards, accumulation, padding and
    packed documents.

    Args:
        model: a causal language model of a family that transformers 5 and `ringspan.transformers.register` know; on the CPU, on its
            device, or on `meta` (then materialise it after this). Its weights are the same on every rank.
        mesh: a `DeviceMesh` with named axes; or, where all ranks share sequences and parameters stay whole, what `ContextParallel` takes.
        context: the axis (or axes, flattened) whose ranks share a sequence.
        shard: the axis whose ranks have different batches and share the parameters. Parameters are sharded over it and `context` together.
        replicate: the axis of whole copies of that.
        tensor: the axis whose ranks share the heads and feed-forward columns of each layer, and the tokens of a context shard elsewhere:
            see `ringspan.transformer.tensor_parallel`. Key heads, and columns, are divisible by it.
        strategy: see `ContextParallel`, as `layout`, `kernel`, `weights`, `kv_heads_per_stage`, `transport`, `deterministic`.
        layout: who owns which positions.
        kernel: of attention.
        weights: for layout `weighted`.
        kv_heads_per_stage: key heads computed at a time.
        transport: `auto`, `process_group` or `peer_memory`.
        deterministic: attention's gradients are the same bits at every run, or the kernel is refused.
        options: the strategy's own.
        feed_forward_chunk: tokens that a feed-forward part, or a norm, computes at a time; `auto`: what works in 1/32 of the device's
            memory; None: all, as the model does.
        loss_tile: tokens whose logits exist at a time; `auto`: what works in 1/16 of it; None: the model's own logits.
        rematerialise: one of `ringspan.transformer.MODES`, or `auto`: see `auto_rematerialise`; it needs `tokens_per_rank`.
        offload: layer checkpoints in host memory.
        layers_per_checkpoint: how many layers share one checkpoint: that many times fewer bytes for all but attention computed once more.
        label_smoothing: of the loss.
        z_loss: weight of the squared log of the logits' normaliser.
        shard_parameters: whether FSDP2 shards parameters, gradients and optimizer; otherwise they are whole on every rank.
        compute_dtype: what parameters are cast to for computing, e.g. `torch.bfloat16` over float32 masters; gradients are then reduced in
            float32. None: as they are.
        parameters_on_host: whether sharded parameters, gradients and optimizer live in host memory; their step is the CPU's.
        reshard_after_forward: whether a layer's parameters are given up between its forward and its backward.
        tokens_per_rank: batch × positions of this rank's context shard, for `rematerialise="auto"`.
        memory_bytes: what `auto` chooses for; the device's whole memory if not given. Of all ranks' the smallest counts.
        same_weights: whether a few elements of each parameter are compared over the ranks; not where weights are loaded after this.

    Raises:
        RingspanError: on every rank, where an argument is wrong, the ranks disagree or have other weights, or the model is none that can be
            prepared: see `ringspan.transformer.admission`.
    """
    axes = find_axes(mesh, context=context, shard=shard, replicate=replicate, tensor=tensor, shard_parameters=shard_parameters)
    everyone, sharing = make_transport(axes.everyone), make_transport(axes.sharing)
    device = _device(mesh, model)
    num_shards = 1 if axes.sharding is None else axes.sharding.shape[-1]
    automatic = "auto" in (feed_forward_chunk, loss_tile, rematerialise)
    memory = _smallest_memory(everyone, device if automatic else None, memory_bytes)
    prepared: list[tuple[Chosen, LossTerms]] = []

    def prepare() -> None:
        register()
        check_model(model, sharing.size)
        check_no_dropout(model)
        if not _is_memory(memory_bytes):
            raise RingspanError(f"memory_bytes={memory_bytes!r}", "", "It is a number of bytes", "memory_bytes=80 << 30, or None")
        check_mode(
            "full" if rematerialise == "auto" else rematerialise,
            strategy=strategy,
            offloads=offload is not None,
            layers_per_checkpoint=layers_per_checkpoint,
        )
        if (parameters_on_host or compute_dtype is not None) and axes.sharding is None:
            asked = "parameters_on_host=True" if parameters_on_host else f"compute_dtype={compute_dtype}"
            rule = "It is FSDP that keeps parameters elsewhere, or in another dtype, than they are computed with"
            raise RingspanError(asked, "the parameters are not sharded", rule, _SHARDED_OR_CAST)
        chosen = _choose(
            model,
            feed_forward_chunk=feed_forward_chunk,
            loss_tile=loss_tile,
            mode=rematerialise,
            offload=offload,
            tokens=tokens_per_rank,
            memory_bytes=memory,
            num_shards=num_shards,
            num_pieces=1 if axes.tensor is None else axes.tensor.size(),
            compute_dtype=compute_dtype,
            state_on_host=parameters_on_host,
        )
        terms = loss_terms(model, tiled=chosen.loss_tile is not None, label_smoothing=label_smoothing, z_loss=z_loss)
        if chosen.feed_forward_chunk is not None:
            for layer in decoder_layers(model):
                check_position_wise(feed_forward_of(layer))
        if axes.tensor is not None:
            # Late: whoever splits nothing need not load DTensor.
            from ringspan.transformer.tensor_parallel import check_splits

            check_splits(model, axes.tensor.size(), num_shards)
        prepared.append((chosen, terms))

    problem = problem_of(prepare)
    # What was chosen, and not what was asked for: modes that differ rotate other numbers of messages, and would wait for ever.
    sharding = f"shard_parameters={axes.sharding is not None}, compute_dtype={compute_dtype}, "
    sharding += f"parameters_on_host={parameters_on_host}, reshard_after_forward={reshard_after_forward}, same_weights={same_weights}"
    settled = "" if problem is not None else f"{_settled(model, *prepared[0], layers_per_checkpoint)}, {sharding}"
    agree(everyone, "parallelize", settled, problem)
    if same_weights:
        check_same_weights(model.parameters(), everyone, f"parallelize on {everyone.size} ranks")
    chosen, terms = prepared[0]
    more: dict[str, Any] = dict(options or {})
    cp = ContextParallel(
        axes.context,
        strategy=strategy,
        layout=layout,
        kernel=kernel,
        weights=weights,
        kv_heads_per_stage=kv_heads_per_stage,
        transport=transport,
        deterministic=deterministic,
        **more,
    )
    store = None if chosen.offload is None else make_store(device, chosen.offload)
    # First, so that what a tensor axis puts around a layer's attention stays around it.
    for layer in decoder_layers(model):
        if (attention := attention_of(layer)) is not None:
            fuse_rotation(attention)
    pieces = None
    if axes.tensor is not None:
        from ringspan.transformer.tensor_parallel import split_model

        pieces = split_model(model, axes.tensor, device)
    # Where `auto` finds room for everything there is no checkpoint to share.
    shared = 1 if chosen.rematerialise == "none" else layers_per_checkpoint
    _prepare_model(model, chosen, store, layers_per_checkpoint=shared, num_pieces=1 if pieces is None else pieces.size)
    if axes.sharding is not None:
        # Late: whoever shards nothing need not load FSDP.
        from ringspan.transformer.fsdp import shard_parameters as shard_with_fsdp

        shard_with_fsdp(
            model,
            axes.sharding,
            compute_dtype=compute_dtype,
            on_host=parameters_on_host,
            reshard_after_forward=reshard_after_forward,
        )
    if is_sharded(model):
        guard_saving(model)
    return ParallelModel(
        model,
        cp,
        Ranks(everyone=everyone, sharing=sharing, copies=make_transport(axes.copies), pieces=pieces),
        chosen,
        terms,
        store=store,
        num_replicas=axes.num_replicas,
        is_sharded=axes.sharding is not None,
    )


def _prepare_model(model: nn.Module, chosen: Chosen, store: HostStore | None, *, layers_per_checkpoint: int, num_pieces: int) -> None:
    inner: Any = causal_model(model)
    inner.set_attn_implementation(ATTENTION_NAME)
    layers = decoder_layers(model)
    # What an earlier call has made.
    take_back(model)
    if chosen.feed_forward_chunk is not None:
        for layer in layers:
            # The pieces of all ranks of a tensor axis are computed at once.
            blockwise(feed_forward_of(layer), max(1, chosen.feed_forward_chunk // num_pieces))
            for norm in norms_of(layer):
                blockwise(norm, chosen.feed_forward_chunk)
        for norm in norms_of(decoder(model)):
            blockwise(norm, chosen.feed_forward_chunk)
    attention_outputs = chosen.offload is not None and chosen.offload.attention_outputs
    make_rematerialised(
        layers, chosen.rematerialise, store, attention_outputs=attention_outputs, layers_per_checkpoint=layers_per_checkpoint
    )
    prepare_loss(model)
    prepare_rotary(model)


def _is_memory(memory_bytes: float | None) -> bool:
    """Whether this is an answer to how much memory there is, or None."""
    return memory_bytes is None or (type(memory_bytes) in (int, float) and memory_bytes > 0)


def _smallest_memory(everyone: Transport, device: torch.device | None, memory_bytes: int | None) -> int:
    """Of all ranks that choose by it, so that all choose alike; a `device` of None says that this one does not. Collective."""
    mine = memory_bytes
    if memory_bytes is None and device is not None:
        mine = device_bytes(device)
    return min((each for each in everyone.gather_objects(mine) if each is not None and _is_memory(each)), default=CPU_BYTES)


def _settled(model: nn.Module, chosen: Chosen, terms: LossTerms, layers_per_checkpoint: int) -> str:
    """What all ranks have to have settled alike."""
    count = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    dtypes = " and ".join(sorted({str(parameter.dtype) for parameter in model.parameters()}))
    tokens = f"feed_forward_chunk={chosen.feed_forward_chunk}, loss_tile={chosen.loss_tile}"
    held = f"{count} parameters in {dtypes}, {trained} of them trained"
    return f"{held}, rematerialise={chosen.rematerialise!r}, {tokens}, layers_per_checkpoint={layers_per_checkpoint}, {terms}"


def _choose(
    model: nn.Module,
    *,
    feed_forward_chunk: int | Auto | None,
    loss_tile: int | Auto | None,
    mode: str,
    offload: Offload | None,
    tokens: int | None,
    memory_bytes: int,
    num_shards: int,
    num_pieces: int,
    compute_dtype: torch.dtype | None,
    state_on_host: bool,
) -> Chosen:
    for name, value in (("feed_forward_chunk", feed_forward_chunk), ("loss_tile", loss_tile)):
        if not (value is None or value == "auto" or (type(value) is int and value >= 1)):
            rule = f"{name} is a whole number of at least one token, 'auto' or None"
            raise RingspanError(f"{name}={value!r}", "", rule, f"{name}=2048")
    if offload is not None:
        offload.check()
    automatic = "auto" in (feed_forward_chunk, loss_tile, mode)
    reason = "as asked"
    if automatic:
        sample = next(model.parameters())
        shape = replace(layer_shape(model, (compute_dtype or sample.dtype).itemsize), num_pieces=num_pieces)
        feed_forward_chunk = auto_feed_forward_chunk(shape, memory_bytes) if feed_forward_chunk == "auto" else feed_forward_chunk
        loss_tile = auto_loss_tile(shape, memory_bytes) if loss_tile == "auto" else loss_tile
        if mode == "auto":
            if type(tokens) is not int or tokens < 1:
                rule = "Memory is a matter of how many tokens a rank computes at once"
                raise RingspanError("rematerialise='auto'", f"tokens_per_rank={tokens!r}", rule, "tokens_per_rank=batch * length // ranks")
            parameters = sum(parameter.numel() for parameter in model.parameters())
            state = 0 if state_on_host else 16 * parameters // (num_shards * num_pieces)
            host = 0 if offload is None else offload.host_bytes
            found = auto_rematerialise(shape, tokens=tokens, state_bytes=state, memory_bytes=memory_bytes, host_bytes=host)
            mode, reason = found.mode, found.reason
            offload = None if mode == "none" else offload
    assert feed_forward_chunk != "auto" and loss_tile != "auto"
    return Chosen(feed_forward_chunk=feed_forward_chunk, loss_tile=loss_tile, rematerialise=mode, reason=reason, offload=offload)


def _device(mesh: Group, model: nn.Module) -> torch.device:
    """Where the model will compute."""
    kind = mesh.device_type if isinstance(mesh, DeviceMesh) else next(model.parameters()).device.type
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)
