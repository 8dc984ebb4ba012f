"""FlashAttention-4 (the wheel `flash-attn-4`): the fastest measured on Hopper, forward and backward, windows and softcap included."""

from __future__ import annotations

import importlib
import importlib.util
import threading
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from ringspan.kernels.capabilities import Capabilities, Declared, Problem
from ringspan.kernels.protocol import Scores, common_window

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
        varlen=True,
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
        if scores.parts:
            q, k, v = q[0], k[0], v[0]
        with _COMPILING:
            out, lse, *_ = _interface()._flash_attn_fwd(
                q, k, v, softmax_scale=scores.scale, softcap=scores.softcap, return_lse=True, **_window(scores), **_varlen(scores, q.device)
            )
        return (out.unsqueeze(0), lse.unsqueeze(0)) if scores.parts else (out, lse)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None, scores: Scores
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernel.backward`."""
        if scores.parts:
            dout, q, k, v, out, lse = dout[0], q[0], k[0], v[0], out[0], lse[0]
            dlse = None if dlse is None else dlse[0]
        dlse = None if dlse is None else dlse.contiguous()
        # Side by side, so that they are added and sent as one; with a batch that lies inside the rows they are laid out as k is.
        dk, dv = k.new_empty((2, *k.shape)) if k.is_contiguous() else (None, None)
        with _COMPILING:
            dq, dk, dv, *_ = _interface()._flash_attn_bwd(
                q, k, v, out, dout, lse.contiguous(), softmax_scale=scores.scale, softcap=scores.softcap or 0.0, dk=dk, dv=dv,
                dlse=dlse, deterministic=scores.deterministic, **_window(scores), **_varlen(scores, q.device),
            )  # fmt: skip
        return (dq.unsqueeze(0), dk.unsqueeze(0), dv.unsqueeze(0)) if scores.parts else (dq, dk, dv)


def _window(scores: Scores) -> dict[str, bool | int | None]:
    """Causal, left and right of a tile or of all parts; None is no bound. On a trimmed tile both are 0 or above."""
    window = common_window(scores.parts or (scores.tile,))
    assert window is not None, "parts of one launch are under one band"
    left, right = (None, None) if window == (None, 0) else window
    return {"causal": window == (None, 0), "window_size_left": left, "window_size_right": right}


def _varlen(scores: Scores, device: torch.device) -> dict[str, Tensor | int]:
    if not scores.parts:
        return {}
    borders = scores.borders(device)
    longest = max(part.num_queries for part in scores.parts), max(part.num_keys for part in scores.parts)
    return {"cu_seqlens_q": borders[0], "cu_seqlens_k": borders[1], "max_seqlen_q": longest[0], "max_seqlen_k": longest[1]}
