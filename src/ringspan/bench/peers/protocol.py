"""What a peer is: whether it computes a problem, and its passes while it is open."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

import torch

from ringspan.bench.case import Shape
from ringspan.bench.passes import Passes
from ringspan.transport import Transport
from ringspan.verify import Inputs


class Peer(Protocol):
    """Another implementation of attention over several ranks.

    Attributes:
        name: what the report calls it.
    """

    name: str

    def refusal(self, shape: Shape, device: torch.device) -> str:
        """Why it is not tried with `shape` on `device` (not installed, say); empty where it is. Nothing is sent."""
        ...

    def kernel(self, device: torch.device) -> str:
        """What computes inside it, for the report."""
        ...

    def open(self, shape: Shape, inputs: Inputs, transport: Transport) -> AbstractContextManager[Passes]:
        """Its passes over this rank's rows of `inputs`, usable within the context. Collective."""
        ...


def plain_mask(shape: Shape) -> str:
    """`causal` or `full` where the mask is that alone, else empty."""
    return shape.mask if shape.mask in ("causal", "full") and not shape.documents else ""


def divides(shape: Shape, parts: int) -> str:
    """Why the length is refused by who cuts it into `parts`; empty where it is not."""
    return "" if shape.length % parts == 0 else f"{shape.length} tokens do not divide by {parts}"


def alone(shape: Shape) -> str:
    """A peer on one rank is no peer."""
    return "" if shape.num_ranks > 1 else "there is one rank"
