"""What the tiles of a ring cost beside one device's whole kernel: by shape, by number of launches, on one stream and on two.

    python3 benchmarks/tile_rates.py --lengths 2048,8192,32768 --ranks 4

A rank with a shard of S tokens computes its own causal tile and, of each visitor, half of the keys for all queries (`rows`) or all keys for
half of the queries (`columns`). All times are of CUDA graphs, in microseconds; `of ideal` is the share of the rate that one device reaches
over the whole sequence.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from ringspan.attention.accumulate import Accumulator, Partial
from ringspan.bench.graph import captured
from ringspan.geometry import Tile
from ringspan.kernels import KERNELS, Scores, rows_first
from ringspan.schedule import Piece

WARM_SECONDS, SAMPLES = 0.3, 5


def timed(work: Callable[[], object]) -> float:
    """Microseconds of a replay: the median of `SAMPLES` runs of some milliseconds, after a warm-up of all that runs."""
    replay = captured(work)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def run(repeats: int) -> float:
        start.record()
        for _ in range(repeats):
            replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3 / repeats

    once = run(3)
    run(max(1, int(WARM_SECONDS * 1e6 / once)))
    return sorted(run(max(3, int(2e4 / once))) for _ in range(SAMPLES))[SAMPLES // 2]


class Bench:
    """Tensors of one size, and the kernel over parts of them."""

    def __init__(self, name: str, most: int, heads: int, kv_heads: int, head_dim: int) -> None:
        self.kernel = KERNELS[name]
        self.shape = heads, kv_heads, head_dim
        self.q, self.k, self.v, self.dout = (
            torch.randn(1, most, number, head_dim, device="cuda", dtype=torch.bfloat16) for number in (heads, kv_heads, kv_heads, heads)
        )

    def scores(self, queries: int, keys: int, causal: bool) -> Scores:
        """Of a whole tile."""
        tile = Tile(0, queries, 0, keys, low=0) if causal else Tile(0, queries, 0, keys)
        return Scores(tile=tile, scale=self.shape[2] ** -0.5)

    def forward(self, queries: int, keys: int, causal: bool = False) -> tuple[Tensor, Tensor]:
        """out and lse."""
        return self.kernel.forward(self.q[:, :queries], self.k[:, :keys], self.v[:, :keys], self.scores(queries, keys, causal))

    def backward(self, queries: int, keys: int, out: Tensor, lse: Tensor, causal: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv."""
        return self.kernel.backward(
            self.dout[:, :queries],
            self.q[:, :queries],
            self.k[:, :keys],
            self.v[:, :keys],
            out,
            lse,
            None,
            self.scores(queries, keys, causal),
        )


def side_by_side(works: list[Callable[[], tuple[Tensor, ...]]], streams: list[torch.cuda.Stream]) -> list[tuple[Tensor, ...]]:
    """The works, each on the next stream, all after what is queued and before what follows."""
    main, results = torch.cuda.current_stream(), []
    for stream in streams:
        stream.wait_stream(main)
    for index, work in enumerate(works):
        with torch.cuda.stream(streams[index % len(streams)]):
            results.append(work())
    for stream in streams:
        main.wait_stream(stream)
    return results


def whole_pass(bench: Bench, shard: int, visits: list[tuple[int, int]], direction: str, streams: int) -> Callable[[], object]:
    """All that a rank computes: its own tile, those of its visitors, and the sums of what they give."""
    queries, keys = bench.q[:, :shard], bench.k[:, :shard]
    sides = [torch.cuda.Stream() for _ in range(streams)] if streams > 1 else []
    shapes = [(shard, shard, True), *((*visit, False) for visit in visits)]
    whole_out, whole_lse = bench.forward(shard, shard, causal=True)

    def each(one: Callable[[int, int, bool], tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, ...]]:
        """What every tile gives, launched when it is asked for, or all at once on several streams."""
        if not sides:
            return (one(*shape) for shape in shapes)
        return iter(side_by_side([partial(one, *shape) for shape in shapes], sides))

    def forward() -> object:
        sum_of_all = Partial(Piece("o", 0, 0, shard), queries, len(shapes), (0, max(visit[0] for visit in visits)))
        for (rows, _, _), (out, lse) in zip(shapes, each(bench.forward), strict=True):
            sum_of_all.add(0, rows, rows_first(out), lse.permute(2, 0, 1))
        return sum_of_all.result()

    def one_back(rows: int, columns: int, causal: bool) -> tuple[Tensor, ...]:
        return bench.backward(rows, columns, whole_out[:, :rows], whole_lse[:, :, :rows].contiguous(), causal)

    def backward() -> object:
        dq_sum = Accumulator(Piece("dq", 0, 0, shard), queries, len(shapes))
        dkv_sum = Accumulator(Piece("dkv", 0, 0, shard), keys, 2, parts=2)
        for index, ((rows, columns, _), (dq, dk, dv)) in enumerate(zip(shapes, each(one_back), strict=True)):
            dq_sum.add(0, rows, rows_first(dq))
            if index < 2:
                # Its own, and what comes home from one visit of its keys.
                dkv_sum.add(0, min(columns, shard), rows_first(dk[:, :shard]), rows_first(dv[:, :shard]))
        return dq_sum.result(), dkv_sum.result()

    return forward if direction == "forward" else backward


def table(bench: Bench, shard: int, ranks: int, direction: str) -> None:
    """Prints what each shape and each way of computing all of a rank takes."""
    half, length, others = shard // 2, shard * ranks, ranks - 1

    def tile(rows: int, columns: int, causal: bool) -> float:
        if direction == "forward":
            return timed(partial(bench.forward, rows, columns, causal))
        out, lse = bench.forward(rows, columns, causal)
        return timed(partial(bench.backward, rows, columns, out, lse, causal))

    whole = tile(length, length, True)
    ideal = whole / ranks
    print(f"\n{shard} tokens a shard, {direction}: {ideal:,.1f} us is a rank's share of one device's {whole:,.1f}")

    def say(name: str, took: float, share: float) -> None:
        print(f"  {name:28} {took:10,.1f} us  {ideal * share / took:5.2f} of ideal", flush=True)

    say("own", tile(shard, shard, True), 1 / ranks)
    for many in range(1, others + 1):
        say(f"rows x {many}", tile(shard, half * many, False), many / ranks)
        say(f"columns x {many}", tile(half, shard * many, False), many / ranks)
    for kind, shape in (("rows", (shard, half)), ("columns", (half, shard))):
        for streams in (1, 2):
            say(f"own, {others} {kind}, {streams} streams", timed(whole_pass(bench, shard, [shape] * others, direction, streams)), 1.0)
    if others > 1:
        for kind, shape in (("rows", (shard, half * others)), ("columns", (half, shard * others))):
            say(f"own, {others} {kind} in one call", timed(whole_pass(bench, shard, [shape], direction, 1)), 1.0)


def main() -> None:
    """Prints a table for each length and direction."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kernel", default="flash4")
    parser.add_argument("--lengths", default="2048,8192,32768", help="tokens of a shard")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--heads", default="32/8", help="query/KV heads")
    parser.add_argument("--head-dim", type=int, default=128)
    arguments = parser.parse_args()
    heads, kv_heads = map(int, arguments.heads.split("/"))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {arguments.kernel}, {arguments.heads} heads of {arguments.head_dim}")
    for shard in map(int, arguments.lengths.split(",")):
        bench = Bench(arguments.kernel, shard * arguments.ranks, heads, kv_heads, arguments.head_dim)
        for direction in ("forward", "backward"):
            table(bench, shard, arguments.ranks, direction)


if __name__ == "__main__":
    main()
