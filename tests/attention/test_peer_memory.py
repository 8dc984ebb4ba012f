"""Pieces through peer memory: where they lie, who signals whom, and that the results and the bytes are those of any other transport."""

from __future__ import annotations

import gc
import time
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import ringspan
from ringspan.attention import inbox as inbox_module
from ringspan.attention import peer_courier
from ringspan.attention.inbox import Inbox, Message, inbox
from ringspan.attention.plan import Plan
from ringspan.errors import RankFailure, RingspanError, UnsupportedError
from ringspan.geometry import make_layout
from ringspan.schedule import Piece, Schedule, lifetimes
from ringspan.strategies import make_schedules
from ringspan.transport import peer_memory
from tests.strategies.combinations import MASKS, VARIANTS
from tests.support.dense import dense, make_tensors
from tests.support.errors import BUDGETS, assert_close
from tests.support.poison import poisoned
from tests.support.split import Split, split_attention, weights_for

__all__ = ["poisoned"]

CARRIED = [name for name, (strategy, _) in VARIANTS.items() if strategy != "ring_self_attention"]
ROW_BYTES = {"q": (24,), "kv": (20, 20), "o": (48, 4), "do": (24, 24, 4, 4), "dq": (48,), "dkv": (40, 40)}


def schedules_of(variant: str, layout: str, mask: str, ranks: int, length: int) -> list[Schedule]:
    """Both directions."""
    strategy, options = VARIANTS[variant]
    made = MASKS[mask].make(length)
    whole = make_layout(layout, length, ranks, weights_for(layout, ranks), made)
    both = make_schedules(strategy, whole, made, **options(ranks))
    return [both.forward, both.backward]


def check_inboxes(schedule: Schedule, singles: Any = None) -> None:
    """Every receive finds what its send wrote, nothing is overwritten while somebody may read it, every signal is set and cleared once."""
    ranks = range(schedule.num_ranks)
    boxes: list[Inbox] = [inbox(schedule, rank, ROW_BYTES, singles) for rank in ranks]
    assert len({(box.nbytes, box.messages) for box in boxes}) == 1, "every rank reserves alike"
    batches_of = [
        [batch for _, batches in sorted(inbox_module.rank_batches(program).items()) for batch in batches] for program in schedule.programs
    ]
    written: dict[tuple[int, Message], dict[Piece, tuple]] = {}
    for rank, box in enumerate(boxes):
        for batch, posting in zip(batches_of[rank], box.postings, strict=True):
            assert {message.peer for message, _ in posting.written} == {send.peer for send in batch.sends}
            assert sorted(position for _, parts in posting.written for position, _ in parts) == list(range(len(batch.sends)))
            for message, parts in posting.written:
                assert (rank, message) not in written, "written once"
                written[(rank, message)] = {batch.sends[position].piece: places for position, places in parts}
                for position, places in parts:
                    send = batch.sends[position]
                    assert send.peer == message.peer
                    sizes = singles if singles is not None and (rank, send) in schedule.singles else ROW_BYTES
                    assert [place.nbytes for place in places] == [len(send.piece) * size for size in sizes[send.piece.kind]]
    for rank, box in enumerate(boxes):
        needed = dict(lifetimes(schedule.programs[rank]))
        freed_after = {message: step for step, messages in box.freed.items() for message in messages}
        assert len(freed_after) == sum(map(len, box.freed.values())), "let come once"
        held: list[tuple[int, int, int]] = []
        seen: set[Message] = set()
        for batch, posting in zip(batches_of[rank], box.postings, strict=True):
            messages = {message.peer: message for message in posting.awaited}
            assert set(messages) == {receive.peer for receive in batch.receives}
            seen |= set(posting.awaited)
            for receive, places in zip(batch.receives, posting.places, strict=True):
                message = messages[receive.peer]
                assert written[(receive.peer, Message(rank, message.index))][receive.piece] == places, "written where it is read"
                assert freed_after[message] < receive.step, "let come before it is awaited"
                for place in places:
                    assert place.offset + place.nbytes <= box.nbytes
                    for start, stop, last in held:
                        apart = stop <= place.offset or place.offset + place.nbytes <= start
                        assert apart or last <= freed_after[message], "overwritten while it may be read"
                held += [(place.offset, place.offset + place.nbytes, needed[receive]) for place in places]
        assert seen == set(freed_after), "what may come, comes"
    read = {
        (message.peer, Message(rank, message.index)) for rank, box in enumerate(boxes) for each in box.postings for message in each.awaited
    }
    assert read == set(written), "every signal is waited for, and every wait has its signal"


@pytest.mark.parametrize("variant", [name for name in CARRIED if VARIANTS[name][0] not in ("ulysses", "two_dimensional")])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped", "weighted"])
def test_nothing_is_read_elsewhere_or_overwritten_early(variant: str, layout: str):
    for ranks in (1, 2, 3, 5, 8):
        for mask in ("causal", "full", "window", "documents"):
            for schedule in schedules_of(variant, layout, mask, ranks, 4 * ranks + 3):
                check_inboxes(schedule)


def test_a_ring_reuses_its_places_and_holds_no_more_than_a_few_visitors():
    forward, backward = schedules_of("ring", "zigzag", "full", 16, 16 * 6)
    rows = 6
    assert inbox(forward, 0, ROW_BYTES).nbytes <= 3 * (rows * 40 + 2 * 256), "which it reads and passes on, which comes, and one between"
    assert inbox(backward, 0, ROW_BYTES).nbytes <= 3 * (rows * 40 + 2 * 256) + 4 * (rows * 80 + 2 * 256)


def test_results_of_one_attend_take_the_room_that_they_travel_in():
    narrow = {**ROW_BYTES, "dkv": tuple(size // 2 for size in ROW_BYTES["dkv"])}
    # On two ranks, and wherever they go straight home, every gradient that travels is one tile's; in a longer ring the first is.
    for strategy, ranks in (("ring", 2), ("direct", 4), ("ring", 4)):
        backward = schedules_of(strategy, "zigzag", "causal", ranks, 64 * ranks)[1]
        wide, less = inbox(backward, 0, ROW_BYTES).nbytes, inbox(backward, 0, ROW_BYTES, narrow).nbytes
        assert less < wide, (strategy, ranks, wide, less)
        check_inboxes(backward, narrow)


def test_places_that_are_given_away_early_are_found(monkeypatch: pytest.MonkeyPatch):
    right = inbox_module._free_place
    monkeypatch.setattr(inbox_module, "_free_place", lambda size, taken: right(size, []))
    with pytest.raises(AssertionError, match="let come before it is awaited"):
        for schedule in schedules_of("ring", "zigzag", "full", 5, 40):
            check_inboxes(schedule)


@pytest.mark.parametrize("variant", CARRIED)
@pytest.mark.parametrize(("ranks", "layout"), [(2, "zigzag"), (3, "striped"), (4, "contiguous"), (5, "weighted"), (8, "zigzag")])
def test_results_and_bytes_are_exact_through_peer_memory(variant: str, ranks: int, layout: str):
    length = 4 * ranks + 3
    tensors = make_tensors(length, heads=4, kv_heads=2, head_dim=4, seed=ranks)
    strategy, options = VARIANTS[variant]
    for mask in ("causal", "documents", "window"):
        split = Split(
            num_ranks=ranks, mask=MASKS[mask].make(length), strategy=strategy, layout=layout,
            options={**options(ranks), "transport": "peer_memory"},
        )  # fmt: skip
        found, parts = split_attention(split, tensors)
        assert_close(found, dense(tensors, MASKS[mask].allowed(length)), BUDGETS[torch.float64], str(split))
        assert {link: size for part in parts for link, size in part.sent.items()} == parts[0].promised


@pytest.mark.parametrize("batch", [1, 2])
def test_single_rows_of_keys_beside_their_values_arrive_as_they_are(batch: int):
    tensors = make_tensors(2, heads=4, kv_heads=4, head_dim=64, seed=0, batch=batch)

    def run(group):
        sequence = ringspan.ContextParallel(group, transport="peer_memory", kernel="reference").sequence(2, ringspan.full())
        q, k, v = (sequence.shard(x) for x in (tensors.q, tensors.k, tensors.v))
        # As a projection leaves them: in the one row they lie side by side, whatever the rows' stride says.
        k, v = torch.stack((k, v), 2).unbind(2) if batch == 1 else torch.stack((k, v)).unbind(0)
        return sequence.positions, sequence.attention(q, k, v)

    expected = dense(tensors, MASKS["full"].allowed(2)).out
    for positions, found in ringspan.run_in_process(2, run):
        torch.testing.assert_close(found, expected[:, positions], rtol=1e-10, atol=1e-10)


def test_a_gradient_of_lse_travels_too():
    tensors = make_tensors(23, heads=4, kv_heads=4, head_dim=4, seed=1, with_dlse=True)
    split = Split(num_ranks=3, mask=ringspan.causal(), strategy="ring", options={"rotate": "queries", "transport": "peer_memory"})
    found, _ = split_attention(split, tensors)
    assert_close(found, dense(tensors, MASKS["causal"].allowed(23)), BUDGETS[torch.float64], str(split))


@pytest.mark.parametrize("transport", ["peer_memory", "process_group"])
@pytest.mark.parametrize(
    "options", [{"strategy": "ring", "rotate": "queries"}, {"strategy": "pass_query"}, {"strategy": "ring"}, {"strategy": "ulysses"}]
)
def test_a_loss_that_uses_lse_on_one_rank_alone_has_the_gradients_of_zeros_elsewhere(transport: str, options: dict):
    tensors = make_tensors(24, heads=2, kv_heads=2, head_dim=4, seed=3, with_dlse=True)
    assert tensors.dlse is not None

    def run(group):
        sequence = ringspan.ContextParallel(group, transport=transport, kernel="reference", **options).sequence(24)
        leaves = [sequence.shard(x).detach().requires_grad_() for x in (tensors.q, tensors.k, tensors.v)]
        out, lse = sequence.attention(*leaves, return_lse=True)
        loss = (out * sequence.shard(tensors.dout)).sum()
        if group.rank == 1:
            loss = loss + (lse * sequence.shard(tensors.dlse, dim=2)).sum()
        loss.backward()
        return sequence.positions, [leaf.grad for leaf in leaves]

    parts = ringspan.run_in_process(2, run)
    only_one = torch.zeros_like(tensors.dlse)
    only_one[:, :, parts[1][0]] = tensors.dlse[:, :, parts[1][0]]
    expected = dense(replace(tensors, dlse=only_one), MASKS["causal"].allowed(24))
    for positions, gradients in parts:
        for found, whole in zip(gradients, (expected.dq, expected.dk, expected.dv), strict=True):
            torch.testing.assert_close(found, whole[:, positions], rtol=1e-10, atol=1e-10)


def test_lse_is_asked_for_by_all_ranks_or_by_none():
    def run(group):
        sequence = ringspan.ContextParallel(group).sequence(8)
        x = torch.randn(1, sequence.shard_length, 2, 4)
        sequence.attention(x, x, x, return_lse=group.rank == 0)

    with pytest.raises(RingspanError, match="return_lse"):
        ringspan.run_in_process(2, run)


def test_after_a_pass_that_an_error_left_the_next_is_refused(monkeypatch: pytest.MonkeyPatch):
    """Its signals are still set: the next pass would take them for its own, and read what is not there yet."""
    from ringspan.attention.executor import ForwardPass

    right = ForwardPass.attend
    failing = {"now": True}

    def attend(self, launch):
        if failing["now"] and launch.q_owner != launch.kv_owner:
            raise torch.OutOfMemoryError("no room for the visitor")
        right(self, launch)

    monkeypatch.setattr(ForwardPass, "attend", attend)

    def run(group):
        sequence = ringspan.ContextParallel(group, transport="peer_memory").sequence(16)
        x = torch.randn(1, sequence.shard_length, 2, 4)
        with pytest.raises(torch.OutOfMemoryError):
            sequence.attention(x, x, x)
        group.gather_objects("both are out")
        failing["now"] = False
        with pytest.raises(RingspanError, match="new process group"):
            sequence.attention(x, x, x)

    ringspan.run_in_process(2, run)


@pytest.mark.parametrize("at", ["forward", "backward"])
def test_an_attention_that_an_error_left_between_its_passes_is_not_taken_for_the_next(monkeypatch: pytest.MonkeyPatch, at: str):
    """The other ranks wait in its next exchange: what came of another one would be right for none."""
    right, failing = Plan.launched, set()

    def launched(self, direction, inputs, work):
        result = right(self, direction, inputs, work)
        if self.exchange.place == 0 and direction in failing:
            raise torch.OutOfMemoryError("no room for the result")
        return result

    monkeypatch.setattr(Plan, "launched", launched)

    def run(group):
        sequence = ringspan.ContextParallel(group, transport="peer_memory", strategy="ulysses").sequence(16)
        q, k, v = (torch.randn(1, sequence.shard_length, 2, 4, requires_grad=True) for _ in range(3))
        sequence.attention(q, k, v).sum().backward()
        group.gather_objects("both are out")
        failing.add(at)
        with pytest.raises(torch.OutOfMemoryError if group.rank == 0 else RankFailure):
            sequence.attention(q, k, v).sum().backward()
        if group.rank == 0:
            failing.clear()
            with pytest.raises(RingspanError, match="an error left the attention before this one in the middle"):
                sequence.attention(q, k, v)

    ringspan.run_in_process(2, run, timeout_seconds=5.0)


def test_an_attention_that_is_computed_again_for_its_backward_leaves_nothing_in_the_middle():
    """Checkpointing ends the second forward with an error of its own, once it has what was saved."""

    def run(group):
        sequence = ringspan.ContextParallel(group, transport="peer_memory", strategy="ulysses").sequence(16)
        x = torch.randn(1, sequence.shard_length, 2, 4, requires_grad=True)
        gradients = []
        for attention in (sequence.attention, lambda *qkv: checkpoint(sequence.attention, *qkv, use_reentrant=False)) * 2:
            gradients += torch.autograd.grad(attention(x, x, x).square().sum(), x)
        return gradients

    for first, *others in ringspan.run_in_process(2, run, timeout_seconds=5.0):
        assert all(torch.equal(first, other) for other in others)


def test_what_is_sent_when_nothing_is_computed_any_more_is_copied_at_once(monkeypatch: pytest.MonkeyPatch):
    at_once: list[list[tuple[int, ...]]] = []
    right = peer_courier.copy_all
    monkeypatch.setattr(peer_courier, "copy_all", lambda copies: (at_once.append([target.shape for target, _ in copies]), right(copies)))
    tensors = make_tensors(64, heads=4, kv_heads=2, head_dim=4, seed=0)
    split = Split(
        num_ranks=4, mask=MASKS["causal"].make(64), strategy="direct", layout="zigzag",
        options={"transport": "peer_memory", "shards_at_once": 4},
    )  # fmt: skip
    found, _ = split_attention(split, tensors)
    assert_close(found, dense(tensors, MASKS["causal"].allowed(64)), BUDGETS[torch.float64], "")
    # What is left of the gradients of keys when the last call is done goes home, from every rank, dk beside dv.
    assert len(at_once) == 4 and all(len(copies) % 2 == 0 for copies in at_once)


def test_waiting_is_counted_in_seconds_and_not_in_what_others_signal():
    # Rank 3 waits from the start, and 8,000 signals of others wake it.
    def waiting(group):
        memory = peer_memory(group, torch.device("cpu"))
        assert not isinstance(memory, str)
        if group.rank == 3:
            memory.wait([(2, 0)])
        elif group.rank == 2:
            time.sleep(1.0)
            memory.signal([(3, 0)])
        else:
            for turn in range(4000):
                memory.signal([(1 - group.rank, turn)])
                memory.wait([(1 - group.rank, turn)])
        return "done"

    assert ringspan.run_in_process(4, waiting, timeout_seconds=20.0) == ["done"] * 4


def test_nobody_leaves_a_meeting_before_all_have_come():
    came = [0] * 3

    def run(group):
        memory = peer_memory(group, torch.device("cpu"))
        assert not isinstance(memory, str)
        for turn in range(1, 300):
            if turn % 50 == group.rank:
                time.sleep(0.01)
            came[group.rank] = turn
            memory.meet()
            assert min(came) >= turn

    ringspan.run_in_process(3, run, timeout_seconds=20.0)


def test_memory_goes_with_its_ranks():
    def run(group):
        x = torch.randn(1, 8, 2, 4)
        ringspan.ContextParallel(group, transport="peer_memory").sequence(16).attention(x, x, x)
        return weakref.ref(peer_memory(group, x.device))

    memories = ringspan.run_in_process(2, run)
    gc.collect()
    assert [memory() for memory in memories] == [None, None]


def test_many_passes_of_changing_lengths_leave_no_signal_behind():
    def run(group):
        cp = ringspan.ContextParallel(group, transport="peer_memory", strategy="direct")
        sums = []
        for turn in range(12):
            seq = cp.sequence(9 + 7 * (turn % 5))
            x = torch.full((1, seq.shard_length, 2, 4), 1.0 + turn, dtype=torch.float64, requires_grad=True)
            out = seq.attention(x, x, x)
            (gradient,) = torch.autograd.grad(out.sum(), x)
            sums.append((float(out.detach().sum()), float(gradient.sum())))
        group.gather_objects("all ranks are done")
        return sums, len(peer_memory(group, x.device)._set)

    for sums, left in ringspan.run_in_process(3, run):
        assert left == 0
        assert all(total == total for pair in sums for total in pair)


@pytest.mark.parametrize("arguments", [{"strategy": "ring_self_attention"}, {"strategy": "ring", "kv_heads_per_stage": 1}])
def test_what_does_not_go_through_peer_memory_is_refused_where_it_was_asked_for(arguments: dict):
    def run(group, transport: str):
        cp = ringspan.ContextParallel(group, transport=transport, **arguments)
        seq = cp.sequence(8)
        x = torch.randn(1, seq.shard_length, 2, 4)
        return seq.attention(x, x, x).shape

    with pytest.raises(UnsupportedError, match="transport='process_group'"):
        ringspan.run_in_process(2, lambda group: run(group, "peer_memory"))
    assert len(ringspan.run_in_process(2, lambda group: run(group, "auto"))) == 2


def test_an_unknown_transport_is_refused_on_every_rank():
    with pytest.raises(RingspanError, match="auto, process_group, peer_memory"):
        ringspan.run_in_process(2, lambda group: ringspan.ContextParallel(group, transport="pigeon"))


def test_a_broken_inbox_is_seen_by_the_law(monkeypatch: pytest.MonkeyPatch):
    from ringspan.attention import planning

    def shifted(schedule, rank, sizes, singles):
        box = inbox(schedule, rank, sizes, singles)
        moved = tuple(
            replace(
                posting,
                written=tuple(
                    (message, tuple((at, tuple(replace(place, offset=0) for place in places)) for at, places in parts))
                    for message, parts in posting.written
                ),
            )
            for posting in box.postings
        )
        return replace(box, postings=moved)

    monkeypatch.setattr(planning, "inbox", shifted)
    tensors = make_tensors(40, heads=2, kv_heads=2, head_dim=4, seed=0)
    split = Split(num_ranks=4, mask=ringspan.causal(), strategy="balanced", layout="contiguous", options={"transport": "peer_memory"})
    with pytest.raises(AssertionError):
        found, _ = split_attention(split, tensors)
        assert_close(found, dense(tensors, MASKS["causal"].allowed(40)), BUDGETS[torch.float64], str(split))
