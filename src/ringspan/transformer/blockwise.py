"""Blockwise parts of a layer (Blockwise Parallel Transformer, 2305.19370): what is wide exists for a few tokens at a time, both ways."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ringspan.errors import RingspanError, UnsupportedError
from ringspan.kernels import autocast_dtype, first_order
from ringspan.transformer.accumulate import GradientSums, SumLinearGradients
from ringspan.transformer.fused import can_fuse, feed_forward, fused_rms_norm, known_norm
from ringspan.transformer.layers import original_forward, replace_forward, restore_forward
from ringspan.transformer.plain_parameters import Place, plain_parameters, using

_CHUNK = "_ringspan_chunk"
_ACTIVATIONS = ("torch.nn.modules.activation", "transformers.activations")
_NORMS = ("RMSNorm", "LayerNorm")


def blockwise(module: nn.Module, chunk: int | None) -> None:
    """Makes a feed-forward part or a norm run `chunk` tokens at a time, forward and backward. In place; None takes it back.

    The forward keeps the input and nothing else. The backward recomputes one chunk after the other, so that a feed-forward's intermediate,
    or the float32 that transformers computes norms in, exists for `chunk` tokens whatever the length. The parameters' gradients are summed
    over the chunks in float32 and rounded once. Nothing else changes: the output is the same function of the same weights, and parameters
    without a gradient, adapters among them, stay so. On a GPU the norms and gated feed-forwards that `ringspan.transformer.fused` knows are
    fused as well.

    The backward costs one forward more, as under any rematerialisation. In a layer that is itself computed again a feed-forward costs none
    more than that where the layer's output is the plain sum of this part's and the residual (Llama, Qwen, Mistral): computing the layer
    again stops before this part runs. Where a norm follows it (Gemma) it runs once more.

    Args:
        module: maps every position of `[batch, seq, hidden]` by itself, to the same shape.
        chunk: tokens, batch × positions.

    Raises:
        RingspanError: for a chunk below 1.
        UnsupportedError: for a module that holds anything but linear maps, activations and norms, or dropout that is on.
    """
    if chunk is None:
        restore_forward(module)
        vars(module).pop(_CHUNK, None)
        return
    if type(chunk) is not int or chunk < 1:
        rule = "A chunk is a whole number of at least one token"
        raise RingspanError(f"feed_forward_chunk={chunk!r}", "", rule, "feed_forward_chunk=4096")
    check_position_wise(module)
    setattr(module, _CHUNK, chunk)
    replace_forward(module, _forward)


def take_back(model: nn.Module) -> None:
    """Undoes `blockwise` in every part of a model that it was called with."""
    for part in model.modules():
        if _CHUNK in vars(part):
            blockwise(part, None)


def norms_of(module: nn.Module) -> list[nn.Module]:
    """The norms among a layer's or a decoder's own parts: those of hidden states, and not of heads."""
    return [part for part in module.children() if type(part).__name__.endswith(_NORMS)]


def check_position_wise(module: nn.Module) -> None:
    """That every part of a module maps each position by itself, as far as its types tell.

    Raises:
        UnsupportedError: naming the part that is not known to.
    """
    for name, part in module.named_modules():
        if isinstance(part, nn.Dropout) and part.p > 0:
            raise _unsupported(module, f"{name} drops {part.p} of the elements", "its dropout set to 0")
        if next(part.children(), None) is not None:
            if next(part.parameters(recurse=False), None) is not None:
                raise _unsupported(module, f"{name or 'itself'} is a {type(part).__name__} with parameters of its own")
            continue
        if isinstance(part, (nn.ModuleDict, nn.ParameterDict, nn.ModuleList)) and next(part.parameters(), None) is None:
            # Adapters bring empty shelves.
            continue
        known = isinstance(part, nn.Linear | nn.Identity | nn.Dropout) or type(part).__name__.endswith(_NORMS)
        if not (known or type(part).__module__.startswith(_ACTIVATIONS)):
            raise _unsupported(module, f"{name or 'itself'} is a {type(part).__name__}")


def _unsupported(module: nn.Module, found: str, nearest: str = "feed_forward_chunk=None") -> UnsupportedError:
    return UnsupportedError(
        f"a blockwise {type(module).__name__}", found, "What runs by chunks is known to map every position by itself", nearest
    )


def _forward(self: nn.Module, x: Tensor) -> Tensor:
    # On a tensor axis what is saved and summed are this rank's own parts of the parameters; autograd takes it from there.
    values = plain_parameters(self)
    with using(values):
        norm = known_norm(self)
        if norm is not None and can_fuse(x):
            # It holds nothing wide, whatever the length.
            weight: Any = self._parameters["weight"]
            return fused_rms_norm(x, weight, norm)
        return _run_blockwise(self, x, [place for place, value in values if value.requires_grad])


def _run_blockwise(self: nn.Module, x: Tensor, places: list[Place]) -> Tensor:
    chunk = getattr(self, _CHUNK)
    parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
    if not torch.is_grad_enabled() or not (x.requires_grad or parameters):
        return _run(self, x, chunk)
    # Two nodes, so that what is saved is saved before anything runs: a checkpoint around the layer, which stops recomputing once it has
    # all that was saved, then never runs the feed-forward for nothing. The gradient of the output passes unchanged through the second.
    return _Run.apply(_Keep.apply(x, self, chunk, places, *parameters), x.detach(), self, chunk)


class _Run(torch.autograd.Function):
    @staticmethod
    def forward(ctx, carrier: Tensor, x: Tensor, module: nn.Module, chunk: int) -> Tensor:
        return _run(module, x, chunk)

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        return gradients[0], None, None, None


class _Keep(torch.autograd.Function):
    """Keeps the input; its backward is given the gradient of the output, since nothing but `_Run` sees what it returns."""

    @staticmethod
    def forward(ctx, x: Tensor, module: nn.Module, chunk: int, places: list[Place], *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(x, *parameters)
        ctx.module, ctx.chunk, ctx.places, ctx.autocast = module, chunk, places, (x.device.type, autocast_dtype(x.device.type))
        dtype = x.dtype
        for parameter in module.parameters():
            dtype = torch.promote_types(dtype, parameter.dtype)
        # What it returns carries a gradient back and no values. Of the output's dtype, or autograd would round that gradient.
        return x.view_as(x) if dtype == x.dtype else torch.empty((), dtype=dtype, device=x.device).expand(x.shape)

    @staticmethod
    @first_order
    def backward(ctx, *gradients: Tensor):
        (gradient,) = gradients
        x, *parameters = ctx.saved_tensors
        sums = GradientSums(parameters)
        values = list(zip(ctx.places, parameters, strict=True)) if ctx.places else []
        dx = torch.empty_like(x, memory_format=torch.contiguous_format) if ctx.needs_input_grad[0] else None
        for part, piece, out in _chunks(ctx.chunk, x, gradient, dx):
            leaf = part.detach().requires_grad_(dx is not None)
            with torch.enable_grad(), ExitStack() as within:
                for context in (*_entered(*ctx.autocast), SumLinearGradients(sums), using(values)):
                    within.enter_context(context)
                y = _call(ctx.module, leaf)
            wanted = ([leaf] if dx is not None else []) + parameters
            found = torch.autograd.grad(y, wanted, piece.to(y.dtype), allow_unused=True)
            if out is not None:
                first, *found = found
                out.copy_(first) if first is not None else out.zero_()
            sums.add(tuple(found))
        return dx, None, None, None, *sums.results()


def _run(module: nn.Module, x: Tensor, chunk: int) -> Tensor:
    out: Tensor | None = None
    flat = x.flatten(0, -2)
    for start in range(0, flat.shape[0], chunk):
        part = flat[None, start : start + chunk]
        y = _call(module, part)
        if not isinstance(y, Tensor) or y.shape != part.shape:
            found = f"it maps {tuple(part.shape)} to {tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__}"
            raise _unsupported(module, found)
        if out is None:
            out = y.new_empty(x.shape)
        out.view_as(flat)[start : start + chunk] = y[0]
    return _call(module, x) if out is None else out


def _call(module: nn.Module, x: Tensor) -> Any:
    """What `module` makes of `x`."""
    return feed_forward(module, original_forward(module), x)


def _chunks(chunk: int, x: Tensor, gradient: Tensor, dx: Tensor | None) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    flat_x, flat_gradient, flat_dx = (None if each is None else each.flatten(0, -2) for each in (x, gradient, dx))
    assert flat_x is not None and flat_gradient is not None
    for start in range(0, flat_x.shape[0], chunk):
        rows = slice(start, start + chunk)
        yield flat_x[None, rows], flat_gradient[None, rows], None if flat_dx is None else flat_dx[None, rows]


def _entered(device: str, dtype: torch.dtype | None) -> list[AbstractContextManager[Any]]:
    # Casts of weights are not kept from one chunk to the next: their graph is gone with the chunk.
    return [] if dtype is None else [torch.autocast(device, dtype, cache_enabled=False)]
