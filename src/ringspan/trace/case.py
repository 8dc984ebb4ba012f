"""What is traced: one attention layer, and how it is split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from ringspan.attention.checks import features
from ringspan.errors import RingspanError, nearest_name
from ringspan.geometry import LAYOUTS, Layout, Mask, make_layout, parse_mask
from ringspan.kernels import KERNELS, Kernel, Problem, accumulator_dtype, select_kernel
from ringspan.schedule import PieceBytes
from ringspan.strategies import STRATEGIES, make_schedules
from ringspan.verify import DTYPES


@dataclass(frozen=True, kw_only=True)
class TraceCase:
    """One attention layer over several ranks.

    Args:
        num_ranks: how many share the sequence.
        strategy: one of `STRATEGIES`, or `auto`.
        layout: one of the layouts, `auto` included.
        mask: as `parse_mask` reads it.
        length: positions of the whole sequence.
        heads: query heads.
        kv_heads: key and value heads, a divisor of `heads`.
        head_dim: width of a head.
        batch: sequences side by side.
        dtype: of q, k and v, by name.
        kernel: one of `KERNELS`, or `auto`.
        options: the strategy's own.
        weights: one for each rank, for the layout `weighted`.
    """

    num_ranks: int
    strategy: str = "ring"
    layout: str = "zigzag"
    mask: str = "causal"
    length: int = 4096
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    batch: int = 1
    dtype: str = "float32"
    kernel: str = "auto"
    options: Mapping[str, int | str] = field(default_factory=dict)
    weights: tuple[float, ...] | None = None

    def check(self, device: torch.device) -> None:
        """That all of it exists and goes together on `device`, before any rank starts.

        Raises:
            RingspanError: for the first that does not.
        """
        named = (
            ("strategy", self.strategy, (*STRATEGIES, "auto")),
            ("layout", self.layout, (*LAYOUTS, "auto")),
            ("dtype", self.dtype, tuple(DTYPES)),
            ("kernel", self.kernel, ("auto", *KERNELS)),
        )
        for option, value, known in named:
            if value not in known:
                found = f"there are {', '.join(known)}"
                raise RingspanError(f"--{option} {value!r}", found, "It is asked for by name", f"--{option} {nearest_name(value, known)}")
        for option in ("ranks", "length", "heads", "kv_heads", "head_dim", "batch"):
            value = getattr(self, "num_ranks" if option == "ranks" else option)
            if value < 1:
                name = option.replace("_", "-")
                raise RingspanError(f"--{name} {value}", "", "It is a whole number of at least 1", f"--{name} 1")
        if self.heads % self.kv_heads:
            nearest = max(size for size in range(1, min(self.heads, self.kv_heads) + 1) if self.heads % size == 0)
            raise RingspanError(
                f"--heads {self.heads} --kv-heads {self.kv_heads}",
                f"{self.heads} / {self.kv_heads} leaves {self.heads % self.kv_heads}",
                "Each KV head serves equally many heads",
                f"--kv-heads {nearest}",
            )
        if self.strategy != "auto":
            make_schedules(self.strategy, self.make_layout(), self.parsed_mask, **self.options)
        elif self.options:
            given = ", ".join(self.options)
            raise RingspanError(f"strategy 'auto' with {given}", "it chooses options itself", "", f"strategy 'auto' without {given}")
        self.parsed_mask.check_length(self.length)
        select_kernel(self.kernel, self.problem(device))

    @property
    def parsed_mask(self) -> Mask:
        """The mask."""
        return parse_mask(self.mask)

    def make_layout(self) -> Layout:
        """Who owns which positions."""
        return make_layout(self.layout, self.length, self.num_ranks, self.weights, self.parsed_mask)

    def problem(self, device: torch.device) -> Problem:
        """What the kernel is asked to compute."""
        return Problem(
            device=device.type,
            dtype=DTYPES[self.dtype],
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            features=features(self.parsed_mask, None),
        )

    def sizes_with(self, kernel: Kernel) -> PieceBytes:
        """What one position of each kind of piece weighs, where what `kernel` gave travels as it rounded it."""
        materialised = "ring_self_attention" in (self.strategy, self.options.get("inner"))
        return replace(self.sizes, single_bytes=DTYPES[self.dtype].itemsize if kernel.rounds and not materialised else None)

    @property
    def sizes(self) -> PieceBytes:
        """The same, whatever the kernel does: all that is accumulated in the accumulator's dtype."""
        dtype = DTYPES[self.dtype]
        return PieceBytes(
            batch=self.batch,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            element_bytes=dtype.itemsize,
            accumulator_bytes=accumulator_dtype(dtype).itemsize,
        )

    @property
    def title(self) -> str:
        """`ring · zigzag · causal`."""
        named = self.strategy + "".join(f" {name}={value}" for name, value in self.options.items())
        return f"{named} · {self.layout} · {self.mask}"
