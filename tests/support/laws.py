"""The laws as checks that raise AssertionError: the tests of tests/laws try them on many sizes, and prove on broken code that they fail."""

from __future__ import annotations

from itertools import permutations

import torch
from torch import Tensor

import ringspan
from ringspan.attention.program import resolve
from ringspan.geometry import Layout, Tile
from ringspan.kernels import KERNELS, merge_
from ringspan.strategies import make_schedules
from tests.support.dense import dense, make_tensors
from tests.support.errors import assert_close
from tests.support.masks import EXAMPLES
from tests.support.split import Split, split_attention

Partial = tuple[Tensor, Tensor]
"""`out [rows, batch, heads, head_dim]` and `lse [rows, batch, heads]`."""


def identity(rows: int, batch: int, heads: int, head_dim: int, dtype: torch.dtype = torch.float64) -> Partial:
    """The partial result of no keys."""
    return torch.zeros(rows, batch, heads, head_dim, dtype=dtype), torch.full((rows, batch, heads), float("-inf"), dtype=dtype)


def merged(*partials: Partial) -> Partial:
    """Left to right."""
    out, lse = (tensor.clone() for tensor in partials[0])
    for other_out, other_lse in partials[1:]:
        merge_(out, lse, [(0, other_out, other_lse)])
    return out, lse


def check_merging(partials: list[Partial], budget: float) -> None:
    """Law 1. In every order and grouping the same, the identity changes nothing, rows that are empty everywhere stay zero and −inf."""
    expected = merged(*partials)
    for order in permutations(partials):
        _assert_same(merged(*order), expected, budget)
        _assert_same(merged(order[0], merged(*order[1:])), expected, budget)
    nothing = identity(*partials[0][0].shape, dtype=partials[0][0].dtype)
    for partial in partials:
        _assert_same(merged(nothing, partial), partial, 0.0)
        _assert_same(merged(partial, nothing), partial, 0.0)
    empty = torch.stack([torch.isneginf(lse) for _, lse in partials]).all(0)
    assert torch.equal(torch.isneginf(expected[1]), empty), "a row is empty where all its parts are, and nowhere else"
    assert not expected[0][empty].any(), "an empty row is zero"


def _assert_same(found: Partial, expected: Partial, budget: float) -> None:
    for one, other in zip(found, expected, strict=True):
        infinite = torch.isneginf(other)
        assert torch.equal(torch.isneginf(one), infinite), "an lse is −inf in one and not in the other"
        difference = (one - other).masked_fill(infinite, 0.0).abs()
        assert bool((difference <= budget).all()), f"differs by {float(difference.max())} (budget {budget})"


def check_sharding(layout: Layout, weights: tuple[float, ...] | None, dim: int) -> None:
    """Law 2, and that the gradient of `unshard(shard(x))` is what each rank asks, summed over the ranks."""
    shape = [2, 3, 2]
    shape.insert(dim, layout.length)
    whole = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    asked = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def run(group: object) -> tuple[Tensor, Tensor]:
        context = ringspan.ContextParallel(group, layout=layout.name, weights=weights)
        sequence = context.sequence(layout.length)
        x = whole.clone().requires_grad_()
        again = sequence.unshard(sequence.shard(x, dim), dim)
        (again * asked * (context.rank + 1)).sum().backward()
        assert x.grad is not None
        context.transport.all_reduce(x.grad)
        return again.detach(), x.grad

    for again, gradient in ringspan.run_in_process(layout.num_ranks, run):
        assert torch.equal(again, whole), "unshard(shard(x)) is x"
        expected = asked * sum(range(1, layout.num_ranks + 1))
        torch.testing.assert_close(gradient, expected, rtol=1e-14, atol=1e-14)


def tile_pairs(tile: Tile) -> Tensor:
    """The allowed pairs of a tile as `[pairs, 2]` local indices, by looking at every one."""
    i, j = torch.meshgrid(torch.arange(tile.num_queries), torch.arange(tile.num_keys), indexing="ij")
    allowed = torch.ones_like(i, dtype=torch.bool)
    allowed &= True if tile.low is None else i - j >= tile.low
    allowed &= True if tile.high is None else i - j <= tile.high
    return torch.stack((i[allowed] + tile.q_start, j[allowed] + tile.k_start), 1)


def count_pairs(layout: Layout, launches: list[tuple[int, int, Tile]]) -> Tensor:
    """`[length, length]`: how often each pair of global positions is in `launches`, which are (owner of q, owner of k, tile)."""
    positions = [torch.tensor(layout.positions(rank), dtype=torch.int64) for rank in range(layout.num_ranks)]
    counts = torch.zeros(layout.length, layout.length, dtype=torch.int64)
    for q_owner, kv_owner, tile in launches:
        pairs = tile_pairs(tile)
        assert len(pairs) == tile.pairs, f"{tile} has {len(pairs)} pairs and says {tile.pairs}"
        index = (positions[q_owner][pairs[:, 0]], positions[kv_owner][pairs[:, 1]])
        counts.index_put_(index, torch.ones(len(pairs), dtype=torch.int64), accumulate=True)
    return counts


def check_pairs(strategy: str, layout: Layout, mask_name: str) -> None:
    """Law 3, for what the executor launches, forward and backward, with each kernel: after every cut into shapes that it computes."""
    example = EXAMPLES[mask_name]
    mask = example.make(layout.length)
    schedules = make_schedules(strategy, layout, mask)
    allowed = example.allowed(layout.length)
    for kernel in {kernel.shapes: kernel for kernel in KERNELS.values()}.values():
        if (mask_name == "mask_mod" and "mask_mod" not in kernel.features) or ("window" in mask_name and "window" not in kernel.features):
            continue
        for schedule in (schedules.forward, schedules.backward):
            programs = [resolve(schedule, schedules.layout, mask, kernel.shapes, rank) for rank in range(schedule.num_ranks)]
            launches = [launch for program in programs for step in program.steps for launch in step.launches]
            # Keys and values that travel apart are attended apart, each once.
            for kind in {launch.kind for launch in launches} or {"kv"}:
                alike = [launch for launch in launches if launch.kind == kind]
                counts = count_pairs(schedules.layout, [(launch.q_owner, *block) for launch in alike for block in launch.blocks])
                _check_counts(counts, allowed, mask.mod is None, f"{kernel.name}, {schedule.direction}, {kind}")


def _check_counts(counts: Tensor, allowed: Tensor, exactly: bool, what: str) -> None:
    """A mask with a function of its own is asked inside the kernel; the regions around it must be launched once."""
    if exactly:
        assert torch.equal(counts, allowed.long()), f"{what}: {_first_wrong(counts, allowed)}"
    else:
        assert counts.max() <= 1 and bool((counts[allowed] == 1).all()), what


def _first_wrong(counts: Tensor, allowed: Tensor) -> str:
    q, k = (counts != allowed.long()).nonzero()[0].tolist()
    return f"query {q} × key {k} is computed {int(counts[q, k])} times, and the mask says {bool(allowed[q, k])}"


def check_attention(split: Split, mask_name: str, length: int, budget: float, **sizes: object) -> None:
    """Law 4: out, lse, dq, dk and dv of the split attention are those of dense attention in float64."""
    tensors = make_tensors(length, **sizes)  # type: ignore[arg-type]
    found, _ = split_attention(split, tensors)
    exact = dense(tensors, EXAMPLES[mask_name].allowed(length), scale=split.scale, softcap=split.softcap, sinks=split.sinks)
    assert_close(found, exact, budget, f"{split}, length {length}, {sizes}")


def check_bytes(split: Split, length: int, **sizes: object) -> None:
    """Law 7: on every link the bytes that the transport counted are those that the schedule promised."""
    _, parts = split_attention(split, make_tensors(length, **sizes))  # type: ignore[arg-type]
    sent = {link: size for part in parts for link, size in part.sent.items()}
    assert sent == parts[0].promised, f"sent {sent}, promised {parts[0].promised}"
    assert all(part.promised == parts[0].promised for part in parts)
