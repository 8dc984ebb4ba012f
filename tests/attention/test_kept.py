"""Sequences and plans are kept, and not without end."""

import torch

import ringspan
from ringspan.attention.kept import Kept
from ringspan.attention.sequence import KEPT


def test_the_last_values_asked_for_are_kept_and_the_others_made_anew():
    made: list[int] = []
    kept: Kept[int] = Kept(2)

    def get(key: int) -> int:
        return kept.get(key, lambda: made.append(key) or key)

    assert [get(key) for key in (1, 2, 1, 3, 1, 2)] == [1, 2, 1, 3, 1, 2]
    assert made == [1, 2, 3, 2]
    assert len(kept) == 2


def test_new_document_borders_at_every_step_do_not_fill_the_memory_and_stay_exact():
    def run(group) -> tuple[int, float]:
        context = ringspan.ContextParallel(group)
        worst = 0.0
        for step in range(1, KEPT + 20):
            border = 1 + step % 30 if step <= 30 else 1 + (step * 7) % 90
            mask = ringspan.causal() & ringspan.documents([0, border, 100])
            sequence = context.sequence(100, mask)
            q = torch.ones(1, sequence.shard_length, 1, 8)
            v = sequence.positions.view(1, -1, 1, 1).expand(1, -1, 1, 8).float()
            out = sequence.attention(q, q, v)
            first = torch.where(sequence.positions < border, 0, border)
            worst = max(worst, float((out[0, :, 0, 0] - (first + sequence.positions) / 2).abs().max()))
        return len(context._sequences), worst

    for kept, worst in ringspan.run_in_process(2, run):
        assert kept <= KEPT
        assert worst < 1e-4
