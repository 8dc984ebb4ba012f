"""Whole training steps of a Llama-shaped model: seconds, MFU and peak memory at a context, with each part of `parallelize` or without it.

    torchrun --nproc-per-node 2 benchmarks/training_step.py --context 131072 --json step.json
    torchrun --nproc-per-node 2 benchmarks/training_step.py --context 32768,65536 --without tiled_loss
    torchrun --nproc-per-node 4 benchmarks/training_step.py --context 131072 --tensor 2
    torchrun --nproc-per-node 2 benchmarks/training_step.py --context 16384 --plain

Weights and tokens are random: speed and memory do not depend on them. One JSON line a context; an out-of-memory is a result as well.
`host_gib_by_rank` is the most memory that each process had, pinned memory included.
`--plain` is transformers with sdpa, FSDP2 and gradient checkpointing, each rank a whole sequence of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import resource
import subprocess
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

import ringspan
from ringspan.bench.overlap import Awaited
from ringspan.transformer import LayerShape, Offload, decoder_layers, layer_shape
from ringspan.transport import Transport

PARTS = ("feed_forward", "tiled_loss", "rematerialise", "offload", "overlap")
SIZES: dict[str, dict[str, Any]] = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8},
    "tiny": {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
}


def model_flops(shape: LayerShape, tokens: int) -> float:
    """Of one step on one sequence: causal pairs counted once, the backward twice the forward, nothing for computing again."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    layer = 2 * shape.hidden * queries + 2 * shape.hidden * keys + 3 * shape.hidden * shape.intermediate
    products = 6.0 * tokens * (shape.layers * layer + shape.vocabulary * shape.hidden)
    # Two products of 2·q flops a pair, tokens²/2 pairs, three times that with the backward.
    return products + 3 * shape.layers * 2.0 * tokens * tokens * queries


def make_model(arguments: argparse.Namespace) -> LlamaForCausalLM:
    """Without memory, to be sharded before it has any."""
    vocabulary = 512 if arguments.model == "tiny" else 128256
    config = LlamaConfig(**SIZES[arguments.model], vocab_size=vocabulary, max_position_embeddings=max(8192, *arguments.context))
    if arguments.layers:
        config.num_hidden_layers = arguments.layers
    with torch.device("meta"):
        return LlamaForCausalLM(config).to(getattr(torch, arguments.masters))


def materialise(model: LlamaForCausalLM, device: torch.device, parameters_on_host: bool) -> None:
    """Gives every shard its memory and random values."""
    model.to_empty(device="cpu" if parameters_on_host else device)
    with torch.no_grad():
        for parameter in model.parameters():
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            local.normal_(0.0, 0.02) if parameter.ndim > 1 else local.fill_(1.0)
    for module in model.modules():
        if hasattr(module, "rotary_emb"):
            module.rotary_emb = type(module.rotary_emb)(model.config).to(device)


Work = Callable[[int], float]
"""A forward and backward over a context, which returns the loss."""


def ours(arguments: argparse.Namespace, device: torch.device, shape: LayerShape) -> tuple[nn.Module, Work]:
    """The model as `parallelize` prepares it."""
    without = set(arguments.without)
    mode = "none" if "rematerialise" in without else arguments.rematerialise
    offloads = "offload" not in without and mode in ("full", "attention_output") and arguments.offload
    host_bytes = None if arguments.host_gib is None else int(arguments.host_gib * 2**30)
    model = make_model(arguments)
    parallel = ringspan.parallelize(
        model,
        init_device_mesh(device.type, (dist.get_world_size() // arguments.tensor, arguments.tensor), mesh_dim_names=("context", "tensor")),
        strategy=arguments.strategy,
        kernel=arguments.kernel,
        kv_heads_per_stage=arguments.kv_heads_per_stage,
        feed_forward_chunk=None if "feed_forward" in without else arguments.feed_forward_chunk or "auto",
        loss_tile=None if "tiled_loss" in without else arguments.loss_tile or "auto",
        rematerialise=mode,
        offload=Offload(host_bytes=host_bytes) if offloads else None,
        layers_per_checkpoint=1 if mode == "none" else arguments.layers_per_checkpoint,
        compute_dtype=None if arguments.masters == "bfloat16" else torch.bfloat16,
        parameters_on_host=arguments.parameters_on_host,
    )
    materialise(model, device, arguments.parameters_on_host)
    if "overlap" in without:
        parallel.context.transport = cast(Transport, Awaited(parallel.context.transport))
    if dist.get_rank() == 0:
        print(parallel.chosen, flush=True)

    def work(context: int) -> float:
        ids = torch.randint(shape.vocabulary, (1, context), generator=torch.Generator().manual_seed(0)).to(device)
        loss = parallel.loss(parallel.shard_batch({"input_ids": ids, "labels": ids}))
        loss.backward()
        return float(loss.detach())

    return model, work


def plain(arguments: argparse.Namespace, device: torch.device, shape: LayerShape) -> tuple[nn.Module, Work]:
    """What one would do without this package."""
    model = make_model(arguments)
    model.set_attn_implementation("sdpa")
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    materialise(model, device, False)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()

    def work(context: int) -> float:
        ids = torch.randint(shape.vocabulary, (1, context), generator=torch.Generator().manual_seed(dist.get_rank())).to(device)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        return float(loss.detach())

    return model, work


KINDS = {
    "attention": ("flash", "fmha", "sdpa"), "matrix products": ("nvjet", "gemm", "cutlass", "xmma"), "messages": ("nccl",),
    "copies": ("Memcpy", "memcpy"), "fills": ("Memset", "FillFunctor"), "waits": ("wait_signal", "put_signal"),
}  # fmt: skip
"""What kernels belong to, by what their names hold; the rest is elementwise work. Waits for peers run beside the rest."""
FIRST = ("attention", "matrix products", "elementwise", "fills", "messages", "copies", "waits")
"""Where several run at an instant, it counts as the first of these."""


def once(spans: Sequence[tuple[str, float, float]]) -> dict[str, float]:
    """Of each kind the time in which it counts, each instant once; under `nothing` that between the first and the last in which none runs.

    Args:
        spans: (kind, start, end), in any order.
    """
    found: dict[str, float] = {}
    running: Counter[str] = Counter()
    ends = sorted([(start, kind, 1) for kind, start, _ in spans] + [(end, kind, -1) for kind, _, end in spans], key=lambda entry: entry[0])
    for (now, kind, more), (then, _, _) in pairwise(ends):
        running[kind] += more
        counts = next((kind for kind in FIRST if running[kind]), "nothing")
        found[counts] = found.get(counts, 0.0) + then - now
    return found


def profiled(work: Callable[[], object]) -> None:
    """Prints where the device's time goes, in milliseconds: each instant once, and what each kind and kernel runs, beside others too."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        work()
        torch.cuda.synchronize()
    kinds: dict[str, float] = {}
    kernels: dict[str, tuple[float, int]] = {}
    spans: list[tuple[str, float, float]] = []
    for event in recorded.events():
        if (took := event.device_time_total / 1e3) > 0:
            kind = next((kind for kind, words in KINDS.items() if any(word in event.name for word in words)), "elementwise")
            kinds[kind] = kinds.get(kind, 0.0) + took
            spans.append((kind, event.time_range.start / 1e3, event.time_range.end / 1e3))
            name = f"{kind:16} {event.name[:150]}"
            before, count = kernels.get(name, (0.0, 0))
            kernels[name] = (before + took, count + 1)
    if dist.get_rank() == 0:
        for kind, took in sorted(once(spans).items(), key=lambda entry: -entry[1]):
            print(f"{took:10.1f} ms  {kind}, of {kinds.get(kind, took):.1f} with what runs beside those before it")
        for name, (took, count) in sorted(kernels.items(), key=lambda entry: -entry[1][0])[:40]:
            print(f"{took:10.1f} ms {count:6} x  {name}")


class Progress:
    """Says, on rank 0, when the device has come through each layer's attention, forward or computed again: for steps of many minutes."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._device, self._began, self._count = device, time.perf_counter(), 0
        self._launched: queue.SimpleQueue[tuple[int, torch.cuda.Event | None]] = queue.SimpleQueue()
        for number, layer in enumerate(decoder_layers(model)):
            layer.self_attn.register_forward_hook(lambda *given, number=number: self._launch(number))
        threading.Thread(target=self._watch, daemon=True).start()

    def _launch(self, layer: int) -> None:
        event = torch.cuda.Event() if self._device.type == "cuda" else None
        if event is not None:
            event.record()
        self._launched.put((layer, event))

    def _watch(self) -> None:
        while True:
            layer, event = self._launched.get()
            while event is not None and not event.query():
                time.sleep(0.1)
            self._count += 1
            print(f"{time.perf_counter() - self._began:8.1f} s  {self._count:4}  attention of layer {layer}", flush=True)


Prepared = tuple[LayerShape, nn.Module, Work, torch.optim.Optimizer | None]


def prepare(arguments: argparse.Namespace, device: torch.device) -> Prepared:
    """The model, what it computes, and its optimizer."""
    shape = layer_shape(make_model(arguments))
    model, work = (plain if arguments.plain else ours)(arguments, device, shape)
    optimizer = None
    if arguments.optimizer != "none":
        # One pass over the states and not ten: in host memory that is the step's whole time.
        optimizer = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[arguments.optimizer](model.parameters(), lr=1e-5, fused=True)
    return shape, model, work, optimizer


def measure(arguments: argparse.Namespace, device: torch.device, prepared: Prepared, context: int) -> dict[str, Any]:
    """Times every step, the first ones included and marked as warm-up."""
    shape, model, work, optimizer = prepared
    on_gpu = device.type == "cuda"
    seconds, computing, losses, peak = [], [], [], 0
    for _ in range(arguments.warmup + arguments.steps):
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        dist.barrier()
        began = time.perf_counter()
        losses.append(work(context))
        computing.append(time.perf_counter() - began)
        if optimizer is not None:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        if on_gpu:
            torch.cuda.synchronize()
            peak = max(peak, torch.cuda.max_memory_allocated())
        seconds.append(time.perf_counter() - began)
    if arguments.profile:
        profiled(lambda: work(context))
    timed = sorted(seconds[arguments.warmup :])
    middle = timed[len(timed) // 2]
    ranks = dist.get_world_size()
    sequences = ranks if arguments.plain else 1
    flops = model_flops(shape, context) * sequences
    return {
        "seconds": seconds,
        "forward_and_backward_seconds": computing,
        "warmup": arguments.warmup,
        "losses": losses,
        "tokens_per_second": sequences * context / middle,
        "tflops_per_gpu": flops / middle / ranks / 1e12,
        "mfu": flops / middle / ranks / 1e12 / arguments.peak_tflops,
        "peak_gib": peak / 2**30,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30 if on_gpu else 0.0,
        "host_gib_by_rank": _on_every_rank(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20),
    }


def _on_every_rank(mine: float) -> list[float]:
    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, mine)
    return said


def _numbers(text: str) -> list[int]:
    return [int(each) for each in text.split(",")]


def main() -> None:
    """One run, one JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=SIZES, default="8b")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--context", type=_numbers, required=True, help="one, or several in turn")
    parser.add_argument("--tensor", type=int, default=1, help="ranks of the tensor axis; the others share the context")
    parser.add_argument("--strategy", default="ring")
    parser.add_argument("--kernel", default="auto")
    parser.add_argument("--kv-heads-per-stage", type=int)
    parser.add_argument("--feed-forward-chunk", type=int)
    parser.add_argument("--loss-tile", type=int)
    parser.add_argument("--rematerialise", default="attention_output")
    parser.add_argument("--offload", action="store_true")
    parser.add_argument("--host-gib", type=float, help="of host memory for checkpoints, a rank")
    parser.add_argument("--gpu-gib", type=float, help="of GPU memory that PyTorch may take, to stand for a smaller card")
    parser.add_argument("--layers-per-checkpoint", type=int, default=1)
    parser.add_argument("--parameters-on-host", action="store_true")
    parser.add_argument("--masters", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--optimizer", choices=("adamw", "sgd", "none"), default="adamw")
    parser.add_argument("--without", nargs="*", default=(), choices=PARTS, help="parts that are turned off")
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--progress", action="store_true", help="say when each layer is through")
    parser.add_argument("--profile", action="store_true", help="then profile one forward and backward")
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="of one GPU: 989 for H100 and H200 in bfloat16")
    parser.add_argument("--json", help="a file to which the line is added")
    arguments = parser.parse_args()
    # Steps with the reference kernel would not end.
    warnings.filterwarnings("error", message="Every fast kernel failed")
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
        if arguments.gpu_gib is not None:
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, arguments.gpu_gib * 2**30 / total))
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    gpu = torch.cuda.get_device_name() if on_gpu else "cpu"
    settings = {"commit": commit, "torch": torch.__version__, "gpu": gpu, "ranks": dist.get_world_size(), **vars(arguments)}
    prepared = None
    for context in arguments.context:
        line = {**settings, "context": context}
        try:
            if prepared is None:
                prepared = prepare(arguments, device)
                if arguments.progress and dist.get_rank() == 0:
                    Progress(prepared[1], device)
            line |= measure(arguments, device, prepared, context)
        except torch.OutOfMemoryError as error:
            # The other ranks wait for this one: it ends all of them.
            said = json.dumps({**line, "out_of_memory": str(error).splitlines()[0]})
            print(said, flush=True)
            if arguments.json:
                with Path(arguments.json).open("a") as file:
                    file.write(said + "\n")
            os._exit(3)
        if dist.get_rank() == 0:
            print(json.dumps(line), flush=True)
            if arguments.json:
                with Path(arguments.json).open("a") as file:
                    file.write(json.dumps(line) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
