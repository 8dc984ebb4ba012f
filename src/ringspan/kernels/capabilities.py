"""What a kernel can do, declared in one object: what selection refuses by, what `ringspan doctor` and the README's table print."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Determinism = Literal["always", "on request", "never"]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What a kernel is asked to compute, without the lengths.

    Args:
        device: `cpu` or `cuda`.
        dtype: of q, k and v.
        heads: query heads.
        kv_heads: key and value heads, a divisor of `heads`.
        head_dim: width of a head.
        features: which of `window`, `softcap`, `mask_mod` and `scale ≤ 0` the scores need. Flash kernels take the largest score before they
            scale: under a scale that is not above 0 that is the least, or −∞ times 0.
        deterministic: whether the gradients are to be the same bits at every run.
    """

    device: str
    dtype: torch.dtype
    heads: int
    kv_heads: int
    head_dim: int
    features: frozenset[str] = frozenset()
    deterministic: bool = False


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a kernel computes, and where.

    Args:
        shapes: the tiles that it computes in one launch, beyond full ones: `causal` (low = 0, aligned top-left, any rectangle),
            `square` (low = 0 on squares only), `corner` (bands without rows below them that see all keys), `band` (anything). Other
            tiles are lowered to these, see `lowered`.
        features: which of `window`, `softcap`, `mask_mod` and `scale ≤ 0` it computes.
        device: `cpu` or `cuda`; None for any.
        dtypes: of q, k and v; None for any floating-point dtype.
        head_dims: (narrowest, widest) heads, multiples of 8; None for any.
        compute_capability: the oldest GPU, where `device` is `cuda`.
        lse_gradient: whether the backward takes a gradient of lse; else it is given one as columns, see `lse_gradient`.
        rounds: whether out, dq, dk and dv always come in the dtype of q, so that they lose nothing by travelling in it.
        float32_partials: whether partial outputs come in float32 or wider, whatever the inputs' dtype.
        determinism: of the backward's bits on one machine: `always` the same, the same `on request` (`Scores.deterministic`, at some
            cost), or `never` promised.
        graph_capture: whether its launches can be captured in a CUDA graph: once warm it neither allocates outside torch's allocator nor
            waits for the device.
        varlen: whether one launch takes several tiles of different lengths, see `packed`; of a single sequence, not of a batch.
    """

    shapes: frozenset[str]
    features: frozenset[str] = frozenset()
    device: str | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    head_dims: tuple[int, int] | None = None
    compute_capability: tuple[int, int] = (8, 0)
    lse_gradient: bool = False
    rounds: bool = False
    float32_partials: bool = False
    determinism: Determinism = "always"
    graph_capture: bool = False
    varlen: bool = False

    def refusal(self, problem: Problem) -> str | None:
        """Why a kernel that can do this does not compute `problem` on this machine, or None where it does."""
        return self._misplaced(problem) or self._lacking(problem)

    def _misplaced(self, problem: Problem) -> str | None:
        if self.device is not None and problem.device != self.device:
            return f"it runs on {self.device}, and the tensors are on {problem.device}"
        if self.dtypes is not None and problem.dtype not in self.dtypes:
            there, asked = ", ".join(map(dtype_name, self.dtypes)), dtype_name(problem.dtype)
            return f"it computes {there}, not {asked}"
        if self.head_dims is not None:
            narrowest, widest = self.head_dims
            if problem.head_dim % 8 or not narrowest <= problem.head_dim <= widest:
                least = f" from {narrowest}" if narrowest > 8 else ""
                return f"it computes head sizes that are multiples of 8{least} up to {widest}, not {problem.head_dim}"
        if self.device == "cuda":
            if not torch.cuda.is_available():
                return "there is no CUDA device here"
            if (here := torch.cuda.get_device_capability()) < (wanted := self.compute_capability):
                return f"it wants compute capability {wanted[0]}.{wanted[1]}, and this GPU has {here[0]}.{here[1]}"
        return None

    def _lacking(self, problem: Problem) -> str | None:
        if missing := sorted(problem.features - self.features):
            return f"it computes no {' and no '.join(missing)}"
        if problem.deterministic and self.determinism == "never":
            return "its backward does not promise the same bits at every run"
        return None


class Declared:
    """A kernel with a name and declared capabilities; the base of all kernels here."""

    name: str
    can: Capabilities

    @property
    def shapes(self) -> frozenset[str]:
        """See `Capabilities.shapes`."""
        return self.can.shapes

    @property
    def features(self) -> frozenset[str]:
        """See `Capabilities.features`."""
        return self.can.features

    @property
    def lse_gradient(self) -> bool:
        """See `Capabilities.lse_gradient`."""
        return self.can.lse_gradient

    @property
    def rounds(self) -> bool:
        """See `Capabilities.rounds`."""
        return self.can.rounds

    def missing(self) -> str | None:
        """Why what the kernel is made of is not on this machine, or None where it is."""
        return None

    def refusal(self, problem: Problem) -> str | None:
        """Why this kernel does not compute `problem` here, or None where it does."""
        return self.can.refusal(problem) or self.missing()


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")
