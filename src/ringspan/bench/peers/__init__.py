"""The peers that are timed beside, each where it is installed: an adapter a file, and none of their code."""

from ringspan.bench.peers.protocol import Peer
from ringspan.bench.peers.pytorch import PyTorch
from ringspan.bench.peers.ring_flash_attention import RingFlashAttention
from ringspan.bench.peers.yunchang import Ulysses

__all__ = ["PEERS", "Peer"]

PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        PyTorch("allgather"),
        PyTorch("alltoall"),
        *(RingFlashAttention(variant) for variant in ("zigzag", "ring", "stripe", "llama3")),
        Ulysses(),
    )
}
"""By name."""
