"""What is verified: one configuration, and the grid of all that were asked for."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice, product
from math import gcd, prod
from typing import Any

import torch

from ringspan.errors import RingspanError, nearest_name
from ringspan.geometry import LAYOUTS, MASKS, parse_mask
from ringspan.kernels import KERNELS
from ringspan.strategies import STRATEGIES

DTYPES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""The dtypes of q, k and v that can be asked for, by name."""

OPTIONS = {
    "num_ranks": "--ranks",
    "strategies": "--strategy",
    "layouts": "--layout",
    "masks": "--mask",
    "lengths": "--length",
    "heads": "--heads",
    "kv_heads": "--kv-heads",
    "head_dims": "--head-dim",
    "batches": "--batch",
    "dtypes": "--dtype",
    "kernels": "--kernel",
    "seeds": "--seed",
}
"""The fields of `Grid`, and what the command line calls them."""

_NAMES = {
    "strategies": (*STRATEGIES, "auto"),
    "layouts": (*LAYOUTS, "auto"),
    "dtypes": tuple(DTYPES),
    "kernels": ("auto", *KERNELS),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One configuration: how attention is split, and the tensors that it is given."""

    num_ranks: int
    strategy: str
    layout: str
    mask: str
    length: int
    heads: int
    kv_heads: int
    dtype: str
    kernel: str
    batch: int = 2
    head_dim: int = 16
    seed: int = 0

    @property
    def weights(self) -> tuple[float, ...] | None:
        """For layout `weighted`, shares 1, 2, 0, 1, 2, 0, …: uneven, and every third rank owns nothing."""
        if self.layout != "weighted":
            return None
        return tuple(float((rank + 1) % 3) for rank in range(self.num_ranks))

    def __str__(self) -> str:
        return (
            f"{self.strategy} over {self.num_ranks} ranks, {self.layout}, {self.mask}, length {self.length}, batch {self.batch}, "
            f"{self.heads}/{self.kv_heads} heads of {self.head_dim}, {self.dtype}, kernel {self.kernel}, seed {self.seed}"
        )


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Every combination of these lists. The defaults have lengths that nothing divides, and fewer tokens than ranks.

    Args:
        num_ranks: numbers of ranks.
        strategies: names out of `ringspan.strategies.STRATEGIES`, or `auto`.
        layouts: names out of `ringspan.layouts`.
        masks: masks as `ringspan.geometry.parse_mask` reads them.
        lengths: tokens of a sequence.
        heads: query heads.
        kv_heads: key and value heads; pairs that do not divide are refused, not skipped in silence.
        dtypes: names out of `DTYPES`.
        kernels: `auto` or names out of `ringspan.kernels.KERNELS`.
        batches: sequences side by side.
        head_dims: widths of a head.
        seeds: of the random tensors.
    """

    num_ranks: tuple[int, ...] = (1, 2, 3, 5, 8)
    strategies: tuple[str, ...] = tuple(STRATEGIES)
    layouts: tuple[str, ...] = tuple(LAYOUTS)
    masks: tuple[str, ...] = MASKS
    lengths: tuple[int, ...] = (1, 7, 61, 257)
    heads: tuple[int, ...] = (6,)
    kv_heads: tuple[int, ...] = (2,)
    dtypes: tuple[str, ...] = ("float64", "float32", "bfloat16")
    kernels: tuple[str, ...] = ("auto",)
    batches: tuple[int, ...] = (2,)
    head_dims: tuple[int, ...] = (16,)
    seeds: tuple[int, ...] = (0,)

    def check(self) -> None:
        """That every entry is one that exists.

        Raises:
            RingspanError: for the first that does not, with those that do.
        """
        for name, option in OPTIONS.items():
            values = getattr(self, name)
            if not values:
                raise RingspanError(f"{option} with an empty list", "", "Something is verified", f"no {option}")
            for value in values:
                if isinstance(value, int) and value < (0 if name == "seeds" else 1):
                    raise RingspanError(f"{option} {value}", "", "It is a whole number of at least 1", f"{option} 1")
                if name in _NAMES and value not in _NAMES[name]:
                    known = _NAMES[name]
                    raise RingspanError(
                        f"{option} {value!r}",
                        f"there are {', '.join(known)}",
                        "It is asked for by name",
                        f"{option} {nearest_name(value, known)}",
                    )
        for mask in self.masks:
            parse_mask(mask)

    @property
    def size(self) -> int:
        """How many combinations there are."""
        return prod(map(len, self._lists))

    def cases(self, most: int | None = None) -> list[Case]:
        """The combinations, or, where there are more than `most`, an even choice of about so many.

        Those that share tensors follow one another, so that what they are compared with is computed once. The choice is every n-th one,
        for an n that shares no factor with the length of any list: every entry of every list then comes up as often as any other.
        """
        stride = 1 if most is None else -(-self.size // most)
        while any(gcd(stride, len(values)) > 1 for values in self._lists):
            stride += 1
        return [_case(*chosen) for chosen in islice(product(*self._lists), 0, None, stride)]

    @property
    def _lists(self) -> list[tuple[Any, ...]]:
        tensors = [self.dtypes, self.lengths, self.masks, self.heads, self.kv_heads, self.batches, self.head_dims, self.seeds]
        return [*tensors, self.kernels, self.strategies, self.layouts, self.num_ranks]


def _case(
    dtype: str, length: int, mask: str, heads: int, kv_heads: int, batch: int, head_dim: int, seed: int,
    kernel: str, strategy: str, layout: str, num_ranks: int,
) -> Case:  # fmt: skip
    return Case(
        num_ranks=num_ranks, strategy=strategy, layout=layout, mask=mask, length=length, heads=heads, kv_heads=kv_heads, dtype=dtype,
        kernel=kernel, batch=batch, head_dim=head_dim, seed=seed,
    )  # fmt: skip
