"""Traffic: how many bytes cross each link, from the schedule and the size of one position of each kind."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ringspan.schedule.actions import Schedule, Send


@dataclass(frozen=True, kw_only=True)
class PieceBytes:
    """The size of attention's tensors: what one position of each kind of piece weighs.

    Args:
        batch: sequences.
        heads: query heads.
        kv_heads: key and value heads; never expanded on the wire.
        head_dim: width of a head.
        element_bytes: bytes of an element of q, k, v, out and dO. Partials, lse and gradients travel in `accumulator_bytes`. With dO travel
            out and lse, of which kernels compute what they need.
        lse_gradient: whether a gradient through lse travels with dO.
        accumulator_bytes: 4 for float32, 8 where the inputs are float64.
        single_bytes: of an element of a partial output or a gradient that one attend alone gave: those of the inputs where the kernel
            rounds its results to them, so that nothing is lost on the way; else, and if not given, `accumulator_bytes`.
    """

    batch: int = 1
    heads: int = 1
    kv_heads: int = 1
    head_dim: int = 1
    element_bytes: int = 2
    accumulator_bytes: int = 4
    single_bytes: int | None = None
    lse_gradient: bool = False

    def of(self, kind: str) -> int:
        """Bytes of one position of `kind`."""
        q = self.batch * self.heads
        kv = 2 * self.batch * self.kv_heads * self.head_dim
        return {
            "q": q * self.head_dim * self.element_bytes,
            "kv": kv * self.element_bytes,
            "k": kv * self.element_bytes // 2,
            "v": kv * self.element_bytes // 2,
            "o": q * (self.head_dim + 1) * self.accumulator_bytes,
            "do": q * (2 * self.head_dim * self.element_bytes + (1 + self.lse_gradient) * self.accumulator_bytes),
            "dq": q * self.head_dim * self.accumulator_bytes,
            "dkv": kv * self.accumulator_bytes,
            "dk": kv * self.accumulator_bytes // 2,
            "dv": kv * self.accumulator_bytes // 2,
        }[kind]

    def of_single(self, kind: str) -> int:
        """Bytes of one position of a result of `kind` that one attend alone gave."""
        if self.single_bytes is None:
            return self.of(kind)
        # The lse of a partial output stays as it is.
        statistics = self.batch * self.heads * (self.accumulator_bytes - self.single_bytes) if kind == "o" else 0
        return replace(self, accumulator_bytes=self.single_bytes).of(kind) + statistics


def send_bytes(schedule: Schedule, rank: int, send: Send, sizes: PieceBytes) -> int:
    """Bytes of one send of `rank`."""
    kind = send.piece.kind
    return len(send.piece) * (sizes.of_single(kind) if (rank, send) in schedule.singles else sizes.of(kind))


def traffic(schedule: Schedule, sizes: PieceBytes) -> Mapping[tuple[int, int], int]:
    """Bytes over each link, as `{(source, target): bytes}`; links that carry nothing are absent."""
    links: dict[tuple[int, int], int] = defaultdict(int)
    for rank, send in schedule.sends():
        links[(rank, send.peer)] += send_bytes(schedule, rank, send, sizes)
    return dict(links)


def sent_bytes(schedule: Schedule, sizes: PieceBytes, rank: int) -> int:
    """Bytes that `rank` sends in all."""
    return sum(size for (source, _), size in traffic(schedule, sizes).items() if source == rank)
