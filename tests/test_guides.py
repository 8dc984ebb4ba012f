"""Guides and README count what is so: the numbers of their tables, the masks that they draw, what they say is refused."""

from __future__ import annotations

import itertools
import re
from typing import get_type_hints

import torch

import ringspan
from ringspan.cli.train import command
from ringspan.errors import RingspanError
from ringspan.geometry import MASK_FORMS, make_layout, parse_mask
from ringspan.strategies import STRATEGIES, link_bytes, make_schedules
from ringspan.training.model import PRESETS, default_learning_rate
from ringspan.verify import allowed_pairs
from ringspan.viz.study import piece_sizes, study
from tests.support.pages import PAGES, README, ROOT, blocks, rows, section

SIZES = piece_sizes(heads=32, kv_heads=8, head_dim=128, dtype_bytes=2)
"""What the tables of the gallery count bytes for."""


def mebibytes(count: float) -> str:
    return f"{count / 2**20:,.0f}"


def test_the_gallery_counts_what_the_schedules_count():
    said = rows(section(ROOT / "docs" / "gallery.md", "Side by side"))
    counted = []
    for strategy in STRATEGIES:
        shown = study(strategy, layout="zigzag", mask="causal", length=65536, num_ranks=8, sizes=SIZES)
        sent = [sum(shown.link_bytes[direction].values()) for direction in ("forward", "backward")]
        visiting = [max(shown.visiting_bytes(direction, rank) for rank in range(8)) for direction in ("forward", "backward")]
        idle = f"{100 * shown.idle_fraction('forward'):.1f}%"
        steps = f"{shown.schedule('forward').num_steps}, {shown.schedule('backward').num_steps}"
        counted.append([f"`{strategy}`", *map(mebibytes, sent), *map(mebibytes, visiting), steps, idle])
    assert said == counted


def test_what_direct_saves_is_what_the_schedules_say():
    said = rows(section(ROOT / "docs" / "gallery.md", "`direct`"))
    counted = []
    for text, layout, num_ranks in [(row[0].strip("`"), row[1].strip("`"), int(row[2])) for row in said]:
        mask = parse_mask(text)
        made = make_layout(layout, 65536, num_ranks)
        row = [f"`{text}`", f"`{layout}`", str(num_ranks)]
        for direction in ("forward", "backward"):
            ring, direct = (
                sum(link_bytes(make_schedules(strategy, made, mask), made, SIZES, direction).values()) for strategy in ("ring", "direct")
            )
            row += [mebibytes(ring), mebibytes(direct), f"{100 * (1 - direct / ring):.1f}%"]
        counted.append(row)
    assert said and said == counted


def test_the_masks_are_drawn_as_they_are():
    drawn = [block for block in blocks(ROOT / "docs" / "masks.md") if block.language == "text" and not block.follows]
    for block in drawn:
        text, *drawing = block.text.splitlines()
        allowed = allowed_pairs(parse_mask(text), len(drawing))
        assert drawing == [" ".join(".x"[bool(pair)] for pair in row) for row in allowed], f"masks.md, line {block.line}"
    names = {part.split(":")[0] for block in drawn for part in block.text.splitlines()[0].split("&")}
    assert names == set(MASK_FORMS), "every mask is drawn"


def test_the_only_layout_that_a_strategy_refuses_is_the_one_that_the_readme_names():
    refused = set()
    for strategy, layout, num_ranks in itertools.product(STRATEGIES, ringspan.layouts, range(1, 9)):
        try:
            make_schedules(strategy, make_layout(layout, 61, num_ranks), ringspan.causal())
        except RingspanError:
            refused.add((strategy, layout))
    assert refused == {("two_dimensional", "striped")}
    assert "`two_dimensional` with layout `striped`" in section(README, "What is refused, and why")


def test_the_only_strategy_that_refuses_softcap_and_sinks_is_the_one_that_the_readme_names():
    refused = set()
    q, k, v = torch.randn(3, 1, 5, 2, 8).unbind()
    for strategy, more in itertools.product(STRATEGIES, ({"softcap": 2.0}, {"sinks": torch.zeros(2)})):
        try:
            ringspan.ContextParallel(strategy=strategy).sequence(5).attention(q, k, v, **more)
        except RingspanError:
            refused.add((strategy, *more))
    assert refused == {("ring_self_attention", "softcap"), ("ring_self_attention", "sinks")}
    assert "`ring_self_attention` with a softcap or sinks" in section(README, "What is refused, and why")


def test_the_learning_rates_that_are_named_are_those_that_a_run_takes():
    rates = {name: preset.learning_rate for name, preset in PRESETS.items()}
    guide, offered = section(ROOT / "docs" / "training.md", "A step"), get_type_hints(command, include_extras=True)["learning_rate"]
    for name, rate in rates.items():
        assert f"{written(rate)} for `{name}`" in guide
        assert re.search(rf"{written(rate)} (for )?{name}", offered.__metadata__[0].help)
    folder = default_learning_rate("./a-folder")
    assert f"{written(folder)} for a model in a folder" in guide and f"{written(folder)} for a folder" in offered.__metadata__[0].help


def written(rate: float) -> str:
    return f"{rate:.0e}".replace("e-0", "e-")


def test_every_test_that_a_guide_names_is_there():
    for page in PAGES:
        for name in re.findall(r"`(tests/[\w/.]+)`", page.read_text(encoding="utf-8")):
            assert (ROOT / name).exists(), f"{page.name} names {name}"
