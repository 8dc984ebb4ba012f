"""Words that devices tell each other by, several in one kernel.

A launch takes some microseconds on the device, and a signal less than one: three signals one after the other are three launches.
"""

from __future__ import annotations

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor


@triton.jit
def _nanoseconds():
    return tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)


@triton.jit
def _words_kernel(addresses, nanoseconds, EXPECTED: tl.constexpr, DESIRED: tl.constexpr, SEM: tl.constexpr, TIMED: tl.constexpr):
    word = tl.load(addresses + tl.program_id(0)).to(tl.pointer_type(tl.int32))
    if TIMED:
        begun = _nanoseconds()
    while tl.atomic_cas(word, EXPECTED, DESIRED, sem=SEM, scope="sys") != EXPECTED:
        if TIMED:  # noqa: SIM102 (known when it is compiled: what it holds is not there otherwise)
            if _nanoseconds() - begun > nanoseconds:  # pyright: ignore[reportPossiblyUnboundVariable]
                # The context ends with an error, as where torch's own wait runs out of time.
                tl.inline_asm_elementwise("trap; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


def fused_set(addresses: Tensor, milliseconds: int) -> None:
    """Sets words that are 0 to 1, each as soon as it is 0; what was written before is seen by whoever finds it set.

    Args:
        addresses: of int32 words, of this device or of another that it reaches, int64 on this device.
        milliseconds: after which the device's context ends with an error; 0 for never, as with torch's own.
    """
    _words_kernel[(addresses.numel(),)](  # pyright: ignore[reportIndexIssue]
        addresses, milliseconds * 1_000_000, 0, 1, "release", milliseconds > 0, num_warps=1
    )


def fused_await(addresses: Tensor, milliseconds: int) -> None:
    """Waits for words to be 1 and sets them to 0; what was written before they were set is seen by what comes after. See `fused_set`."""
    _words_kernel[(addresses.numel(),)](  # pyright: ignore[reportIndexIssue]
        addresses, milliseconds * 1_000_000, 1, 0, "acquire", milliseconds > 0, num_warps=1
    )
