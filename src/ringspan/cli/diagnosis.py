"""What this machine has and can do, as data: versions, GPUs and links, kernels with their speed, transports."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.cuda.nccl import version as nccl_version

from ringspan.geometry import Tile
from ringspan.kernels import KERNELS, SPEEDS, Kernel, Problem, Speeds, time_kernel
from ringspan.kernels.speed import Timer, shape_class


@dataclass(frozen=True)
class KernelFound:
    """One kernel on this machine.

    Args:
        name: what the user calls it.
        usable: whether it computes the problem here.
        reason: why not, where it does not; also what it said where it broke when it was timed.
        seconds: of a forward and a backward.
        teraflops_per_second: the same as arithmetic: 14 · pairs · heads · head_dim floating-point operations.
        determinism: `always`, `on request` or `never`, of the backward's bits.
    """

    name: str
    usable: bool
    reason: str | None
    seconds: float | None
    teraflops_per_second: float | None
    determinism: str


@dataclass(frozen=True)
class Way:
    """A way for shards to move, and why it is not there, where it is not."""

    name: str
    usable: bool
    reason: str | None


@dataclass(frozen=True)
class Link:
    """Whether one GPU reads another's memory."""

    source: int
    target: int
    peer_access: bool


@dataclass(frozen=True)
class Diagnosis:
    """Everything that `ringspan doctor` prints."""

    versions: Mapping[str, str | None]
    device: str
    device_name: str
    gpus: tuple[str, ...]
    links: tuple[Link, ...]
    symmetric_memory: Way
    problem: str
    tokens: int
    kernels: tuple[KernelFound, ...]
    auto: str
    auto_reason: str
    transports: tuple[Way, ...]


def diagnose(problem: Problem, length: int, timer: Timer = time_kernel, kernels: Mapping[str, Kernel] = KERNELS) -> Diagnosis:
    """Looks at this machine, and times every kernel that computes `problem` on shards of `length` tokens."""
    tokens = shape_class(problem, length).tokens
    found = tuple(_kernel(name, kernel, problem, tokens, timer) for name, kernel in kernels.items())
    timed = {each.name: each for each in found}

    def known(kernel: Kernel, problem: Problem, tokens: int) -> float:
        seconds = timed[kernel.name].seconds
        if seconds is None:
            raise RuntimeError(timed[kernel.name].reason)
        return seconds

    speeds = Speeds(kernels, known, SPEEDS.devices)
    comparison = speeds.compare(problem, length, speeds.capable(problem))
    return Diagnosis(
        versions=_versions(),
        device=problem.device,
        device_name=torch.cuda.get_device_name()
        if problem.device == "cuda"
        else f"{platform.machine()}, {torch.get_num_threads()} threads",
        gpus=tuple(_gpu(index) for index in range(_num_gpus())),
        links=_links(),
        symmetric_memory=_symmetric_memory(),
        problem=_described(problem),
        tokens=tokens,
        kernels=found,
        auto=comparison.taken,
        auto_reason=comparison.reason,
        transports=_transports(),
    )


def _kernel(name: str, kernel: Kernel, problem: Problem, tokens: int, timer: Timer) -> KernelFound:
    determinism = kernel.can.determinism
    if (reason := kernel.refusal(problem)) is not None:
        return KernelFound(name, False, reason, None, None, determinism)
    try:
        seconds = timer(kernel, problem, tokens)
    except Exception as error:
        return KernelFound(name, False, f"{type(error).__name__}: {error}".splitlines()[0], None, None, determinism)
    window = tokens // 4 if "window" in problem.features else None
    # Two products of each pair forward, five backward, each a multiplication and an addition.
    operations = 14 * Tile(0, tokens, 0, tokens, 0, window).pairs * problem.heads * problem.head_dim
    return KernelFound(name, True, None, seconds, operations / seconds / 1e12, determinism)


def _described(problem: Problem) -> str:
    dtype = str(problem.dtype).removeprefix("torch.")
    features = "".join(f", {feature}" for feature in sorted(problem.features))
    promise = ", the same bits at every run" if problem.deterministic else ""
    return f"{problem.heads} query and {problem.kv_heads} KV heads of {problem.head_dim}, {dtype}, causal{features}{promise}"


def _versions() -> dict[str, str | None]:
    has_cuda = torch.cuda.is_available()
    cudnn = torch.backends.cudnn.version() if has_cuda else None
    nccl = nccl_version() if has_cuda and dist.is_available() and dist.is_nccl_available() else None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": None if cudnn is None else str(cudnn),
        "nccl": None if nccl is None else ".".join(map(str, nccl)),
    }


def _num_gpus() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _gpu(index: int) -> str:
    about = torch.cuda.get_device_properties(index)
    capability = f"compute capability {about.major}.{about.minor}"
    return f"{about.name}, {about.total_memory / 2**30:.0f} GiB, {about.multi_processor_count} multiprocessors, {capability}"


def _links() -> tuple[Link, ...]:
    gpus = range(_num_gpus())
    return tuple(Link(a, b, torch.cuda.can_device_access_peer(a, b)) for a in gpus for b in gpus if a != b)


def _symmetric_memory() -> Way:
    """PyTorch's: one allocation on every GPU, each of which reads the others'."""
    name = "symmetric memory"
    if not torch.cuda.is_available():
        return Way(name, False, "there is no CUDA device here")
    if _num_gpus() < 2:
        return Way(name, False, "there is one GPU, and nothing to share with")
    if importlib.util.find_spec("torch.distributed._symmetric_memory") is None:
        return Way(name, False, "this torch has none")
    apart = [f"GPU {link.source} does not reach the memory of GPU {link.target}" for link in _links() if not link.peer_access]
    return Way(name, not apart, apart[0] if apart else None)


def _transports() -> tuple[Way, ...]:
    there = dist.is_available()
    no_gloo = None if there and dist.is_gloo_available() else "this torch was built without gloo"
    no_nccl = None if there and dist.is_nccl_available() else "this torch was built without NCCL"
    if no_nccl is None and not torch.cuda.is_available():
        no_nccl = "there is no CUDA device here"
    # Symmetric memory of the ranks of a group over NCCL, who may still find a reason against it when they meet.
    no_peers = _symmetric_memory().reason or no_nccl
    return (
        Way("in-process (threads)", True, None),
        Way("process group over gloo (CPU tensors)", no_gloo is None, no_gloo),
        Way("process group over NCCL (GPU tensors)", no_nccl is None, no_nccl),
        Way("peer_memory (GPU tensors, within this host)", no_peers is None, no_peers),
    )
