"""Cross-entropy by tiles of the sequence: logits never exist for the whole shard, forward or backward.

On a GPU in half precision one kernel makes a tile's loss and gradient in the logits' place (`ringspan.kernels.fused_token_loss`). It is
ours, since those of others are not equal: liger-kernel's for logits keeps each token's loss in their dtype and waits for the device, its
fused one cuts tiles that grow with the length; cut-cross-entropy leaves small gradients out and adds the others up in half precision.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ringspan.attention import Sequence
from ringspan.attention.checks import problem_of
from ringspan.attention.kept import Kept
from ringspan.attention.loss import IGNORE_INDEX, SumOverRanks
from ringspan.errors import RingspanError
from ringspan.kernels import first_order
from ringspan.transformer.accumulate import add_product_, wide_dtype
from ringspan.transport import agree


@dataclass(frozen=True, kw_only=True)
class LossTerms:
    """What a token's loss is made of: `lse − (1−ε)·x_label − ε·mean(x) + z·lse²`, x being its logits.

    Logits are `softcap · tanh(multiplier · (hidden · weightᵀ + bias) / softcap)`, without the tanh where there is no softcap.

    Attributes:
        multiplier: of the logits (Granite, Cohere).
        softcap: of the logits (Gemma 2).
        label_smoothing: ε, as `torch.nn.functional.cross_entropy` takes it.
        z_loss: z, which draws the logits' normaliser towards 1.
        ignore_index: the label of positions that do not count.
    """

    multiplier: float = 1.0
    softcap: float | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    ignore_index: int = IGNORE_INDEX

    def check(self) -> None:
        """Raises RingspanError where a number makes no sense."""
        if not 0 <= self.label_smoothing < 1:
            raise RingspanError(f"label_smoothing={self.label_smoothing!r}", "", "It is a share of 1", "label_smoothing=0.1")
        if not self.z_loss >= 0:
            raise RingspanError(f"z_loss={self.z_loss!r}", "", "A z-loss has a weight of at least 0", "z_loss=1e-4")
        if self.softcap is not None and not self.softcap > 0:
            raise RingspanError(f"softcap={self.softcap!r}", "", "A softcap is above 0", "softcap=None")


def tiled_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    tile: int,
    bias: Tensor | None = None,
    scale: Tensor | float = 1.0,
    terms: LossTerms | None = None,
) -> Tensor:
    """The sum over labelled tokens of their loss, times `scale`; logits exist for `tile` tokens at a time. Local to this rank.

    The gradients are made in the forward, tile by tile, as soon as a tile's logits are there: three products a tile instead of the four
    of recomputing them. What is kept for the backward is the gradient of `hidden`, in its place, and of `weight`, in float32. Under
    `torch.no_grad()` no gradient is made.

    Args:
        hidden: `[batch, shard, hidden]`.
        weight: `[vocabulary, hidden]`, the output embedding.
        labels: `[batch, shard]`, already shifted.
        tile: tokens whose logits exist at once.
        bias: `[vocabulary]`.
        scale: a number, or a tensor of one element: 1 / count makes a mean. It enters before anything is rounded.
        terms: what the loss is made of; plain cross-entropy if not given.

    Returns:
        A scalar, float32 or wider. `backward` works once.

    Raises:
        RingspanError: where shapes do not fit or a number makes no sense.
    """
    terms = terms or LossTerms()
    _check(hidden, weight, labels, tile, terms)
    factor = _as_factor(scale, hidden)
    return _TiledCrossEntropy.apply(hidden, weight, bias, labels, factor, tile, terms, torch.is_grad_enabled())


def tiled_loss(
    sequence: Sequence,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    tile: int,
    bias: Tensor | None = None,
    terms: LossTerms | None = None,
) -> Tensor:
    """The unsplit model's mean loss, on every rank, as `Sequence.loss` but from hidden states. Collective.

    Args:
        sequence: whose shards these are.
        hidden: see `tiled_cross_entropy`, as `weight`, `tile`, `bias` and `terms`.
        weight: `[vocabulary, hidden]`.
        labels: `[batch, shard]`, as `shard_batch` returns them.
        tile: tokens whose logits exist at once.
        bias: `[vocabulary]`.
        terms: what the loss is made of.

    Returns:
        A scalar, the same on every rank, 0 where no position counts; its gradient is this rank's share.

    Raises:
        RingspanError: at the first call with new shapes, on every rank, where they are wrong on any rank or the ranks disagree.
    """
    terms = terms or LossTerms()
    transport = sequence.context.transport

    def agreed() -> bool:
        problem = problem_of(lambda: _check(hidden, weight, labels, tile, terms, sequence.shard_length))
        agree(transport, "tiled_loss", f"batch={hidden.shape[0]} weight={tuple(weight.shape)} {hidden.dtype} {terms}", problem)
        return True

    kept: Kept[bool] = vars(sequence).setdefault("_tiled_losses", Kept(64))
    kept.get((hidden.shape, labels.shape, weight.shape, hidden.dtype, tile, terms), agreed)
    count = (labels != terms.ignore_index).sum().to(wide_dtype(hidden.dtype))
    transport.all_reduce(count)
    share = tiled_cross_entropy(hidden, weight, labels, tile=tile, bias=bias, scale=1 / count.clamp(min=1), terms=terms)
    return SumOverRanks.apply(share, transport)


@torch.no_grad()
def token_losses(hidden: Tensor, weight: Tensor, labels: Tensor, *, tile: int, bias: Tensor | None, terms: LossTerms) -> Tensor:
    """The cross-entropy of each token, without smoothing and z-loss, and without a gradient; logits exist for `tile` tokens at a time.

    Args:
        hidden: `[batch, shard, hidden]`.
        weight: `[vocabulary, hidden]`.
        labels: `[batch, shard]`, already shifted.
        tile: tokens whose logits exist at once.
        bias: `[vocabulary]`, or None.
        terms: multiplier and softcap of the logits, and which label does not count.

    Returns:
        `[batch, shard]`, float32 or wider; 0 where a token does not count.
    """
    flat, flat_labels = hidden.flatten(0, -2), labels.flatten()
    losses = torch.empty(flat.shape[0], dtype=wide_dtype(flat.dtype), device=flat.device)
    for start in range(0, flat.shape[0], tile):
        rows = slice(start, start + tile)
        x = F.linear(flat[rows], weight, bias).to(losses.dtype) * terms.multiplier
        if terms.softcap is not None:
            x = terms.softcap * torch.tanh(x / terms.softcap)
        losses[rows] = F.cross_entropy(x, flat_labels[rows], ignore_index=terms.ignore_index, reduction="none")
    return losses.view(labels.shape)


def cross_entropy_of_logits(logits: Tensor, labels: Tensor, scale: Tensor | float = 1.0, terms: LossTerms | None = None) -> Tensor:
    """What `tiled_cross_entropy` computes, from logits that are there already, their multiplier and softcap applied."""
    terms = terms or LossTerms()
    x = logits.flatten(0, -2).to(wide_dtype(logits.dtype))
    flat = labels.flatten()
    total = F.cross_entropy(x, flat, ignore_index=terms.ignore_index, label_smoothing=terms.label_smoothing, reduction="sum")
    if terms.z_loss:
        total = total + terms.z_loss * x.logsumexp(-1).square().masked_fill(flat == terms.ignore_index, 0.0).sum()
    return total * _as_factor(scale, x)


def _as_factor(scale: Tensor | float, like: Tensor) -> Tensor:
    dtype = wide_dtype(like.dtype)
    # A number becomes a tensor by a kernel and not by a copy, which a GPU would be waited for.
    return scale.to(dtype) if isinstance(scale, Tensor) else torch.full((), scale, dtype=dtype, device=like.device)


class _Tile(NamedTuple):
    """The loss of a tile's tokens, and its gradient by the linear map's output where that is wanted."""

    loss: Tensor
    gradient: Tensor | None


def _can_be_fused(raw: Tensor, bias: Tensor | None) -> bool:
    """Half precision on a GPU. A bias's gradient is a sum of gradients that are not rounded yet, and the kernel hands over rounded ones."""
    return type(raw) is Tensor and raw.is_cuda and raw.dtype in (torch.bfloat16, torch.float16) and bias is None


@cache
def _fused() -> Callable[..., Tensor] | None:
    """The same as one kernel, where Triton is installed (torch's CUDA builds bring it)."""
    try:
        from ringspan.kernels.fused_token_loss import fused_token_loss_
    except ImportError:
        return None
    return fused_token_loss_


class _TiledCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, factor: Tensor, tile: int, terms: LossTerms, learns: bool
    ):
        flat, flat_labels = hidden.flatten(0, -2), labels.flatten()
        # Of parameters `needs_input_grad` is true under no_grad, too.
        wanted = ctx.needs_input_grad[:3] if learns else (False, False, False)
        total = torch.zeros_like(factor)
        dhidden = torch.empty_like(flat) if wanted[0] else None
        dweight, dbias = (
            torch.zeros(each.shape, dtype=factor.dtype, device=each.device) if want and each is not None else None
            for each, want in zip((weight, bias), wanted[1:], strict=True)
        )
        for start in range(0, flat.shape[0], tile):
            rows = slice(start, start + tile)
            part = flat[rows]
            raw = F.linear(part, weight, bias)
            fused = _fused() if _can_be_fused(raw, bias) else None
            if fused is None:
                found = _tile(raw.to(factor.dtype), flat_labels[rows], factor, terms, any(wanted))
            else:
                loss = fused(raw, flat_labels[rows], factor, **asdict(terms), with_gradient=any(wanted))
                found = _Tile(loss, raw if any(wanted) else None)
            del raw
            total += found.loss
            if found.gradient is None:
                continue
            if dbias is not None:
                dbias += found.gradient.sum(0)
            gradient = found.gradient.to(flat.dtype)
            if dhidden is not None:
                torch.mm(gradient, weight.to(flat.dtype), out=dhidden[rows])
            if dweight is not None:
                add_product_(dweight, gradient, part)
            del found, gradient
        ctx.gradients = (None if dhidden is None else dhidden.view(hidden.shape), dweight, dbias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    @first_order
    def backward(ctx, *gradients: Tensor):
        if ctx.gradients is None:
            raise RingspanError(
                "a second backward through a tiled loss",
                "its gradients were given away at the first",
                "They are made in the forward and held once",
                "computing the loss again",
            )
        # In place: each of them may be as large as anything else on the device.
        scaled = [
            None if each is None else each.mul_(gradients[0]).to(dtype) for each, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        ]
        ctx.gradients = None
        return *scaled, None, None, None, None, None


def _tile(raw: Tensor, labels: Tensor, factor: Tensor, terms: LossTerms, with_gradient: bool) -> _Tile:
    """Works in `raw`, the linear map's output `[tokens, vocabulary]` in float32 or wider."""
    counted = labels != terms.ignore_index
    targets = labels.masked_fill(~counted, 0)[:, None]
    x = raw if terms.multiplier == 1 else raw.mul_(terms.multiplier)
    slope = None
    if terms.softcap is not None:
        x = x.div_(terms.softcap).tanh_()
        slope = 1 - x * x
        x = x.mul_(terms.softcap)
    smooth = terms.label_smoothing
    linear = (1 - smooth) * x.gather(1, targets)
    if smooth:
        linear = linear + smooth * x.mean(1, keepdim=True)
    highest = x.amax(1, keepdim=True)
    weights = x.sub_(highest).exp_()
    normaliser = weights.sum(1, keepdim=True)
    lse = highest + normaliser.log()
    loss = lse - linear
    if terms.z_loss:
        loss = loss + terms.z_loss * lse * lse
    counts = counted[:, None].to(factor.dtype) * factor
    total = (loss * counts).sum()
    if not with_gradient:
        return _Tile(total, None)
    # d lse / dx is the softmax; everything else about a token is a number a row.
    gradient = weights.mul_((1 + 2 * terms.z_loss * lse) / normaliser)
    if smooth:
        gradient.sub_(smooth / x.shape[1])
    gradient.scatter_add_(1, targets, torch.full_like(linear, smooth - 1))
    if slope is not None:
        gradient.mul_(slope)
    return _Tile(total, gradient.mul_(counts * terms.multiplier))


def _check(hidden: Tensor, weight: Tensor, labels: Tensor, tile: int, terms: LossTerms, shard_length: int | None = None) -> None:
    asked = f"a tiled loss of hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, labels {tuple(labels.shape)}"
    fits = hidden.ndim == 3 and weight.ndim == 2 and hidden.shape[:-1] == labels.shape and hidden.shape[-1] == weight.shape[1]
    if not fits:
        rule = "hidden is [batch, shard, hidden], weight [vocabulary, hidden], labels [batch, shard]"
        raise RingspanError(asked, "the shapes do not belong together", rule, "the decoder's last_hidden_state and lm_head.weight")
    if shard_length is not None and hidden.shape[1] != shard_length:
        rule = "Hidden states and labels are this rank's shard"
        raise RingspanError(asked, f"this rank owns {shard_length} positions", rule, "the labels of seq.shard_batch(batch)")
    if type(tile) is not int or tile < 1:
        raise RingspanError(f"loss_tile={tile!r}", "", "A tile is a whole number of at least one token", "loss_tile=2048")
    terms.check()
