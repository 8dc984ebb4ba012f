"""What is timed: the shapes of a problem, the settings that solve it, and the grid of both that was asked for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, product

import torch

from ringspan.attention.checks import features
from ringspan.bench.documents import parse_documents, realistic_lengths
from ringspan.errors import RingspanError
from ringspan.geometry import LAYOUTS, Mask, Workload, documents, make_layout, parse_mask
from ringspan.kernels import KERNELS, Kernel, Problem, accumulator_dtype
from ringspan.schedule import PieceBytes
from ringspan.strategies import strategy_options
from ringspan.verify import DTYPES

TRANSPORTS = ("auto", "process_group", "peer_memory")
"""What `ContextParallel` takes as its transport between processes."""

LAUNCHES = ("eager", "graph", "replay")
"""From Python at each call; captured as a whole, once, as a CUDA graph and replayed; or called from Python with `cuda_graphs=True`, which
replays attention alone. One device is then called from Python as it is."""

FEWEST_SAMPLES = 10
"""A median of fewer is not reported."""

EVERYTHING_ON = "everything on"
"""The note of the setting that ablations take something away from: the first that was asked for."""

BACKWARD = 2.5
"""FLOPs of a backward, in forwards: five matrix products against two."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One problem: whoever solves it computes the same.

    Attributes:
        tokens: per device.
        num_ranks: devices.
        mask: as `parse_mask` reads it.
        documents: `realistic:SEED` for a mixture of documents beside the mask, or empty.
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: width of a head.
        batch: sequences side by side.
        dtype: of q, k, v.
    """

    tokens: int
    num_ranks: int
    mask: str = "causal"
    documents: str = ""
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    batch: int = 1
    dtype: str = "bfloat16"

    @property
    def length(self) -> int:
        """Tokens of the whole sequence."""
        return self.tokens * self.num_ranks

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch has it."""
        return DTYPES[self.dtype]

    @property
    def mask_text(self) -> str:
        """The mask and the mixture of documents, as they were asked for."""
        return f"{self.mask}&{self.documents}" if self.documents else self.mask

    @property
    def document_lengths(self) -> tuple[int, ...]:
        """Of the mixture; empty where none was asked for."""
        return realistic_lengths(self.length, parse_documents(self.documents)) if self.documents else ()

    @property
    def made_mask(self) -> Mask:
        """The mask as an object."""
        return _made_mask(self.mask, self.document_lengths)

    @property
    def sizes(self) -> PieceBytes:
        """What one position weighs."""
        return PieceBytes(
            batch=self.batch, heads=self.heads, kv_heads=self.kv_heads, head_dim=self.head_dim,
            element_bytes=self.torch_dtype.itemsize, accumulator_bytes=accumulator_dtype(self.torch_dtype).itemsize,
        )  # fmt: skip

    def sizes_with(self, kernel: Kernel | None) -> PieceBytes:
        """The same, where what `kernel` gave travels as it rounded it."""
        rounds = kernel is not None and kernel.rounds
        return replace(self.sizes, single_bytes=self.torch_dtype.itemsize if rounds else None)

    @property
    def forward_flops(self) -> int:
        """Useful FLOPs of a forward over all devices: 4·head_dim for each pair that the mask allows and each query head."""
        return 4 * self.head_dim * self.heads * self.batch * allowed_pairs(self.made_mask, self.length)

    def problem(self, device: torch.device) -> Problem:
        """What a kernel on `device` is asked for."""
        return Problem(
            device=device.type, dtype=self.torch_dtype, heads=self.heads, kv_heads=self.kv_heads, head_dim=self.head_dim,
            features=features(self.made_mask, None),
        )  # fmt: skip

    def __str__(self) -> str:
        return (
            f"{self.tokens} tokens a device on {self.num_ranks}, {self.mask_text}, {self.heads}/{self.kv_heads} heads of {self.head_dim}, "
            f"batch {self.batch}, {self.dtype}"
        )


@lru_cache(maxsize=64)
def _made_mask(mask: str, lengths: tuple[int, ...]) -> Mask:
    made = parse_mask(mask)
    return made & documents([0, *accumulate(lengths)]) if lengths else made


@lru_cache(maxsize=64)
def allowed_pairs(mask: Mask, length: int) -> int:
    """How many (query, key) pairs `mask` allows in a sequence of `length` tokens."""
    return sum(Workload(make_layout("contiguous", length, 1), mask).pairs_per_rank)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How ringspan solves a problem.

    Attributes:
        strategy: its name, with options as in `all_gather:stages=2`.
        layout: who owns which positions.
        kernel: computes the tiles.
        transport: moves the pieces.
        launch: `eager`, or `graph` for a CUDA graph that is replayed.
        overlap: False where each transfer is awaited before anything is computed: what overlapping is worth.
        note: what an ablation calls it; empty elsewhere.
    """

    strategy: str = "ring"
    layout: str = "zigzag"
    kernel: str = "auto"
    transport: str = "auto"
    launch: str = "eager"
    overlap: bool = True
    note: str = ""

    def __str__(self) -> str:
        parts = [self.strategy, self.layout, self.kernel, self.transport, self.launch] + ["no overlap"] * (not self.overlap)
        return " ".join(parts) + (f" ({self.note})" if self.note else "")


def parse_strategy(text: str) -> tuple[str, dict[str, int | str]]:
    """`all_gather:stages=2` as a name and its options; several options are joined by `&`. `kv_heads_per_stage` goes with every strategy.

    Raises:
        RingspanError: for a strategy or an option that there is not, or a value that does not read.
    """
    name, _, rest = text.partition(":")
    known: dict[str, type] = {} if name == "auto" else strategy_options(name)
    known["kv_heads_per_stage"] = int  # of `ContextParallel`, with any strategy
    options: dict[str, int | str] = {}
    for part in rest.split("&") if rest else ():
        key, _, value = part.partition("=")
        if key not in known:
            found = f"it takes {', '.join(known)}"
            raise RingspanError(f"--strategy {text!r}", found, "A strategy is given its own options alone", f"--strategy {name}")
        try:
            options[key] = known[key](value)
        except ValueError:
            raise RingspanError(f"--strategy {text!r}", f"{value!r} is no whole number", f"{key} is one", f"--strategy {name}") from None
    return name, options


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Every combination of these lists.

    Args:
        tokens: per device.
        heads: (query heads, key and value heads) pairs.
        strategies: as `parse_strategy` reads them.
        ablate: beside them the experiment that takes one thing away at a time.
        peers: names of `ringspan.bench.PEERS` to time beside.
        baselines: kernels to time on one device; empty for all that can.
        share: beside the whole on one device, in turns with every setting, what it takes for an equal share of the heads.
    """

    num_ranks: int
    tokens: tuple[int, ...]
    heads: tuple[tuple[int, int], ...]
    head_dims: tuple[int, ...]
    dtypes: tuple[str, ...]
    masks: tuple[str, ...] = ("causal",)
    documents: str = ""
    batches: tuple[int, ...] = (1,)
    strategies: tuple[str, ...] = ("ring",)
    layouts: tuple[str, ...] = ("zigzag",)
    kernels: tuple[str, ...] = ("auto",)
    transports: tuple[str, ...] = ("auto",)
    launches: tuple[str, ...] = ("eager",)
    ablate: bool = False
    peers: tuple[str, ...] = ()
    baselines: tuple[str, ...] = ()
    share: bool = False

    def check(self, device: str) -> None:
        """That every entry is one that exists, on `device` (`cpu` or `cuda`).

        Raises:
            RingspanError: for the first that does not, with those that do.
        """
        counts = {"--ranks": (self.num_ranks,), "--length": self.tokens, "--head-dim": self.head_dims, "--batch": self.batches}
        counts["--heads"] = tuple(count for pair in self.heads for count in pair)
        for option, values in counts.items():
            _require(option, values, lambda value: value >= 1, "It is a whole number of at least 1", "1")
        for heads, kv_heads in self.heads:
            if heads % kv_heads:
                raise RingspanError(
                    f"--heads {heads}/{kv_heads}", f"{heads} / {kv_heads} leaves {heads % kv_heads}", "KV heads divide the query heads",
                    f"--heads {heads}/{heads}",
                )  # fmt: skip
            if self.share and kv_heads % self.num_ranks:
                raise RingspanError(
                    f"--share on {self.num_ranks} devices with --heads {heads}/{kv_heads}",
                    f"{kv_heads} / {self.num_ranks} leaves {kv_heads % self.num_ranks}", "A device's share is whole KV heads",
                    f"--heads {heads // kv_heads * self.num_ranks}/{self.num_ranks}, or no --share",
                )  # fmt: skip
        for strategy in self.strategies:
            parse_strategy(strategy)
        from ringspan.bench.peers import PEERS

        for option, values, known in (
            ("--layout", self.layouts, (*LAYOUTS, "auto")),
            ("--dtype", self.dtypes, tuple(DTYPES)),
            ("--kernel", self.kernels, ("auto", *KERNELS)),
            ("--transport", self.transports, TRANSPORTS),
            ("--launch", self.launches, LAUNCHES),
            ("--peers", self.peers, tuple(PEERS)),
            ("--one-device", self.baselines, tuple(KERNELS)),
        ):
            _require(option, values, lambda value, known=known: value in known, f"There are {', '.join(known)}", known[0] if known else "")
        if (replayed := [launch for launch in self.launches if launch != "eager"]) and device != "cuda":
            rule = "A graph is a CUDA graph, captured once and replayed"
            raise RingspanError(f"--launch {replayed[0]}", f"the device is {device}", rule, "--launch eager")
        for shape in self.shapes():
            shape.made_mask.check_length(shape.length)

    def shapes(self) -> list[Shape]:
        """The problems, the longest last: what fails for want of memory then takes nothing with it."""
        lists = product(self.masks, self.heads, self.head_dims, self.batches, self.dtypes, sorted(self.tokens))
        return [
            Shape(
                tokens=tokens, num_ranks=self.num_ranks, mask=mask, documents=self.documents, heads=heads, kv_heads=kv_heads,
                head_dim=head_dim, batch=batch, dtype=dtype,
            )
            for mask, (heads, kv_heads), head_dim, batch, dtype, tokens in lists
        ]  # fmt: skip

    def settings(self) -> list[Setting]:
        """What ringspan is tried with on each problem, ablations last."""
        lists = product(self.launches, self.transports, self.kernels, self.strategies, self.layouts)
        found = [
            Setting(strategy=strategy, layout=layout, kernel=kernel, transport=transport, launch=launch)
            for launch, transport, kernel, strategy, layout in lists
        ]
        if not self.ablate:
            return found
        return [replace(found[0], note=EVERYTHING_ON), *found[1:], *ablations(found[0], self.num_ranks)]


def ablations(whole: Setting, num_ranks: int) -> list[Setting]:
    """What is left of `whole` when one thing is taken away: overlap, balance, good stages.

    No ring at all, one device over the whole, is the baseline of every run.
    """
    found = [
        replace(whole, overlap=False, note="no overlap"),
        replace(whole, layout="contiguous", note="contiguous, not zigzag"),
    ]
    joint = "&" if ":" in whole.strategy else ":"
    found.append(replace(whole, strategy=f"{whole.strategy}{joint}kv_heads_per_stage=1", note="one KV head at a time"))
    return found + [
        replace(whole, strategy=f"all_gather:stages={stages}", note=f"{stages} of {max(1, num_ranks - 1)} stages")
        for stages in range(1, max(2, num_ranks))
    ]


def _require(option: str, values: Iterable, passes, rule: str, nearest: str) -> None:
    values = tuple(values)
    if not values and option not in ("--peers", "--one-device"):
        raise RingspanError(f"{option} with an empty list", "", "Something is timed", f"{option} {nearest}")
    for value in values:
        if not passes(value):
            raise RingspanError(f"{option} {value}", "there is no such thing", rule, f"{option} {nearest}")
