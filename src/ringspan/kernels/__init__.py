"""Kernels: partial attention of one tile. An explicit request is honoured or refused with the reason, never replaced."""

from ringspan.errors import UnsupportedError, nearest_name
from ringspan.kernels.autocast import autocast_dtype, without_autocast
from ringspan.kernels.capabilities import Capabilities, Problem, dtype_name
from ringspan.kernels.capture import is_captured
from ringspan.kernels.copies import AT_ONCE, Copy, copy_all
from ringspan.kernels.first_order import first_order
from ringspan.kernels.flash4 import Flash4
from ringspan.kernels.flex import Flex
from ringspan.kernels.lse_gradient import lse_gradient_refusal
from ringspan.kernels.partial import accumulator_dtype, add_, batch_first, merge_, rows_first
from ringspan.kernels.protocol import Kernel, Scores, lowered, packed
from ringspan.kernels.reference import Reference
from ringspan.kernels.signals import signal_kernels
from ringspan.kernels.speed import Comparison, Speeds, kernel_pass, time_kernel
from ringspan.kernels.torch_kernels import CuDnn, Flash2, TorchCpu

__all__ = [
    "AT_ONCE",
    "KERNELS",
    "SPEEDS",
    "Capabilities",
    "Comparison",
    "Copy",
    "Kernel",
    "Problem",
    "Scores",
    "Speeds",
    "accumulator_dtype",
    "add_",
    "autocast_dtype",
    "batch_first",
    "check_kernel_name",
    "copy_all",
    "dtype_name",
    "first_order",
    "is_captured",
    "kernel_pass",
    "lowered",
    "lse_gradient_refusal",
    "merge_",
    "packed",
    "rows_first",
    "select_kernel",
    "signal_kernels",
    "time_kernel",
    "without_autocast",
]

KERNELS: dict[str, Kernel] = {kernel.name: kernel for kernel in (Flash4(), CuDnn(), Flash2(), Flex(), TorchCpu(), Reference())}
"""By name, the fastest first where speeds were compared (Hopper, PEERS table of 2026-11)."""

SPEEDS = Speeds(KERNELS, time_kernel)
"""What this process has found out about them."""


def refusal(kernel: Kernel, problem: Problem) -> str | None:
    """Why `kernel` does not compute `problem` here, or None where it does."""
    return kernel.refusal(problem)


def check_kernel_name(name: str) -> None:
    """Raises UnsupportedError where there is no such kernel, here or elsewhere."""
    if name not in ("auto", *KERNELS):
        raise UnsupportedError(
            f"kernel {name!r}",
            f"the kernels are auto, {', '.join(KERNELS)}",
            "A kernel is asked for by name",
            f"kernel={nearest_name(name, ('auto', *KERNELS))!r}",
        )


def select_kernel(name: str, problem: Problem) -> Kernel:
    """The kernel called `name`, or for `auto` the first of `KERNELS` that computes `problem`; `SPEEDS` knows the fastest.

    Raises:
        UnsupportedError: for an unknown name, or a kernel that refuses `problem`, with its reason.
    """
    reasons = {other: refusal(kernel, problem) for other, kernel in KERNELS.items()}
    capable = [other for other, reason in reasons.items() if reason is None]
    if name == "auto":
        return KERNELS[capable[0]]
    check_kernel_name(name)
    if (reason := reasons[name]) is not None:
        raise UnsupportedError(f"kernel {name!r}", reason, "A kernel that was asked for is never replaced", f"kernel={capable[0]!r}")
    return KERNELS[name]
