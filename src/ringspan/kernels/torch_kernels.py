"""The flash kernels inside torch: its own on the CPU, cuDNN and FlashAttention-2 on CUDA. Each takes strided views and grouped heads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from ringspan.geometry import Tile
from ringspan.kernels.capabilities import Capabilities, Declared
from ringspan.kernels.protocol import Scores

aten = torch.ops.aten
_HALF = (torch.float16, torch.bfloat16)
_MODE = threading.Lock()
_ROWS_WITH_MASK = 512
"""The CPU kernel takes windows and mask_mods as a tensor of this many rows at a time, so that it never grows with the square."""
_ROWS_FOR_LARGE_BLOCKS = 768
"""From so many rows on, torch's CPU backward works by blocks of 256 rows; below by 64 and 32."""


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    """`[batch, seq, heads, head_dim]` as `[batch, heads, seq, head_dim]`, views."""
    return [tensor.transpose(1, 2) for tensor in tensors]


class TorchCpu(Declared):
    """Torch's CPU flash attention. Windows and mask_mods reach it as a mask, a few rows at a time."""

    name = "torch_cpu"
    can = Capabilities(
        shapes=frozenset({"causal", "square", "band"}),
        features=frozenset({"window", "mask_mod"}),
        device="cpu",
        dtypes=(torch.float64, torch.float32, *_HALF),
    )

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
        """See `Kernel.forward`."""
        outs, lses = [], []
        for rows, keys, mask, causal in _cpu_launches(q, k, scores):
            out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
                *_heads_first(q[:, rows], k[:, keys], v[:, keys]), 0.0, causal, attn_mask=mask, scale=scores.scale
            )
            if scores.mask_mod is not None and mask is not None:
                # A row of which mask_mod leaves nothing comes back with lse 0 instead of −inf, and would count in the merge.
                empty = torch.isneginf(mask).all(-1).expand(lse.shape)
                out, lse = out.masked_fill(empty.unsqueeze(-1), 0), lse.masked_fill(empty, float("-inf"))
            outs.append(out.transpose(1, 2))
            lses.append(lse)
        return (outs[0], lses[0]) if len(outs) == 1 else (torch.cat(outs, 1), torch.cat(lses, 2))

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None, scores: Scores
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernel.backward`."""
        assert dlse is None
        if scores.mask_mod is not None:
            lse = torch.where(torch.isneginf(lse), torch.zeros_like(lse), lse)
        launches = list(_cpu_launches(q, k, scores))
        dqs = []
        dk = dv = None
        for rows, keys, mask, causal in launches:
            tensors = _heads_first(dout[:, rows], q[:, rows], k[:, keys], v[:, keys], out[:, rows])
            if q.dtype in _HALF and tensors[0].shape[2] < _ROWS_FOR_LARGE_BLOCKS:
                # After every block torch rounds dk and dv to the inputs' dtype: the small blocks of a shard would round them more often
                # than the large blocks of the whole sequence do. In float32 nothing is rounded, and launches this short are as quick.
                tensors = [tensor.float() for tensor in tensors]
                mask = None if mask is None else mask.float()
            grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *tensors, lse[:, :, rows], 0.0, causal, attn_mask=mask, scale=scores.scale
            )
            dq, dk_part, dv_part = _heads_first(*grads)
            if len(launches) == 1:
                return dq, dk_part, dv_part
            dqs.append(dq)
            if dk is None or dv is None:
                wide = torch.promote_types(k.dtype, torch.float32)
                dk, dv = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
            dk[:, keys] += dk_part
            dv[:, keys] += dv_part
        assert dk is not None and dv is not None
        return torch.cat(dqs, 1), dk, dv


def _cpu_launches(q: Tensor, k: Tensor, scores: Scores) -> list[tuple[slice, slice, Tensor | None, bool]]:
    """(rows, keys, mask, causal) of each call: one where the kernel knows the tile's shape, else some rows with their mask at a time."""
    tile = scores.tile
    if scores.mask_mod is None and tile.kind != "band":
        return [(slice(0, q.shape[1]), slice(0, k.shape[1]), None, tile.kind == "causal")]
    launches = []
    for start in range(0, q.shape[1], _ROWS_WITH_MASK):
        rows = slice(start, min(start + _ROWS_WITH_MASK, q.shape[1]))
        first = 0 if tile.high is None else max(0, rows.start - tile.high)
        end = k.shape[1] if tile.low is None else min(k.shape[1], rows.stop - tile.low)
        allowed = scores.allowed(rows, q.shape[0], q.shape[2], q.device)
        assert allowed is not None
        allowed = allowed[..., first:end]
        mask = torch.zeros(allowed.shape, dtype=q.dtype, device=q.device).masked_fill_(~allowed, float("-inf"))
        launches.append((rows, slice(first, end), mask, False))
    return launches


class CuDnn(Declared):
    """cuDNN's fused attention: the fastest on Hopper inside torch."""

    name = "cudnn"
    can = Capabilities(
        shapes=frozenset({"causal", "square"}),
        device="cuda",
        dtypes=_HALF,
        head_dims=(8, 128),
        # Torch says so of it, and takes another kernel in its deterministic mode.
        determinism="never",
        graph_capture=True,
        rounds=True,
    )

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
        """See `Kernel.forward`."""
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(
            *_heads_first(q, k, v), None, True, 0.0, scores.tile.kind == "causal", False, scale=scores.scale
        )
        return out.transpose(1, 2), lse.view(lse.shape[:3])

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None, scores: Scores
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernel.backward`."""
        assert dlse is None
        seed = torch.zeros((), dtype=torch.int64, device=q.device)
        grads = aten._scaled_dot_product_cudnn_attention_backward(
            *_heads_first(dout, q, k, v, out), lse.contiguous().unsqueeze(-1), seed, seed, None, None, None,
            q.shape[1], k.shape[1], 0.0, scores.tile.kind == "causal", scale=scores.scale,
        )  # fmt: skip
        dq, dk, dv = _heads_first(*grads)
        return dq, dk, dv


class Flash2(Declared):
    """FlashAttention-2 as torch carries it, windows included.

    A bound on the right that is as large as the number of keys counts as none there, which is wrong where there are more queries than keys:
    the rows below a band are therefore launched apart.
    """

    name = "flash2"
    can = Capabilities(
        shapes=frozenset({"square", "corner"}),
        features=frozenset({"window"}),
        device="cuda",
        dtypes=_HALF,
        head_dims=(8, 256),
        determinism="on request",
        graph_capture=True,
        rounds=True,
    )

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
        """See `Kernel.forward`."""
        causal, left, right = _flash2_window(scores.tile)
        out, lse, *_ = aten._flash_attention_forward(
            q, k, v, None, None, q.shape[1], k.shape[1], 0.0, causal, False,
            scale=scores.scale, window_size_left=left, window_size_right=right,
        )  # fmt: skip
        return out, lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None, scores: Scores
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernel.backward`."""
        assert dlse is None
        causal, left, right = _flash2_window(scores.tile)
        seed = torch.zeros(2, dtype=torch.uint64, device=q.device)
        with torchs_deterministic_mode() if scores.deterministic else nullcontext():
            return aten._flash_attention_backward(
                dout, q, k, v, out, lse.contiguous(), None, None, q.shape[1], k.shape[1], 0.0, causal, seed, seed[:0],
                scale=scores.scale, window_size_left=left, window_size_right=right,
            )  # fmt: skip


@contextmanager
def torchs_deterministic_mode() -> Iterator[None]:
    """Torch's deterministic mode for what is launched inside, and what it was before afterwards. A launch takes no time.

    The mode belongs to the process, and in-process ranks are threads: one at a time, so that none finds it off in the middle.
    """
    with _MODE:
        before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _flash2_window(tile: Tile) -> tuple[bool, int | None, int | None]:
    """(causal, left, right) of a tile for FlashAttention, which counts from the bottom-right corner: key ≤ query + keys − queries + right.

    On a trimmed tile both bounds come out at 0 or above; a negative one would mean no bound.
    """
    if tile.kind == "full" or (tile.kind == "causal" and tile.num_queries == tile.num_keys):
        return tile.kind == "causal", None, None
    corner = tile.num_keys - tile.num_queries
    left = -1 if tile.high is None else tile.high + corner
    right = -1 if tile.low is None else -tile.low - corner
    return False, left, right
