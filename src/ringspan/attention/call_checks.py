"""What functions with other libraries' arguments check of them, before this rank tells the others what it was asked for."""

from __future__ import annotations

from collections.abc import Sequence as Numbers
from itertools import pairwise
from typing import Any

from torch import Tensor

from ringspan.errors import RingspanError, UnsupportedError
from ringspan.geometry import documents


def check_tensors(function: str, q: Tensor, k: Tensor, v: Tensor, shape: str) -> None:
    """That q, k and v are tensors with as many dimensions as `shape` names; the rest is for `Sequence.attention` to say."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or x.ndim != shape.count(",") + 1:
            found = f"{name} is {tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__}"
            raise RingspanError(function, found, f"q, k and v are tensors {shape}", "x.unsqueeze(0) for tensors without a batch")


def check_names(function: str, **names: str) -> None:
    """That strategy, layout and kernel are names; which of them there are is for `ContextParallel` to say."""
    for name, value in names.items():
        if not isinstance(value, str):
            raise RingspanError(
                f"{function} with {name}={value!r}", f"it is of type {type(value).__name__}", f"A {name} is asked for by name"
            )


def check_length(function: str, length: int | None) -> None:
    """That a length that is given is one."""
    if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 1):
        raise RingspanError(f"{function} with length={length!r}", "", "A length is a whole number of at least 1 token", "length=1024")


def check_options(function: str, dropout_p: float, alibi_slopes: Tensor | None) -> None:
    """That nothing is asked for that would change the result and is not computed.

    Raises:
        UnsupportedError: for dropout and ALiBi.
    """
    if dropout_p != 0:
        raise UnsupportedError(
            f"{function} with dropout_p={dropout_p}",
            "attention dropout is not computed",
            "Every rank would have to drop the weights that one device would",
            "dropout_p=0.0",
        )
    if alibi_slopes is not None:
        raise UnsupportedError(
            f"{function} with alibi_slopes",
            "scores take no bias",
            "A score is made of scale, softcap and mask, and nothing that is asked for is ignored",
            "alibi_slopes=None, and positions that are rotated into q and k",
        )


def read_window(function: str, causal: bool, window_size: Any) -> tuple[int | None, int | None]:
    """(keys before, keys after) with None for no bound; under `causal` none after."""
    if not isinstance(causal, bool):
        raise RingspanError(f"{function} with causal={causal!r}", f"it is of type {type(causal).__name__}", "", "causal=True")
    bounds = tuple(window_size) if isinstance(window_size, (tuple, list)) else ()
    if len(bounds) != 2 or any(bound is not None and (type(bound) is not int or bound < -1) for bound in bounds):
        raise RingspanError(
            f"{function} with window_size={window_size!r}",
            "",
            "A window is (keys before, keys after), whole numbers of at least 0, or −1 for no bound",
            "window_size=(4095, 0)",
        )
    left, right = (None if bound == -1 else bound for bound in bounds)
    return left, 0 if causal else right


def read_softcap(softcap: Any) -> Any:
    """A bound of the scores, where flash-attn's 0 is none; `Sequence.attention` says what else is wrong with it."""
    return None if isinstance(softcap, (int, float)) and softcap == 0 else softcap


def read_borders(
    function: str, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: int | None, max_seqlen_k: int | None
) -> tuple[int, ...]:
    """The documents' borders, from queries' and keys' `cu_seqlens` that are the same."""
    borders = read_integers(function, "cu_seqlens_q", cu_seqlens_q)
    if cu_seqlens_k is not cu_seqlens_q and read_integers(function, "cu_seqlens_k", cu_seqlens_k) != borders:
        raise RingspanError(
            function,
            "cu_seqlens_q and cu_seqlens_k differ",
            "Queries and keys are those of the same documents",
            "cu_seqlens of the whole packed sequence for both, whatever this rank's shard holds of it",
        )
    documents(borders)
    for name, longest in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        check_longest(function, name, longest, borders)
    return borders


def check_longest(function: str, name: str, longest: int | None, borders: tuple[int, ...]) -> None:
    """That no document is longer than `longest`, which flash-attn would compute in part."""
    found = max(stop - start for start, stop in pairwise(borders))
    if longest is not None and not longest >= found:
        raise RingspanError(
            f"{function} with {name}={longest}", f"a document has {found} tokens", "No document is longer", f"{name}={found}"
        )


def read_integers(function: str, name: str, values: Tensor | Numbers[int]) -> tuple[int, ...]:
    """A list, or a one-dimensional tensor of integers, as a tuple."""
    whole = values.tolist() if isinstance(values, Tensor) and values.ndim == 1 else values
    if not isinstance(whole, (list, tuple)) or any(type(value) is not int for value in whole):
        shape = f"a tensor {tuple(values.shape)} of {values.dtype}" if isinstance(values, Tensor) else type(values).__name__
        raise RingspanError(
            f"{function} with {name}", f"it is {shape}", "Borders are a list or a tensor of whole numbers", f"{name}=[0, 5, 9]"
        )
    return tuple(whole)
