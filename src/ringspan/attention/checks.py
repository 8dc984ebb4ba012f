"""What is checked before anything is sent, each check with an error that teaches."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ringspan.errors import RingspanError, UnsupportedError, nearest_name
from ringspan.geometry import Mask, full, has_window, make_layout
from ringspan.kernels import Kernel, Problem, check_kernel_name, is_captured, select_kernel
from ringspan.strategies import make_schedules
from ringspan.transport import InProcessTransport, Transport

TRANSPORTS = ("auto", "process_group", "peer_memory")
"""How pieces travel: see `ContextParallel`."""

SCORE_NUMBERS = "A scale is a finite number, and a softcap one above 0"


def peer_memory_reason(materialised: bool, kv_heads_per_stage: int | None) -> str | None:
    """Why such attention does not go through peer memory, or None."""
    if materialised:
        return "ring_self_attention keeps scores and sends keys and values apart"
    if kv_heads_per_stage is not None:
        return "with kv_heads_per_stage what travels changes its size from stage to stage"
    return None


def problem_of(check: Callable[[], None]) -> RingspanError | None:
    """The error that `check` raises, to be shared with the other ranks before it is raised.

    One that no check foresaw, such as a TypeError, is shared too: a rank that raises alone leaves the others waiting.
    """
    try:
        check()
    except RingspanError as error:
        return error
    except Exception as error:
        problem = RingspanError("these arguments", f"{type(error).__name__}: {error}", "Arguments are of the types that are documented")
        problem.__cause__ = error
        return problem
    return None


def check_names(
    strategy: str,
    layout: str,
    kernel: str,
    weights: tuple[float, ...] | None,
    num_ranks: int,
    kv_heads_per_stage: int | None,
    transport: str,
    options: Mapping[str, int | str],
    deterministic: bool = False,
    cuda_graphs: bool = False,
) -> None:
    """Names, weights and options of `ContextParallel`."""
    if transport not in TRANSPORTS:
        raise RingspanError(
            f"transport {transport!r}",
            f"there are {', '.join(TRANSPORTS)}",
            "A transport is asked for by name",
            repr(nearest_name(transport, TRANSPORTS)),
        )
    if not isinstance(deterministic, bool):
        raise RingspanError(
            f"deterministic={deterministic!r}", "", "Gradients are promised to be the same bits, or not", "deterministic=True"
        )
    if not isinstance(cuda_graphs, bool):
        raise RingspanError(f"cuda_graphs={cuda_graphs!r}", "", "Passes are captured and replayed, or not", "cuda_graphs=True")
    if weights is not None and not (isinstance(weights, (tuple, list)) and all(isinstance(weight, (int, float)) for weight in weights)):
        raise RingspanError(f"weights={weights!r}", "", "There is one finite weight ≥ 0 for each rank", f"weights={(1.0,) * num_ranks}")
    whole = make_layout(layout, num_ranks, num_ranks, weights, full())
    if strategy != "auto" or options:
        make_schedules(strategy, whole, full(), **options)
    if kv_heads_per_stage is not None and (type(kv_heads_per_stage) is not int or kv_heads_per_stage < 1):
        raise RingspanError(
            f"kv_heads_per_stage={kv_heads_per_stage!r}", "", "A stage is a whole number of at least one key head", "kv_heads_per_stage=1"
        )
    check_kernel_name(kernel)
    make_layout(layout, num_ranks, num_ranks, weights)


def check_sequence(length: int, mask: Mask) -> None:
    """Length and mask of a sequence."""
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise RingspanError(f"a sequence of length {length!r}", "", "A length is a whole number of at least 1 token", "length=1024")
    if not isinstance(mask, Mask):
        raise RingspanError(f"mask {mask!r}", f"it is of type {type(mask).__name__}", "A mask is a ringspan mask", "ringspan.causal()")
    mask.check_length(length)


def check_dim(x: Tensor, dim: int, length: int, of: str) -> None:
    """That `x` is `length` long along `dim`."""
    if not isinstance(x, Tensor):
        raise RingspanError(f"{of} of type {type(x).__name__}", "", "What is split is a tensor", "torch.as_tensor(x)")
    if not _has_dim(x, dim) or x.shape[dim] != length:
        raise RingspanError(
            f"a tensor {tuple(x.shape)} with the sequence along dim {dim!r}",
            f"{of} has {length} positions",
            "The tensor is that long along dim",
            f"the dim that counts positions, usually 1, of {length}; or cp.sequence of the tensor's own length",
        )


def _has_dim(x: Tensor, dim: int) -> bool:
    return isinstance(dim, int) and -x.ndim <= dim < x.ndim


def features(mask: Mask, softcap: float | None, scale: float | None = None) -> frozenset[str]:
    """What a kernel must know to compute these scores: see `ringspan.kernels.Problem`."""
    wanted = {"softcap": softcap is not None, "mask_mod": mask.mod is not None, "window": has_window(mask)}
    wanted["scale ≤ 0"] = scale is not None and scale <= 0
    return frozenset(name for name, needed in wanted.items() if needed)


def kernel_problem(q: Tensor, k: Tensor, wanted: frozenset[str], deterministic: bool = False) -> Problem:
    """The problem that a kernel is chosen for."""
    return Problem(
        device=q.device.type, dtype=q.dtype, heads=q.shape[2], kv_heads=k.shape[2], head_dim=q.shape[3], features=wanted,
        deterministic=deterministic,
    )  # fmt: skip


def check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    scale: float | None,
    softcap: float | None,
    shard_length: int,
    rank: int,
    kernel: str,
    wanted: frozenset[str],
    deterministic: bool = False,
) -> None:
    """Shapes, dtypes and devices of q, k, v and sinks, and that the kernel computes them."""
    asked = f"attention of q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or (q.shape[0], q.shape[1], q.shape[3]) != (k.shape[0], k.shape[1], k.shape[3]):
        raise RingspanError(
            asked,
            "the shapes do not belong together",
            "q is [batch, shard, heads, head_dim], k and v are [batch, shard, kv_heads, head_dim]",
            "x.transpose(1, 2) for tensors that are [batch, heads, shard, head_dim]",
        )
    if q.shape[1] != shard_length:
        raise RingspanError(
            asked,
            f"rank {rank} owns {shard_length} positions",
            "q, k and v hold this rank's shard",
            "seq.shard(x, dim=1) of the whole tensor",
        )
    if not k.shape[2] or q.shape[2] % k.shape[2] or not q.shape[3]:
        raise RingspanError(
            asked,
            f"{q.shape[2]} query heads, {k.shape[2]} KV heads of {q.shape[3]}",
            "KV heads divide query heads",
            "as many KV heads as query heads",
        )
    if len({q.dtype, k.dtype, v.dtype}) > 1 or not q.is_floating_point():
        raise RingspanError(
            asked,
            f"dtypes {q.dtype}, {k.dtype}, {v.dtype}",
            "q, k and v are of one floating-point dtype",
            f"k.to({q.dtype}), v.to({q.dtype})",
        )
    if len({q.device, k.device, v.device}) > 1:
        found = f"devices {q.device}, {k.device}, {v.device}"
        raise RingspanError(asked, found, "q, k and v lie on one device", f"k.to('{q.device}'), v.to('{q.device}')")
    if sinks is not None and (sinks.shape != q.shape[2:3] or sinks.device != q.device or not sinks.is_floating_point()):
        found = f"{tuple(sinks.shape)} of {sinks.dtype} on {sinks.device}"
        raise RingspanError(f"{asked} with sinks", found, "Sinks are one score a query head", f"sinks of shape ({q.shape[2]},)")
    for name, value in (("scale", scale), ("softcap", softcap)):
        if value is not None and not (isinstance(value, (int, float)) and math.isfinite(value) and (name == "scale" or value > 0)):
            raise RingspanError(f"{asked} with {name}={value!r}", "", SCORE_NUMBERS, f"{name}=None")
    select_kernel(kernel, kernel_problem(q, k, wanted, deterministic))


def replay_refusal(device: str, kernel: Kernel, everyone: Transport, ranks: int, through_peers: bool) -> UnsupportedError | None:
    """Why passes of `ranks` ranks among `everyone` cannot be captured as CUDA graphs, or None. The same on every rank.

    A communicator of NCCL whose calls a graph holds is not destroyed before the graph is: `destroy_process_group()` would wait for ever
    (pytorch/pytorch#115388). So only what goes through peer memory, or nowhere, is captured.
    """
    if device != "cuda":
        found = f"the tensors are on {device}"
    elif isinstance(everyone, InProcessTransport) and everyone.size > 1:
        found = "in-process ranks are threads, which wait for each other on the host"
    elif not kernel.can.graph_capture:
        found = f"kernel {kernel.name!r} cannot be captured"
    elif not through_peers and ranks > 1:
        found = "these passes go through NCCL, and destroy_process_group() would wait for ever for a graph that holds its calls"
    else:
        return None
    return UnsupportedError("cuda_graphs=True", found, "What a graph replays is launched by no host", "cuda_graphs=False")


def check_loss(logits: Tensor, labels: Tensor, shard_length: int, rank: int) -> None:
    """Shapes and dtypes of `Sequence.loss`."""
    if logits.ndim != 3 or logits.shape[:-1] != labels.shape or labels.shape[1] != shard_length:
        raise RingspanError(
            f"a loss of logits {tuple(logits.shape)} with labels {tuple(labels.shape)}",
            f"rank {rank} owns {shard_length} positions",
            "logits are [batch, shard, vocabulary] and labels [batch, shard]",
            "the labels of seq.shard_batch(batch)",
        )
    if not logits.is_floating_point() or labels.dtype != torch.int64 or labels.device != logits.device:
        raise RingspanError(
            f"a loss of logits in {logits.dtype} on {logits.device} with labels in {labels.dtype} on {labels.device}",
            "",
            "Logits are floating-point numbers, and labels int64 on their device",
            f"labels.long().to('{logits.device}')",
        )


def loss_type_problem(logits: object, labels: object, ignore_index: object) -> RingspanError | None:
    """The error where an argument of `Sequence.loss` is of another type than documented, as `type_problem` of attention's."""
    if isinstance(logits, Tensor) and isinstance(labels, Tensor) and type(ignore_index) is int:
        return None
    found = f"logits {type(logits).__name__}, labels {type(labels).__name__}, ignore_index {type(ignore_index).__name__}"
    return RingspanError(
        f"a loss of {found}", "", "Logits and labels are tensors, and ignore_index a whole number", "seq.loss(out.logits, labels)"
    )


def check_decode(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> None:
    """Shapes and dtypes of `ContextParallel.decode`, whose keys are as many as a rank has, and that no gradient is asked for."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise UnsupportedError(
            "decode with a gradient", "a tensor requires grad", "Decoding has no backward", "torch.no_grad(), or seq.attention to train"
        )
    queries = q[:, :1].expand(-1, k.shape[1], -1, -1) if q.ndim == k.ndim == 4 else q
    check_attention(queries, k, v, None, scale, None, k.shape[1] if k.ndim == 4 else 0, 0, "auto", features(full(), None, scale))


def type_problem(
    q: object, k: object, v: object, sinks: object, scale: object, softcap: object, return_lse: object = False
) -> RingspanError | None:
    """The error where an argument of attention is of another type than documented; then there is nothing to look a plan up by."""
    for name, tensor in (("q", q), ("k", k), ("v", v), ("sinks", sinks)):
        if tensor is None and name == "sinks":
            continue
        if not isinstance(tensor, Tensor):
            return RingspanError(
                f"attention with {name} of type {type(tensor).__name__}", "", "q, k, v and sinks are tensors", f"torch.as_tensor({name})"
            )
        if tensor.layout != torch.strided or tensor.is_nested:
            kind = "nested" if tensor.is_nested else str(tensor.layout)
            return RingspanError(f"attention with {name} that is {kind}", "", "q, k, v and sinks are dense tensors", f"a dense {name}")
    for name, value in (("scale", scale), ("softcap", softcap)):
        if value is not None and not isinstance(value, (int, float)):
            found = f"it is of type {type(value).__name__}"
            return RingspanError(f"attention with {name} {value!r}", found, SCORE_NUMBERS, f"{name}=None")
    if not isinstance(return_lse, bool):
        return RingspanError(f"attention with return_lse={return_lse!r}", "", "The log-sum-exp is returned, or not", "return_lse=True")
    return None


def check_mask_mod(mask: Mask, length: int, batch: int, heads: int, device: torch.device) -> None:
    """That a user's function, where `mask` has one, says of index tensors which pairs are allowed.

    Tried on the first two positions and the last two, for every head of every batch entry: a table that is too short is found.
    """
    if mask.mod is None:
        return
    positions = torch.tensor(sorted({*range(min(2, length)), *range(max(0, length - 2), length)}), device=device)
    b, h = torch.arange(batch, device=device).view(-1, 1, 1, 1), torch.arange(heads, device=device).view(1, -1, 1, 1)
    tried = batch, heads, len(positions), len(positions)
    try:
        said = mask.mod(b, h, positions.view(1, 1, -1, 1), positions.view(1, 1, 1, -1))
    except Exception as error:
        raise _mask_mod_error(mask, f"it raises {type(error).__name__}: {error}") from error
    if not isinstance(said, Tensor) or said.dtype != torch.bool:
        raise _mask_mod_error(mask, f"it returns {said.dtype if isinstance(said, Tensor) else type(said).__name__}")
    if not 1 <= said.ndim <= 4 or any(size not in (1, most) for size, most in zip(said.shape[::-1], tried[::-1], strict=False)):
        raise _mask_mod_error(mask, f"of {tried} pairs [batch, heads, queries, keys] it returns {tuple(said.shape)}")
    if said.device != device:
        raise _mask_mod_error(mask, f"of indices on {device} it returns a tensor on {said.device}")


def _mask_mod_error(mask: Mask, found: str) -> RingspanError:
    return RingspanError(
        f"mask {mask}",
        found,
        "A mask_mod takes (b, h, q_idx, kv_idx), index tensors that broadcast, and returns a boolean tensor that does",
        "mask_mod(lambda b, h, q_idx, kv_idx: q_idx >= kv_idx)",
    )


def check_device(device: str, devices: frozenset[str], num_ranks: int) -> None:
    """That the group carries tensors of this device."""
    if num_ranks > 1 and device not in devices:
        raise RingspanError(
            f"tensors on {device} over {num_ranks} ranks",
            f"the process group carries {' and '.join(sorted(devices)) or 'no tensors point to point'}",
            "A group moves tensors of the devices that its backend serves: gloo the CPU's, NCCL a GPU's",
            f"torch.distributed.init_process_group('{'nccl' if device == 'cuda' else 'gloo'}')",
        )


def describe_attention(
    q: Tensor, k: Tensor, sinks: Tensor | None, scale: float | None, softcap: float | None, return_lse: bool = False,
    differentiable: bool = False,
) -> str:  # fmt: skip
    """What all ranks must have in common."""
    if q.ndim != 4 or k.ndim != 4:
        return "malformed tensors"
    heads = f"batch={q.shape[0]} heads={q.shape[2]} kv_heads={k.shape[2]} head_dim={q.shape[3]}"
    about = f"scale={scale} softcap={softcap} sinks={sinks is not None} return_lse={return_lse} gradients={differentiable}"
    return f"{heads} {q.dtype} on {q.device.type} {about}"


def describe_loss(logits: Tensor, ignore_index: int) -> str:
    """What all ranks must have in common."""
    sizes = f"batch={logits.shape[0]} vocabulary={logits.shape[-1]}" if logits.ndim else "malformed logits"
    return f"{sizes} {logits.dtype} ignore_index={ignore_index}"


def check_not_captured(what: str, asked: str, device: torch.device, num_ranks: int) -> None:
    """That no CUDA graph is captured at a call of `what` that is new, as `asked` describes it. One rank has nobody to agree with."""
    if num_ranks > 1 and is_captured(device):
        raise RingspanError(
            f"{what} captured in a CUDA graph",
            f"there was no such call before: {asked}",
            "A first call agrees with the other ranks, compiles and makes room, none of which a capture allows",
            "the same call a few times before the capture, on every rank; without gradients where the captured one wants none",
        )


def describe_shard(x: Tensor, dim: int) -> str:
    """What all ranks' shards must have in common."""
    if not isinstance(x, Tensor):
        return f"{type(x).__name__}"
    if not _has_dim(x, dim):
        return f"shape {tuple(x.shape)} dim {dim!r}"
    others = [size for index, size in enumerate(x.shape) if index != dim % x.ndim]
    # Who asks for a gradient waits for the others' in the backward.
    wanted = torch.is_grad_enabled() and x.requires_grad
    return f"dim={dim % x.ndim} other sizes={others} {x.dtype} on {x.device.type} gradient={wanted}"
