"""How fast each rank computes attention while all of them do: the weights of layout `weighted`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ringspan.attention import checks
from ringspan.errors import RingspanError
from ringspan.kernels import Problem, check_kernel_name, kernel_pass, select_kernel
from ringspan.transport import InProcessTransport, Transport, agree, make_transport

PROBLEMS = {
    "cuda": (Problem(device="cuda", dtype=torch.bfloat16, heads=32, kv_heads=8, head_dim=128), 8192),
    "cpu": (Problem(device="cpu", dtype=torch.float32, heads=4, kv_heads=2, head_dim=64), 512),
}
"""What is computed again and again, and over how many tokens: some milliseconds a pass."""
AT_A_TIME = 4
LONGEST_SECONDS = 600.0


def measure_weights(
    mesh_or_group: DeviceMesh | dist.ProcessGroup | InProcessTransport | None = None,
    *,
    kernel: str = "auto",
    device: str | None = None,
    seconds: float = 2.0,
) -> tuple[float, ...]:
    """What layout `weighted` takes as its weights: the speed of each rank at attention, that of the fastest being 1. Collective.

    All wait for the slowest where all have the same to do, and GPUs of one kind differ by some percent, above all at their limit of power,
    which they reach after tenths of a second: they compute for half of the time before they are timed. What two measurements say differs
    by a few thousandths; a run that is to be continued in the very same shards keeps what it was given.

        weights = ringspan.measure_weights()
        cp = ringspan.ContextParallel(layout="weighted", weights=weights)

    Args:
        mesh_or_group: see `ContextParallel`.
        kernel: see `ContextParallel`. It computes 32 query and 8 KV heads of 128 in bfloat16, on a CPU 4 and 2 of 64 in float32.
        device: `cuda`, this rank's current GPU, or `cpu`; the first if not given, where there is one and the ranks exchange its tensors.
        seconds: how long, above 0 and at most 600.

    Returns:
        A weight for each rank, in thousandths, the same on every rank.

    Raises:
        RingspanError: on every rank, where an argument is wrong, the ranks disagree, or a rank's device lacks the kernel.
    """
    transport = make_transport(mesh_or_group)
    asked = f"kernel={kernel!r} device={device!r} seconds={seconds!r}"
    agree(transport, "measure_weights", asked, checks.problem_of(lambda: _check(kernel, device, seconds)))
    has_gpu = "cuda" in transport.devices and torch.cuda.is_available()
    made: list[Callable[[], None]] = []
    where = device or ("cuda" if has_gpu else "cpu")
    problem = checks.problem_of(lambda: made.append(_tried(kernel, where)))
    agree(transport, "measure_weights", asked, problem)
    speeds = [_passes_a_second(made[0], where, transport, seconds / 2) for _ in ("warm", "timed")]
    return weights_of(transport.gather_objects(speeds[-1]))


def weights_of(speeds: Sequence[float]) -> tuple[float, ...]:
    """Weights in proportion to `speeds`, the largest 1, in thousandths."""
    return tuple(max(round(speed / max(speeds), 3), 1e-3) for speed in speeds)


def _check(kernel: str, device: str | None, seconds: float) -> None:
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds <= LONGEST_SECONDS:
        raise RingspanError(
            f"measure_weights of seconds={seconds!r}",
            "",
            f"It takes a time above 0, and {LONGEST_SECONDS:.0f} seconds at most",
            "seconds=2.0",
        )
    if device not in (None, *PROBLEMS):
        raise RingspanError(f"measure_weights on device {device!r}", "", f"There are {' and '.join(PROBLEMS)}", "device=None")
    check_kernel_name(kernel)


def _tried(kernel: str, device: str) -> Callable[[], None]:
    """A pass that has been made once: what is compiled at first is, and what does not run here says so."""
    problem, tokens = PROBLEMS[device]
    run = kernel_pass(select_kernel(kernel, problem), problem, tokens)
    run()
    _synchronise(device)
    return run


def _passes_a_second(run: Callable[[], None], device: str, transport: Transport, seconds: float) -> float:
    """Of passes that begin on all ranks at once, and follow one another for so long."""
    transport.gather_objects(None)
    began, passes = time.perf_counter(), 0
    while passes == 0 or time.perf_counter() - began < seconds:
        # Some are queued at a time, so that a GPU waits for no launch.
        for _ in range(AT_A_TIME):
            run()
        _synchronise(device)
        passes += AT_A_TIME
    return passes / (time.perf_counter() - began)


def _synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
