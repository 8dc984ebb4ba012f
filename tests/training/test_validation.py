"""The same held-out tokens given less and more before them: which are cut from where, and what a model makes of them."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ringspan.attention.loss import IGNORE_INDEX
from ringspan.cli.train_rank import said_by_context
from ringspan.geometry import causal
from ringspan.training.batches import Pass, context_windows, cut_into_passes, cut_into_windows
from ringspan.training.model import build_model
from ringspan.training.trainer import Trainer
from ringspan.training.validation import parts_of
from tests.support.models import with_attention
from tests.training.support import write_text
from tests.training.trainers import take_steps

IN_FLOAT32 = 3e-6
"""Sums over windows, rows and ranks in another order. Measured: 3e-7."""


@pytest.mark.parametrize(
    ("context", "shortest", "expected"),
    [
        (2, 16, [2]),
        (29, 16, [29]),
        (31, 16, [16, 31]),
        (61, 16, [16, 30, 61]),
        (61, 24, [30, 61]),
        (100, 16, [26, 50, 100]),
        (1024, 16, [16, 32, 64, 128, 256, 512, 1024]),
        (65536, 16, [512, 1024, 2048, 4096, 8192, 16384, 32768, 65536]),
    ],
)
def test_windows_double_up_to_the_context(context: int, shortest: int, expected: list[int]):
    assert context_windows(context, shortest) == expected


@pytest.mark.parametrize("context", [31, 32, 61, 95, 100, 127, 1000, 1024])
def test_every_window_has_the_same_targets_each_once_and_half_a_window_before_them(context: int):
    rows = torch.arange(2 * context).view(2, context)
    (whole,) = cut_into_passes(rows, batch_size=2, mask=causal())
    targets = rows[:, context - context // 2 :].flatten().tolist()
    for window in context_windows(context):
        part = cut_into_windows(whole, window)
        assert part.ids.shape[1] == window and part.position_ids is None
        assert bool((part.ids.diff(dim=1) == 1).all()), "a window is a stretch of its row"
        assert part.ids[:, 0].remainder(context).add(window).max() <= context, "it does not reach into the next row"
        labelled = part.labels != IGNORE_INDEX
        assert torch.equal(part.labels[labelled], part.ids[labelled])
        assert sorted(part.labels[labelled].tolist()) == targets
        before = labelled.nonzero()[:, 1]
        assert -(-window // 2) <= before.min() and before.max() == window - 1
        # About as much to compute as the plain rows.
        assert part.ids.numel() <= rows.numel() + 2 * 2 * len(part.ids)
    assert torch.equal(part.ids, rows)


def test_what_is_not_to_be_predicted_is_not_predicted_from_a_window_either():
    rows = torch.arange(64).view(1, 64)
    labels = rows.masked_fill(rows == 50, IGNORE_INDEX)
    whole = Pass(ids=rows, labels=labels, position_ids=None, mask=causal())
    part = cut_into_windows(whole, 16)
    assert sorted(part.labels[part.labels != IGNORE_INDEX].tolist()) == [*range(32, 50), *range(51, 64)]
    blank = cut_into_windows(replace(whole, labels=torch.full_like(rows, IGNORE_INDEX), is_blank=True), 16)
    assert blank.is_blank and bool((blank.labels == IGNORE_INDEX).all())


# ---- the trainer of `ringspan train` ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt", num_words=2000)


Measured = tuple[Any, float, dict[int, float] | None]
"""The losses by context, that of the plain rows' last halves, and where one rank has it all, the former by hand."""


def measured(out: Path, text: Path, ranks: int, **given: Any) -> list[Measured]:
    """What each rank measures after a step."""

    def before(trainer: Trainer, step: int) -> None:
        if step != 1:
            return
        held_out = trainer._held_out()
        parts = parts_of(trainer.parallel, held_out.passes, held_out.device)
        first = held_out._context - held_out._context // 2
        # The token at `first` is predicted at the position before it, and at the last position nothing is.
        _, halves = trainer.parallel.losses_by_position(parts, [0, first - 1, held_out._context])
        found[trainer.ranks.rank] = (trainer.validate_by_context(), halves, by_hand(trainer) if ranks == 1 else None)
        assert trainer.model.training

    found: dict[int, Measured] = {}
    take_steps(out, ranks, data=str(text), steps=2, before=before, **{"learning_rate": 0.03, "warmup_steps": 1, **given})
    return [found[rank] for rank in range(ranks)]


@torch.no_grad()
def by_hand(trainer: Trainer) -> dict[int, float]:
    """Block by block of each row, through transformers' own model with eager attention."""
    model = build_model("pico", vocabulary_size=256, context=trainer.config.context, seed=3)
    model.load_state_dict(trainer.model.state_dict())
    model = with_attention(model, "eager").eval()
    losses: dict[int, list[float]] = {}
    for whole in trainer._held_out().passes:
        row = whole.ids[0]
        context, half = len(row), len(row) // 2
        for window in context_windows(context):
            for stop in range(context, context - half, -(window // 2)):
                begin, first = stop - window, max(stop - window // 2, context - half)
                logits = model(row[None, begin:stop], use_cache=False).logits[0]
                each = F.cross_entropy(logits[first - begin - 1 : -1].float(), row[first:stop], reduction="none")
                losses.setdefault(window, []).extend(each.tolist())
    assert len({len(each) for each in losses.values()}) == 1
    return {window: sum(each) / len(each) for window, each in losses.items()}


def test_losses_by_context_are_those_of_the_windows_on_any_number_of_ranks_and_at_the_whole_context_the_plain_ones(
    text: Path, tmp_path: Path
):
    ((alone, halves, expected),) = measured(tmp_path / "1", text, 1)
    assert [window for window, _ in alone] == [16, 30, 61]
    assert dict(alone) == pytest.approx(expected, rel=IN_FLOAT32)
    assert alone[-1][1] == pytest.approx(halves, rel=IN_FLOAT32)
    assert min(abs(a - b) for (_, a), (_, b) in combinations(alone, 2)) > 1e-4, "what is before a token matters, or nothing is shown here"
    for ranks, given in ((2, {}), (3, {"layout": "striped", "strategy": "all_gather"})):
        for found, same, _ in measured(tmp_path / f"{ranks}", text, ranks, **given):
            assert dict(found) == pytest.approx(dict(alone), rel=1e-5)
            assert same == pytest.approx(halves, rel=1e-5)


def test_where_a_model_cannot_see_further_than_the_shortest_window_all_windows_are_alike(text: Path, tmp_path: Path):
    """Under a sliding window of 2 the second of two layers sees 4 back: 8 tokens are as good as 60, and the same tokens are scored."""
    for found, halves, _ in measured(tmp_path / "run", text, 2, mask="window:2"):
        assert [window for window, _ in found] == [16, 30, 61]
        assert [loss for _, loss in found] == pytest.approx([halves] * 3, rel=IN_FLOAT32)


@pytest.mark.parametrize(
    "given",
    [
        {"documents": "packed", "separator": 10},
        {"mask": "causal&documents:20,41"},
        {"mask": "causal&blocks:16:1000/1100/0110/1011"},
        {"context": 29},
    ],
    ids=str,
)
def test_where_a_token_cannot_be_given_less_with_all_else_the_same_nothing_is_measured(given: dict[str, Any], text: Path, tmp_path: Path):
    ((found, *_),) = measured(tmp_path / "run", text, 1, **given)
    assert found is None


def test_ranks_that_share_a_row_have_two_tokens_of_each_window(text: Path, tmp_path: Path):
    for found, *_ in measured(tmp_path / "run", text, 9, batch_size=1, validation_tokens=61):
        assert [window for window, _ in found] == [30, 61]


def test_the_losses_are_said_in_a_line():
    said = said_by_context([(16, 2.1044), (32, 2.0), (1024, 1.7421)], "byte")
    assert said == "the same bytes with fewer than 16 before them 2.104, 32: 2.000, 1,024: 1.742"
