"""What the functions of other libraries have in common: their keywords, and the way to `Sequence.attention`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ringspan.attention.call_checks import check_options, check_tensors, read_window
from ringspan.attention.calls import Group, Request, find_sequence, promising
from ringspan.errors import RingspanError, UnsupportedError

BATCHED = "[batch, shard, heads, head_dim]"
PACKED = "[shard, heads, head_dim]"

Result = Tensor | tuple[Tensor, Tensor, None]
"""`out`, or with `return_attn_probs` `(out, lse, None)`."""


@dataclass(frozen=True)
class Keywords:
    """The keywords of ring-flash-attention's functions, in its order."""

    dropout_p: float
    softmax_scale: float | None
    causal: bool
    window_size: Any
    alibi_slopes: Tensor | None
    deterministic: bool
    return_attn_probs: bool
    group: Group


def call(
    function: str, shape: str, unpack: Callable[[], tuple[Tensor, ...]], request: Callable[[Tensor], Request], words: Keywords
) -> Result:
    """Attention of `unpack()` by the sequence of `request(q)`, both of which may refuse: then every rank raises.

    Args:
        function: what the user called.
        shape: `BATCHED` or `PACKED`.
        unpack: gives q, k and v.
        request: gives what all ranks must ask for alike.
        words: the user's keywords.
    """
    tensors: list[Tensor] = []

    def prepare() -> Request:
        q, k, v = unpack()
        check_tensors(function, q, k, v, shape)
        check_options(function, words.dropout_p, words.alibi_slopes)
        tensors.extend((q, k, v) if shape == BATCHED else (q[None], k[None], v[None]))
        return promising(request(q), words.deterministic)

    sequence = find_sequence(words.group, function, prepare)
    q, k, v = tensors
    if not words.return_attn_probs:
        out = sequence.attention(q, k, v, words.softmax_scale)
        return out if shape == BATCHED else out.squeeze(0)
    out, lse = sequence.attention(q, k, v, words.softmax_scale, return_lse=True)
    return (out, lse, None) if shape == BATCHED else (out.squeeze(0), lse.squeeze(0), None)


def unpacked(function: str, name: str, packed: Tensor, shape: str, count: int) -> tuple[Tensor, ...]:
    """The `count` tensors `shape` that `packed` holds along the dimension before the heads."""
    wanted = shape.replace("heads", f"{count}, heads", 1)
    if not isinstance(packed, Tensor) or packed.ndim != wanted.count(",") + 1 or packed.shape[-3] != count:
        found = f"{name} is {tuple(packed.shape) if isinstance(packed, Tensor) else type(packed).__name__}"
        raise RingspanError(
            function, found, f"{name} is a tensor {wanted}", f"torch.stack((…), dim={wanted.split(', ').index(str(count))})"
        )
    return packed.unbind(-3)


def refuse_window(function: str, window_size: Any, instead: str) -> None:
    """That no window is asked for, which the function called so elsewhere took for one of each block.

    Raises:
        UnsupportedError: where one is.
    """
    if read_window(function, False, window_size) != (None, None):
        raise UnsupportedError(
            f"{function} with window_size={window_size}",
            "what has this name elsewhere applied it to each block of a shard, not to the sequence",
            "Nothing that was wrong elsewhere is repeated here, or silently changed",
            instead,
        )
