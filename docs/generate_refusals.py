"""Write `docs/refusals.md`: what is refused, and why, found out by trying every combination (`python docs/generate_refusals.py`).

Each combination is tried on one rank of four, over a transport whose other ranks agree with everything and send nothing: a refusal comes
before anything is sent, and what is not refused runs, on tensors that nobody looks at.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import ringspan
from ringspan.errors import RingspanError
from ringspan.geometry import Mask
from ringspan.kernels import KERNELS
from ringspan.strategies import STRATEGIES
from ringspan.transformer.hook import attention_forward
from ringspan.transport import InProcessTransport, Parcel

PAGE = Path(__file__).parent / "refusals.md"
RANKS, RANK, LENGTH, HEADS, KV_HEADS = 4, 1, 16, 4, 2


class _Nothing:
    def wait(self) -> None:
        """Nothing arrives."""


class _Accepted(Exception):
    """Something is to be sent: nothing was refused."""


class LoneRank(InProcessTransport):
    """A rank whose others say what it says and send nothing.

    Args:
        to_the_end: whether to go on when the first tensor is sent.
    """

    def __init__(self, to_the_end: bool) -> None:
        self.rank, self.size, self._to_the_end = RANK, RANKS, to_the_end
        self._bytes_sent: Counter[int] = Counter()

    def exchange(self, sends: Sequence[Parcel], receives: Sequence[Parcel], lane: int = 0) -> Any:
        """Nothing is sent, and what arrives is zero."""
        if not self._to_the_end:
            raise _Accepted
        for tensor, _ in receives:
            tensor.zero_()
        return _Nothing()

    def gather_objects(self, mine: object) -> list:
        """All say the same."""
        return [mine] * self.size

    def all_reduce(self, tensor: Tensor, operation: str = "sum") -> None:
        """The others add nothing."""


def _even(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return (q_idx + kv_idx) % 2 == 0


def _strategies() -> dict[str, tuple[str, dict[str, int | str]]]:
    found: dict[str, tuple[str, dict[str, int | str]]] = {name: (name, {}) for name in (*STRATEGIES, "auto")}
    found["two_dimensional"] = ("two_dimensional", {"ulysses": 2})
    found["two_dimensional, context_first"] = ("two_dimensional", {"ulysses": 2, "placement": "context_first"})
    found["two_dimensional around ring_self_attention"] = ("two_dimensional", {"ulysses": 2, "inner": "ring_self_attention"})
    return found


MASKS: dict[str, Mask] = {
    "causal": ringspan.causal(),
    "full": ringspan.full(),
    "window": ringspan.sliding_window(3),
    "two-sided window": ringspan.sliding_window(3, 2),
    "documents": ringspan.causal() & ringspan.documents([0, 5, 11, LENGTH]),
    "prefix": ringspan.prefix_lm(4),
    "blocks": ringspan.block_sparse(4, [[row >= column for column in range(4)] for row in range(4)]),
    "mask_mod": ringspan.causal() & ringspan.mask_mod(_even),
}

FEATURES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "softcap": {"softcap": 20.0},
    "sinks": {"sinks": torch.zeros(HEADS)},
    "lse gradient": {"return_lse": True},
    "softcap + lse gradient": {"softcap": 20.0, "return_lse": True},
}

AXES: dict[str, Mapping[str, Any]] = {
    "strategy": _strategies(),
    "layout": {name: name for name in ringspan.layouts},
    "mask": MASKS,
    "with": FEATURES,
    "kernel": {name: name for name in ("auto", *KERNELS)},
}
"""What is combined with what; the names are the words of the table."""

Combination = tuple[str, ...]
"""A name of each axis, in the order of `AXES`."""

Reason = tuple[str, str, str]
"""What an error says: found, rule, and what to try."""


def attempt(combination: Combination) -> Reason | None:
    """Why `combination` is refused, or None where it runs, forward and backward."""
    named, layout, mask, feature, kernel = combination
    strategy, options = AXES["strategy"][named]
    keywords = FEATURES[feature]
    differentiated = "return_lse" in keywords
    try:
        context = ringspan.ContextParallel(LoneRank(differentiated), strategy=strategy, layout=layout, kernel=kernel, **options)
        sequence = context.sequence(LENGTH, MASKS[mask])
        shapes = [(1, sequence.shard_length, heads, 8) for heads in (HEADS, KV_HEADS, KV_HEADS)]
        q, k, v = (torch.zeros(shape, requires_grad=differentiated) for shape in shapes)
        result = sequence.attention(q, k, v, **keywords)
        if differentiated:
            torch.stack([tensor.sum() for tensor in result]).sum().backward()
    except RingspanError as error:
        return error.found, error.rule, error.nearest
    except _Accepted:
        pass
    return None


def combinations() -> Iterator[Combination]:
    """All of them."""
    yield from product(*AXES.values())


@dataclass(frozen=True)
class Row:
    """Combinations that are refused for one reason: for each axis its names, all of whose products are refused."""

    names: tuple[tuple[str, ...], ...]
    reason: Reason

    def holds(self, combination: Combination) -> bool:
        """Whether this row speaks of `combination`."""
        return all(name in names for name, names in zip(combination, self.names, strict=True))


def rows(refused: Mapping[Combination, Reason]) -> list[Row]:
    """`refused` in few rows: each is a product of names all of which are refused, for its reason or, where several apply, another's."""
    found: list[Row] = []
    for reason in dict.fromkeys(refused.values()):
        left = {combination for combination, why in refused.items() if why == reason}
        for names in _products(left, refused):
            found.append(Row(names, reason))
    return sorted(found, key=lambda row: (row.reason, row.names))


def _products(left: set[Combination], refused: Mapping[Combination, Reason]) -> Iterator[tuple[tuple[str, ...], ...]]:
    names = tuple(tuple(name for name in axis if any(one[at] == name for one in left)) for at, axis in enumerate(AXES.values()))
    if all(combination in refused for combination in product(*names)):
        yield names
        return
    # No product: split along the axis that leaves the fewest rows.
    choices = []
    for at, axis in enumerate(names):
        if len(axis) > 1:
            parts = [{one for one in left if one[at] == name} for name in axis]
            choices.append(_joined([rest for part in parts for rest in _products(part, refused)], at))
    yield from min(choices, key=len)


def _joined(found: list[tuple[tuple[str, ...], ...]], at: int) -> list[tuple[tuple[str, ...], ...]]:
    """Rows that differ in one axis alone, as one."""
    merged: dict[tuple, list[str]] = {}
    for names in found:
        merged.setdefault((*names[:at], *names[at + 1 :]), []).extend(names[at])
    return [(*others[:at], tuple(own), *others[at:]) for others, own in merged.items()]


def _cell(axis: str, names: tuple[str, ...]) -> str:
    every = tuple(AXES[axis])
    if names == every:
        return "any"
    if len(names) > len(every) / 2:
        return "any but " + ", ".join(name for name in every if name not in names)
    return ", ".join(names)


# ---- calls under other names, and what else is asked of a sequence --------------------------------------------------------------------


def _tensors(rows_of: int = LENGTH // RANKS, axes: str = "bshd") -> list[Tensor]:
    sizes = {"b": 1, "s": rows_of, "h": 0, "d": 8}
    made = []
    for heads in (HEADS, KV_HEADS, KV_HEADS):
        sizes["h"] = heads
        made.append(torch.zeros([sizes[axis] for axis in axes]))
    return made


def _varlen(borders_of_keys: list[int], dropout_p: float) -> Tensor:
    q, k, v = _tensors(axes="shd")
    return ringspan.attention_varlen(q, k, v, [0, LENGTH], borders_of_keys, dropout_p=dropout_p, group=LoneRank(False))


def _leaves() -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (tensor.requires_grad_() for tensor in _tensors())
    return q, k, v


def _second_gradient() -> Any:
    q, k, v = _leaves()
    out = ringspan.ContextParallel(LoneRank(True)).sequence(LENGTH).attention(q, k, v)
    return torch.autograd.grad(out.sum(), q, create_graph=True)


def _sequence(mask: Mask | None = None, length: int = LENGTH, **how: Any) -> ringspan.Sequence:
    return ringspan.ContextParallel(LoneRank(False), **how).sequence(length, mask)


CALLS: dict[str, Callable[[], Any]] = {
    "`attention(dropout_p=0.1)`": lambda: ringspan.attention(*_tensors(), dropout_p=0.1, group=LoneRank(False)),
    "`attention(alibi_slopes=…)`": lambda: ringspan.attention(*_tensors(), alibi_slopes=torch.zeros(HEADS), group=LoneRank(False)),
    "`attention_varlen(dropout_p=0.1)`": lambda: _varlen([0, LENGTH], 0.1),
    "`attention_varlen` with other borders for keys": lambda: _varlen([0, 5, LENGTH], 0.0),
    "`scaled_dot_product_attention(dropout_p=0.1)`": lambda: ringspan.scaled_dot_product_attention(
        *_tensors(axes="bhsd"), dropout_p=0.1, enable_gqa=True, group=LoneRank(False)
    ),
    "`scaled_dot_product_attention(attn_mask=…)`": lambda: ringspan.scaled_dot_product_attention(
        *_tensors(axes="bhsd"), attn_mask=torch.ones(4, 16, dtype=torch.bool), enable_gqa=True, group=LoneRank(False)
    ),
    "`attention` by kernel `torch_cpu` with a scale of −0.5": lambda: _sequence(kernel="torch_cpu").attention(*_leaves(), -0.5),
    "a gradient with `create_graph=True`": lambda: _second_gradient(),
    "`decode` of tensors that require a gradient": lambda: _sequence().context.decode(*_leaves()),
    "`shard_batch` with padding on the left": lambda: _sequence().shard_batch(_padded(torch.arange(LENGTH) >= 3)),
    "`shard_batch` with padding under mask full": lambda: _sequence(ringspan.full()).shard_batch(_padded(torch.arange(LENGTH) < 12)),
    "`shard_batch` with labels at padding": lambda: _sequence().shard_batch(
        {**_padded(torch.arange(LENGTH) < 12), "labels": torch.zeros(1, LENGTH, dtype=torch.int64)}
    ),
    "`shard_batch` of fewer tokens than ranks": lambda: _sequence(length=3).shard_batch(
        {"input_ids": torch.zeros(1, 3, dtype=torch.int64)}
    ),
    "a model that is given no `position_ids`": lambda: _attention_of_a_model(torch.arange(LENGTH // RANKS)[None]),
    "a model with layers of another kind": lambda: _attention_of_a_model(_sequence().positions[None], ["linear_attention"]),
    "`shard_batch` with a key that it does not know": lambda: _sequence().shard_batch(
        {"input_ids": torch.zeros(1, LENGTH, dtype=torch.int64), "token_type_ids": torch.zeros(1, LENGTH)}
    ),
}
"""What is asked, and the call that asks it."""


def _attention_of_a_model(position_ids: Tensor, layer_types: list[str] | None = None) -> Any:
    q, k, v = _tensors(axes="bhsd")
    module: Any = torch.nn.Module()
    module.config = SimpleNamespace(layer_types=layer_types)
    return attention_forward(module, q, k, v, None, ringspan_sequence=_sequence(), position_ids=position_ids)


def _padded(kept: Tensor) -> dict[str, Tensor]:
    return {"input_ids": torch.zeros(1, LENGTH, dtype=torch.int64), "attention_mask": kept.long()[None]}


def call_rows() -> list[tuple[str, Reason]]:
    """Each of `CALLS` with the reason that it is refused for.

    Raises:
        AssertionError: where one is no longer refused: it has no place on the page.
    """
    found = []
    for asked, call in CALLS.items():
        try:
            call()
        except RingspanError as error:
            found.append((asked, (error.found, error.rule, error.nearest)))
        else:
            raise AssertionError(f"{asked} is not refused any more")
    return found


# ---- the page -------------------------------------------------------------------------------------------------------------------------


def _sentence(reason: Reason) -> str:
    found, rule, _ = reason
    return ". ".join(_capitalised(part) for part in (found, rule) if part).replace("|", "\\|")


def _capitalised(text: str) -> str:
    """`text` as a sentence; names stay as they are."""
    return text[0].upper() + text[1:] if text.split()[0].isalpha() else text


def refusals() -> dict[Combination, Reason]:
    """Every combination that is refused, by trying all."""
    tried = ((combination, attempt(combination)) for combination in combinations())
    return {combination: reason for combination, reason in tried if reason is not None}


def page(refused: Mapping[Combination, Reason]) -> str:
    """The text of docs/refusals.md."""
    total = sum(1 for _ in combinations())
    lines = [
        "# What is refused, and why",
        "",
        "Written by `python docs/generate_refusals.py` by trying; do not edit. A refusal is raised on every rank and before anything is",
        "sent. One comes only in the backward, where it is asked for: a gradient through lse with heads of more than 120 under `cudnn`,",
        "or 248 under `flash2`, which have no room for the 8 columns that carry it.",
        "",
        "## Combinations",
        "",
        f"Tried on CPU tensors in float32, with {HEADS} query and {KV_HEADS} key heads on {RANKS} ranks:",
        f"{' × '.join(str(len(axis)) for axis in AXES.values())} = {total:,} combinations of {', '.join(AXES)}.",
        f"{total - len(refused):,} run; {len(refused):,} are refused, all of them for these reasons. A combination may stand in two rows.",
        "Values that are wrong in themselves (a window that does not divide, borders that do not rise, ranks that disagree) are refused",
        "with errors of their own and are not listed.",
        "",
        f"| {' | '.join(AXES)} | refused, because | try |",
        f"|{'---|' * (len(AXES) + 2)}",
    ]
    for row in rows(refused):
        cells = [_cell(axis, names) for axis, names in zip(AXES, row.names, strict=True)]
        lines.append(f"| {' | '.join(cells)} | {_sentence(row.reason)} | `{row.reason[2]}` |")
    lines += ["", "Names in the table: " + "; ".join(f"{name} `{mask}`" for name, mask in MASKS.items() if name != str(mask)) + "."]
    lines += ["", "## Calls", "", "| asked for | refused, because | try |", "|---|---|---|"]
    lines += [f"| {asked} | {_sentence(reason)} | `{reason[2]}` |" for asked, reason in call_rows()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Writes the page."""
    PAGE.write_text(page(refusals()), encoding="utf-8")
    print(f"wrote {PAGE.name}")


if __name__ == "__main__":
    main()
