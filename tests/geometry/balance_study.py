"""How evenly layouts share packed documents, measured on real lengths: what docs/balance.md shows. To write it anew:

python -m tests.geometry.balance_study
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from statistics import mean

from ringspan.geometry import Workload, causal, documents, make_layout, tiles
from ringspan.schedule import PieceBytes
from ringspan.strategies import link_bytes, make_schedules

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "balance.md"

LENGTHS, RANKS, LAYOUTS, SEQUENCES = (65_536, 131_072), (4, 8, 16), ("contiguous", "zigzag", "striped", "auto"), 12


@dataclass(frozen=True)
class Shared:
    """How one layout shares one packed sequence.

    Attributes:
        imbalance: the busiest rank's pairs over the mean.
        tiles: of a rank, on average.
        fetched: keys that a rank fetches, on average, as a share of the sequence.
    """

    imbalance: float
    tiles: float
    fetched: float


def document_lengths() -> list[int]:
    """Bytes of the standard library's files, by path."""
    lines = (HERE / "standard_library_lengths.txt").read_text(encoding="utf-8").splitlines()
    return [int(number) for line in lines if not line.startswith("#") for number in line.split()]


def packed(length: int) -> Iterator[tuple[int, ...]]:
    """The borders of the documents in each sequence: files in random order, one after the other, cut where a sequence ends."""
    order = document_lengths()
    random.Random(0).shuffle(order)
    borders = [0]
    for size in order:
        while size:
            taken = min(size, length - borders[-1])
            borders.append(borders[-1] + taken)
            size -= taken
            if borders[-1] == length:
                yield tuple(borders)
                borders = [0]


@lru_cache
def study() -> dict[tuple[int, int, str], list[Shared]]:
    """(length, ranks, layout) to what each of the first sequences is shared like."""
    found: dict[tuple[int, int, str], list[Shared]] = {}
    for length, ranks in product(LENGTHS, RANKS):
        for borders, _ in zip(packed(length), range(SEQUENCES), strict=False):
            for name in LAYOUTS:
                found.setdefault((length, ranks, name), []).append(_share(name, length, ranks, borders))
    return found


def _share(name: str, length: int, ranks: int, borders: tuple[int, ...]) -> Shared:
    mask = causal() & documents(borders)
    layout = make_layout(name, length, ranks, mask=mask)
    count = sum(len(tiles(layout, mask, q_rank, k_rank)) for q_rank in range(ranks) for k_rank in range(ranks))
    fetched = link_bytes(make_schedules("direct", layout, mask), layout, PieceBytes(), "forward").total() / PieceBytes().of("kv")
    return Shared(Workload(layout, mask).imbalance, count / ranks, fetched / ranks / length)


def page() -> str:
    """The text of docs/balance.md."""
    rows = []
    for length, ranks in product(LENGTHS, RANKS):
        cells = []
        for name in LAYOUTS:
            shared = study()[(length, ranks, name)]
            even = f"{mean(each.imbalance for each in shared):.2f} ({max(each.imbalance for each in shared):.2f})"
            cells.append(f"{even} · {mean(each.tiles for each in shared):.0f} · {mean(each.fetched for each in shared):.0%}")
        rows.append(f"| {length:,} | {ranks} | " + " | ".join(cells) + " |")
    table = "\n".join(rows)
    per_sequence = [mean(len(borders) - 1 for borders, _ in zip(packed(length), range(SEQUENCES), strict=False)) for length in LENGTHS]
    return _TEXT.format(table=table, sequences=SEQUENCES, first=per_sequence[0], second=per_sequence[1])


_TEXT = """# How evenly layouts share packed documents

Under a plain causal mask, zigzag gives every rank the same work. Under packed documents it does not: a long document's late queries
have many keys, a short one's few, and where they fall is an accident. `layout="auto"` looks at the mask.

What it promises: the sequence is cut into 8 chunks a rank, all of one size up to a token; every rank gets 8; and no rank has more work
than another by more than the heaviest chunk has more than the lightest. Where contiguous or zigzag is within a tenth as even, it
takes that, whose tiles are larger.

Measured on real lengths: the files of CPython 3.11.7's standard library, one byte a token, in random order, packed one after the other
and cut where a sequence ends; the first {sequences} sequences of each length, with {first:.1f} and {second:.1f} documents on average.
The mask is `causal() & documents(…)`.

Each cell: the busiest rank's pairs over the mean, averaged over sequences (and in the worst of them) · tiles of a rank · keys that a rank
fetches under strategy `direct`, as a share of the sequence.

| length | ranks | contiguous | zigzag | striped | auto |
|---|---|---|---|---|---|
{table}

A step waits for its busiest rank: with zigzag it takes 1.4 to 1.7 times as long as an even one, with `auto` 1.01 times. Striped is as even
and fetches nearly the whole sequence. What `auto` pays for evenness is smaller tiles, and twice the fetching of zigzag: where links are
slow and documents short, contiguous may be the quicker.

This page is written by `python -m tests.geometry.balance_study`, and a test holds it to what the code does.
"""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
