"""Every strategy between real processes: one launch of three ranks for all cases."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.strategies.combinations import MASKS, VARIANTS
from tests.strategies.ranks import RANKS, cases
from tests.strategies.test_exactness import expected
from tests.support.errors import BUDGETS, assert_close
from tests.support.processes import results, run_processes
from tests.support.split import assemble


def test_every_strategy_equals_dense_attention_over_gloo(tmp_path: Path):
    by_rank = results(run_processes(RANKS, "tests.strategies.ranks:attend", tmp_path, timeout=120))
    for case, parts in zip(cases(), zip(*by_rank, strict=True), strict=True):
        combination, heads, features = case
        _, exact = expected(combination.mask, combination.length, heads, features)
        assert_close(assemble(list(parts), combination.length), exact, BUDGETS[torch.float64], f"{combination}, {heads}, {features}")
        if "dlse" not in features:
            assert {link: size for part in parts for link, size in part.sent.items()} == parts[0].promised, str(case)


def test_the_cases_hold_every_strategy_and_every_mask():
    assert {combination.variant for combination, *_ in cases()} == set(VARIANTS)
    assert {combination.mask for combination, *_ in cases()} == set(MASKS)
