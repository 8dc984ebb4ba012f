"""FlashAttention-4 (the wheel `flash-attn-4`): the fastest measured on Hopper, forward and backward, windows and softcap included."""

from __future__ import annotations

import importlib
import importlib.util
import threading
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from ringspan.geometry import Tile
from ringspan.kernels.capabilities import Capabilities, Declared, Problem
from ringspan.kernels.protocol import Scores

# Its compiler is not made for threads, and in-process ranks are threads that meet a new kind of tile together. A launch takes no time.
_COMPILING = threading.Lock()


@cache
def _missing() -> str | None:
    """Why the wheel cannot be used, or None. Only looks for it: importing it takes seconds."""
    try:
        found = importlib.util.find_spec("flash_attn.cute.interface")
    except ImportError as error:
        return f"flash-attn-4 does not import here ({error}): pip install 'ringspan[flash4]'"
    return None if found else "flash-attn-4 is not installed: pip install 'ringspan[flash4]'"


@cache
def _interface() -> ModuleType:
    return importlib.import_module("flash_attn.cute.interface")


class Flash4(Declared):
    """FlashAttention-4 through its forward and backward functions; compiled for each new kind of tile at its first use, some seconds."""

    name = "flash4"
    can = Capabilities(
        shapes=frozenset({"band"}),
        features=frozenset({"window", "softcap"}),
        device="cuda",
        dtypes=(torch.float16, torch.bfloat16),
        head_dims=(8, 128),
        compute_capability=(9, 0),
        lse_gradient=True,
        determinism="on request",
        graph_capture=True,
        rounds=True,
    )

    def missing(self) -> str | None:
        """The wheel `flash-attn-4`, where it is not installed."""
        return _missing()

    def refusal(self, problem: Problem) -> str | None:
        """See `Kernel.refusal`; on compute capability 12 its backward has no deterministic form."""
        reason = super().refusal(problem)
        if reason is None and problem.deterministic and torch.cuda.get_device_capability() >= (12, 0):
            return "on compute capability 12 its backward does not promise the same bits at every run"
        return reason

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
        """See `Kernel.forward`."""
        causal, left, right = _window(scores.tile)
        with _COMPILING:
            out, lse, *_ = _interface()._flash_attn_fwd(
                q, k, v, softmax_scale=scores.scale, causal=causal, softcap=scores.softcap,
                window_size_left=left, window_size_right=right, return_lse=True,
            )  # fmt: skip
        return out, lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None, scores: Scores
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernel.backward`."""
        causal, left, right = _window(scores.tile)
        dlse = None if dlse is None else dlse.contiguous()
        with _COMPILING:
            dq, dk, dv, *_ = _interface()._flash_attn_bwd(
                q, k, v, out, dout, lse.contiguous(), softmax_scale=scores.scale, causal=causal, softcap=scores.softcap or 0.0,
                window_size_left=left, window_size_right=right, dlse=dlse, deterministic=scores.deterministic,
            )  # fmt: skip
        return dq, dk, dv


def _window(tile: Tile) -> tuple[bool, int | None, int | None]:
    """(causal, left, right) of a tile, counted from the bottom-right corner; None is no bound. On a trimmed tile both are 0 or above."""
    corner = tile.num_keys - tile.num_queries
    left = None if tile.high is None else tile.high + corner
    right = None if tile.low is None else -tile.low - corner
    return (True, None, None) if (left, right) == (None, 0) else (False, left, right)
