"""What the papers say a strategy sends, beside what its schedules send.

N tokens, P ranks, heads of width h in all, a share r = key heads / query heads, c = N/P tokens a rank. Volumes are in elements, sent by one
rank on average; where partials or gradients travel wider than inputs, bytes are asserted beside them.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch

import ringspan
from ringspan.geometry import (
    Mask,
    block_sparse,
    causal,
    documents,
    full,
    head_shares,
    make_layout,
    shared_keys,
    sliding_window,
)
from ringspan.schedule import PieceBytes
from ringspan.strategies import link_bytes, make_schedules
from tests.strategies.combinations import LAYOUTS, MASKS, Combination
from tests.strategies.volumes import (
    HEAD_DIM,
    HEADS,
    LENGTH,
    RANKS,
    WIDTH,
    elements,
    exchanged_bytes,
    half_precision,
    helped_blocks,
    make,
    sent,
    shards,
)
from tests.support.dense import make_tensors

# ---- the ring --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["ring", "all_gather", "double_ring", "direct"])
@pytest.mark.parametrize("kv_heads", [8, 2, 1])
def test_a_rank_of_the_ring_sends_twice_n_h_times_the_share_of_key_heads_whatever_the_number_of_ranks(strategy: str, kv_heads: int):
    # Under a full mask. The factor (P − 1)/P is the shard that stays at home.
    share = Fraction(kv_heads, HEADS)
    for ranks in RANKS:
        volume = sent(strategy, ranks, full(), "forward", elements(kv_heads))
        assert volume == 2 * LENGTH * WIDTH * share * Fraction(ranks - 1, ranks)
        # Keys and values once more, and their gradients behind them. USP's table has 4 N h for both, as if no gradients travelled.
        assert sent(strategy, ranks, full(), "backward", elements(kv_heads)) == 2 * volume
        assert sent(strategy, ranks, full(), "backward", half_precision(kv_heads)) == (2 + 4) * volume


@pytest.mark.parametrize("ranks", RANKS)
def test_a_causal_zigzag_ring_saves_half_of_one_shard_and_direct_the_quarter_that_rings_waste(ranks: int):
    # Rank 0's second half is read by nobody else. MagiAttention: a ring wastes 25% of its traffic on causal masks.
    of_full = ranks * (ranks - 1)
    ring, direct = (sent(strategy, ranks, causal(), "forward", elements()) * ranks for strategy in ("ring", "direct"))
    assert ring == shards(of_full - Fraction(ranks - 1, 2), elements(), ranks, "kv")
    assert direct == shards(Fraction(3, 4) * of_full, elements(), ranks, "kv")


@pytest.mark.parametrize("strategy", ["ring", "direct", "all_gather"])
@pytest.mark.parametrize("ranks", RANKS)
def test_contiguous_causal_shards_send_half_of_what_a_full_mask_sends(strategy: str, ranks: int):
    volume = sent(strategy, ranks, causal(), "forward", elements(), "contiguous") * ranks
    assert volume == shards(Fraction(ranks * (ranks - 1), 2), elements(), ranks, "kv")


@pytest.mark.parametrize(("ranks", "window"), [(ranks, w) for ranks in (4, 6, 8, 9, 12) for w in range(1, ranks + 1) if ranks % w == 0])
def test_the_double_ring_sends_as_much_and_crosses_between_inner_rings_once_a_ring(ranks: int, window: int):
    length = 24 * ranks
    layout = make_layout("zigzag", length, ranks)
    schedules = make_schedules("double_ring", layout, full(), window=window)
    links = link_bytes(schedules, layout, elements(), "forward")
    shard = 24 * elements().of("kv")
    assert links.total() == ranks * (ranks - 1) * shard
    crossing = sum(size for (source, target), size in links.items() if source // window != target // window)
    assert crossing == ranks * (ranks // window - 1) * shard, "a ring of P sends P − 1 shards over its slowest link, this one P/w − 1"


# ---- Burst Attention: rotating queries in the backward ---------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", RANKS)
def test_a_backward_that_rotates_queries_sends_4nd_and_n_lse_where_the_paper_has_3nd_and_2n(ranks: int):
    # BurstAttention sends Q, dO, dQ, lse and delta. Here the kernels compute delta themselves, from out, which therefore travels too.
    away = Fraction(ranks - 1, ranks)
    queries = sent("ring", ranks, full(), "backward", elements(), rotate="queries")
    assert queries == away * LENGTH * (4 * WIDTH + HEADS)
    assert sent("ring", ranks, full(), "backward", elements()) == away * LENGTH * 4 * WIDTH, "keys: K, V, dK, dV"
    # So in one precision it is never less; with inputs of two bytes and gradients of four it is 10 + 4/head_dim bytes against 12.
    assert sent("ring", ranks, full(), "backward", half_precision(), rotate="queries") == away * LENGTH * (10 * WIDTH + 4 * HEADS)
    assert sent("ring", ranks, full(), "backward", half_precision()) == away * LENGTH * 12 * WIDTH


@pytest.mark.parametrize(
    ("dtype", "kv_heads", "rotated"),
    [(torch.bfloat16, 8, "dq"), (torch.float16, 8, "dq"), (torch.bfloat16, 4, "dkv"), (torch.float32, 8, "dkv"), (torch.float64, 8, "dkv")],
)
def test_the_ring_rotates_whichever_is_less_traffic(dtype: torch.dtype, kv_heads: int, rotated: str):
    def run(group: Any) -> set[str]:
        sequence = ringspan.ContextParallel(group).sequence(24, full())
        whole = make_tensors(24, heads=HEADS, kv_heads=kv_heads, head_dim=HEAD_DIM, dtype=dtype)
        sequence.attention(*(sequence.shard(x) for x in (whole.q, whole.k, whole.v)))
        return {send.piece.kind for _, send in sequence.schedules.backward.sends()} & {"dq", "dkv"}

    assert ringspan.run_in_process(3, run) == [{rotated}] * 3


# ---- Ulysses, USP, LoongTrain ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [full(), causal(), sliding_window(3), documents([0, 7, 100, LENGTH])], ids=str)
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_ulysses_sends_4nh_over_p_each_way_under_any_mask(ranks: int, mask: Mask):
    volume = Fraction(4 * LENGTH * WIDTH * (ranks - 1), ranks * ranks)
    for direction in ("forward", "backward"):
        assert sent("ulysses", ranks, mask, direction, elements()) == volume
    # USP's table: 8/N of N h elements for both directions. Two bytes an element, gradients included.
    assert sent("ulysses", ranks, mask, "backward", half_precision()) == 2 * volume


@pytest.mark.parametrize("kv_heads", [8, 4, 2, 1])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ulysses_sends_each_rank_the_one_key_head_that_it_needs_where_key_heads_are_fewer_than_ranks(ranks: int, kv_heads: int):
    # LoongTrain: max(key heads, ranks) key heads are on the wire, each HEAD_DIM wide.
    on_the_wire = max(kv_heads, ranks) * HEAD_DIM
    expected = Fraction(LENGTH * (2 * WIDTH + 2 * on_the_wire) * (ranks - 1), ranks * ranks)
    assert sent("ulysses", ranks, causal(), "forward", elements(kv_heads)) == expected
    assert sent("ulysses", ranks, causal(), "backward", elements(kv_heads)) == expected


@pytest.mark.parametrize("kv_heads", [8, 4, 2, 1])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_parts_of_the_gradient_of_a_shared_key_head_travel_as_they_were_accumulated_and_all_else_as_wide_as_inputs(
    ranks: int, kv_heads: int
):
    forward, backward = (sent("ulysses", ranks, causal(), direction, half_precision(kv_heads)) for direction in ("forward", "backward"))
    assert (forward * ranks, backward * ranks) == exchanged_bytes(kv_heads, ranks, LENGTH)
    # Two bytes more for each element of dk and dv, where ranks are more than key heads and not otherwise.
    more = 2 * 2 * ranks * HEAD_DIM * LENGTH * Fraction(ranks - 1, ranks * ranks)
    assert backward - forward == (more if kv_heads < ranks else 0)


def test_a_key_head_that_one_rank_alone_has_is_not_sent_in_parts_though_others_are_shared():
    # Three key heads on four ranks: the first is that of two ranks, the others of one each.
    assert shared_keys(head_shares(6, 3, 4)) == (True, True, False, False)
    sizes = PieceBytes(heads=6, kv_heads=3, head_dim=HEAD_DIM, element_bytes=2, accumulator_bytes=4)
    layout = make_layout("zigzag", LENGTH, 4)
    schedules = make_schedules("ulysses", layout, causal())
    forward, backward = (link_bytes(schedules, layout, sizes, direction) for direction in ("forward", "backward"))
    part = LENGTH // 4 * HEAD_DIM
    for source, target in forward:
        mine, theirs = ((1, 1, 2, 2)[rank] for rank in (source, target))
        assert forward[(source, target)] == part * 2 * (theirs + 2 + mine)
        assert backward[(source, target)] == part * (2 * (theirs + mine) + 2 * (4 if source < 2 else 2))


@pytest.mark.parametrize("placement", ["head_first", "context_first"])
@pytest.mark.parametrize(("ranks", "degree"), [(ranks, u) for ranks in (4, 6, 8, 12) for u in (1, 2, 4, 8) if ranks % u == 0])
def test_usp_sends_the_all_to_all_of_its_head_groups_and_the_ring_of_its_context_groups(ranks: int, degree: int, placement: str):
    groups = ranks // degree
    exchanged = Fraction(4 * LENGTH * WIDTH, ranks) * Fraction(degree - 1, degree)
    ring = Fraction(2 * LENGTH * WIDTH, degree) * Fraction(groups - 1, groups)
    options = {"ulysses": degree, "placement": placement}
    assert sent("two_dimensional", ranks, full(), "forward", elements(), **options) == exchanged + ring
    assert sent("two_dimensional", ranks, full(), "backward", elements(), **options) == exchanged + 2 * ring


# ---- DISTFLASHATTN ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", RANKS)
def test_distflashattn_sends_nd_forward_and_2nd_backward_and_the_lse_of_what_was_helped(ranks: int):
    away, lses = Fraction(ranks - 1, ranks), Fraction(helped_blocks(ranks) * (LENGTH // ranks) * HEADS, ranks)
    # A block costs K and V, or Q and the partial that goes home: 2 c d either way, (P − 1)/2 of them a rank.
    assert sent("balanced", ranks, causal(), "forward", elements(), "contiguous") == away * LENGTH * WIDTH + lses
    # And K, V, dK, dV, or Q, dO, out and dQ: 4 c d.
    assert sent("balanced", ranks, causal(), "backward", elements(), "contiguous") == away * 2 * LENGTH * WIDTH + lses
    # Fewer key heads make fetching cheaper and helping no dearer; the paper has as many as query heads.
    blocks = ranks * (ranks - 1) // 2 - helped_blocks(ranks)
    grouped = sent("balanced", ranks, causal(), "forward", elements(2), "contiguous") * ranks
    helped = helped_blocks(ranks) * (LENGTH // ranks) * (2 * WIDTH + HEADS)
    assert grouped == shards(blocks, elements(2), ranks, "kv") + helped


# ---- Ring Self-Attention ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", RANKS)
def test_ring_self_attention_sends_2_shards_a_hop_forward_and_4_backward_where_the_paper_has_6(ranks: int):
    shard = Fraction(LENGTH, ranks) * WIDTH
    assert sent("ring_self_attention", ranks, full(), "forward", elements()) == 2 * (ranks - 1) * shard
    # The paper all-reduces dK and dV of the whole length; here they ride home behind K and V.
    assert sent("ring_self_attention", ranks, full(), "backward", elements()) == 4 * (ranks - 1) * shard


# ---- pass-Q and pass-KV ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [8, 2, 1])
@pytest.mark.parametrize("ranks", RANKS)
def test_pass_query_and_tree_send_queries_there_and_partials_back(ranks: int, kv_heads: int):
    for strategy in ("pass_query", "tree"):
        assert sent(strategy, ranks, full(), "forward", elements(kv_heads)) == Fraction(ranks - 1, ranks) * LENGTH * (2 * WIDTH + HEADS)
        # Queries, dO, out and lse there, dQ back, whatever the key heads.
        backward = sent(strategy, ranks, full(), "backward", elements(kv_heads))
        assert backward == Fraction(ranks - 1, ranks) * LENGTH * (4 * WIDTH + HEADS)


@pytest.mark.parametrize("ranks", RANKS)
def test_a_tree_brings_partials_home_in_logarithmically_many_rounds(ranks: int):
    rounds = (ranks - 1).bit_length()
    assert make("tree", ranks, full()).forward.num_steps == (1 if ranks == 1 else 3 + rounds)
    assert make("pass_query", ranks, full()).forward.num_steps == (1 if ranks == 1 else ranks + 2)


def messages(strategy: str, new: int, cached: int, sizes: PieceBytes, ranks: int = 4) -> int:
    """Bytes of the largest message of queries, or of keys and values, where the last `new` tokens attend to all (partial prefill).

    Striped, so that every rank has as many of both as any other.
    """
    blocks = (new + cached) // new
    mask = block_sparse(new, [[row == blocks - 1] * blocks for row in range(blocks)])
    schedule = make(strategy, ranks, mask, "striped", new + cached).forward
    return max(len(send.piece) * sizes.of(send.piece.kind) for _, send in schedule.sends() if send.piece.kind in ("q", "kv"))


@pytest.mark.parametrize(("heads", "kv_heads"), [(128, 8), (32, 8), (64, 4), (32, 1)])
@pytest.mark.parametrize("of_all", [2, 3, 4, 8, 10, 16, 20, 32, 40, 100])
def test_the_message_of_queries_is_smaller_where_new_tokens_are_at_most_twice_the_share_of_key_heads(
    heads: int, kv_heads: int, of_all: int
):
    # Equation 1 of Meta's context-parallel inference: T/(T + P) ≤ 2 N_KV/N_H, e.g. 12.5% for 128 and 8 heads (Llama 3 405B).
    sizes = PieceBytes(heads=heads, kv_heads=kv_heads, head_dim=16)
    new, cached = 8, 8 * (of_all - 1)
    queries, keys = messages("pass_query", new, cached, sizes), messages("ring", new, cached, sizes)
    assert (queries <= keys) == (Fraction(new, new + cached) <= Fraction(2 * kv_heads, heads))


def passes_keys(new: int, cached: int, sizes: PieceBytes) -> bool:
    """Algorithm 1's second condition, from what the messages weigh: T/(T + P) ≥ 2 N_KV/N_H."""
    return new * sizes.of("q") >= (new + cached) * sizes.of("kv")


def test_algorithm_1_passes_keys_from_a_miss_rate_of_an_eighth_on_with_128_and_8_heads():
    sizes = PieceBytes(heads=128, kv_heads=8, head_dim=128)
    decided = {
        thousandths: passes_keys(128 * thousandths, 128 * (1000 - thousandths), sizes) for thousandths in (10, 50, 124, 125, 126, 500)
    }
    assert decided == {10: False, 50: False, 124: False, 125: True, 126: True, 500: True}
    assert messages("pass_query", 8, 56, sizes) == messages("ring", 8, 56, sizes), "at an eighth both weigh the same"


# ---- masks: what direct saves ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [2, 3, 4, 6, 8, 12])
@pytest.mark.parametrize("window", [1, 4, 9])
def test_under_a_window_direct_sends_only_tails_and_a_zigzag_ring_nearly_a_chunk_more_a_rank(ranks: int, window: int):
    # Chunks of N/2P. Every chunk reads the `window` keys before it; the two middle chunks lie on one rank.
    chunk, position = LENGTH // (2 * ranks), elements().of("kv")
    assert window <= chunk
    mask = sliding_window(window)
    direct, ring = (sent(strategy, ranks, mask, "forward", elements()) * ranks for strategy in ("direct", "ring"))
    assert direct == 2 * (ranks - 1) * window * position
    # A ring carries one piece, from the tail of the rank's first chunk to the tail of its last, with all that lies between.
    assert ring == direct + (ranks - 2) * chunk * position
    assert direct < ring or ranks == 2


def test_of_128k_tokens_on_8_ranks_with_a_window_of_4k_direct_sends_54_percent_of_the_zigzag_ring():
    kv = elements().of("kv")
    direct, ring = (sent(name, 8, sliding_window(4096), "forward", elements(), length=131_072) * 8 / kv for name in ("direct", "ring"))
    assert (direct, ring) == (57_344, 106_496)
    assert sent("ring", 8, causal(), "forward", elements(), length=131_072) * 8 / kv == 860_160, "and without the window, 15 times as much"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [name for name in MASKS if "mask_mod" not in name])
def test_direct_sends_exactly_the_keys_that_are_read_and_none_between_them(name: str, layout: str):
    combination = Combination("direct", layout, name, ranks=3, length=61)
    allowed, whole = MASKS[name].allowed(61), combination.make_layout()
    fetched = [set() for _ in range(3)]
    for rank, send in combination.make_schedules().forward.sends():
        positions = whole.positions(rank)[send.piece.start : send.piece.stop]
        assert fetched[send.peer].isdisjoint(positions)
        fetched[send.peer].update(positions)
    for rank, found in enumerate(fetched):
        own = whole.positions(rank)
        read = allowed[own].any(0).nonzero().flatten().tolist()
        assert found == set(read) - set(own)


@pytest.mark.parametrize("mask", [causal() & documents([0, 7, 31, 60, 150, 159, LENGTH]), sliding_window(5), sliding_window(2, 2)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_direct_never_sends_more_than_the_ring(mask: Mask, layout: str, direction: str):
    for ranks in RANKS:
        direct, ring = (sent(strategy, ranks, mask, direction, elements(), layout) for strategy in ("direct", "ring"))
        assert direct <= ring
