"""What one attend alone gave travels as a kernel that rounds has rounded it: fewer bytes, as promised, and not a bit lost."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import ringspan
from ringspan.kernels import KERNELS
from ringspan.kernels.reference import Reference
from ringspan.schedule import PieceBytes
from ringspan.strategies import link_bytes
from tests.strategies.combinations import MASKS, VARIANTS
from tests.support.dense import Tensors, make_tensors
from tests.support.rounding import Rounding
from tests.support.split import Split, split_attention

VARIANT_NAMES = [name for name in VARIANTS if name != "ring_self_attention"]


class Silent(Rounding):
    """The same, without saying so: everything travels in float32."""

    can = replace(Reference.can, rounds=False)


def promised(split: Split, tensors: Tensors) -> dict[tuple[int, int], int]:
    """What the schedules say of a kernel that rounds."""
    batch, _, heads, head_dim = tensors.q.shape
    sizes = PieceBytes(
        batch=batch, heads=heads, kv_heads=tensors.k.shape[2], head_dim=head_dim, element_bytes=2, accumulator_bytes=4, single_bytes=2
    )
    found: dict[tuple[int, int], int] = {}

    def rank(group) -> None:
        sequence = split.context(group).sequence(tensors.q.shape[1], split.mask)
        q, k, v = (sequence.shard(tensor) for tensor in (tensors.q, tensors.k, tensors.v))
        sequence.attention(q, k, v)
        total = link_bytes(sequence.schedules, sequence.layout, sizes, "forward", return_lse=True)
        total += link_bytes(sequence.schedules, sequence.layout, sizes, "backward", return_lse=True)
        found.update({link: size for link, size in total.items() if size})

    ringspan.run_in_process(split.num_ranks, rank)
    return found


@pytest.mark.parametrize("variant", VARIANT_NAMES)
@pytest.mark.parametrize("transport", ["auto", "peer_memory"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_singles_lose_no_bit_and_fewer_bytes_are_sent(variant: str, transport: str, ranks: int, monkeypatch: pytest.MonkeyPatch):
    strategy, options = VARIANTS[variant]
    if transport == "peer_memory" and strategy in ("ulysses", "two_dimensional"):
        pytest.skip("head groups do not go through peer memory")
    tensors = make_tensors(37, heads=4, kv_heads=2, head_dim=8, dtype=torch.bfloat16, seed=1)
    split = Split(num_ranks=ranks, mask=MASKS["causal"].make(37), strategy=strategy, options={**options(ranks), "transport": transport})
    monkeypatch.setitem(KERNELS, "reference", Silent())
    wide, wide_parts = split_attention(split, tensors)
    monkeypatch.setitem(KERNELS, "reference", Rounding())
    narrow, parts = split_attention(split, tensors)
    for name, tensor in narrow.named().items():
        if tensor is not None:
            assert torch.equal(tensor, wide.named()[name]), f"{name} lost a bit on the way"
    sent = {link: size for part in parts for link, size in part.sent.items()}
    before = {link: size for part in wide_parts for link, size in part.sent.items()}
    assert sent == promised(split, tensors)
    assert all(sent[link] <= before[link] for link in sent)
    if strategy in ("ring", "direct", "all_gather") and ranks == 2:
        assert sum(sent.values()) < sum(before.values())


def test_a_sum_never_travels_rounded(monkeypatch: pytest.MonkeyPatch):
    # Were every result taken for a single one, the ring's sums would be rounded at each hop.
    from ringspan.schedule import Schedule, Send

    tensors = make_tensors(64, heads=4, kv_heads=4, head_dim=16, dtype=torch.bfloat16, seed=2)
    split = Split(num_ranks=4, mask=MASKS["full"].make(64), strategy="ring", options={"rotate": "keys"})
    monkeypatch.setitem(KERNELS, "reference", Rounding())
    right, _ = split_attention(split, tensors)

    def every(self: Schedule) -> frozenset:
        return frozenset((rank, action) for rank, program in enumerate(self.programs) for action in program if isinstance(action, Send))

    monkeypatch.setattr(Schedule, "singles", property(every))
    wrong, _ = split_attention(replace(split), tensors)
    assert not torch.equal(right.dk, wrong.dk)
