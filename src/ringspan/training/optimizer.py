"""AdamW over float32 master weights, with warm-up, schedules, and clipping by the norm of all gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ringspan.training.low_memory import check_blocks, make_low_memory, parts_of, stepping

_MOMENTS = ("exp_avg", "exp_avg_sq")


def learning_rate_at(step: int, *, peak: float, warmup_steps: int, steps: int, schedule: str = "cosine", final_rate: float = 0.1) -> float:
    """The learning rate of `step` (from 1): linear up to `peak`, then by `schedule` to `final_rate · peak` at `steps`.

    With p = (step − warmup_steps) / (steps − warmup_steps): `cosine` is peak · (f + (1 − f) · (1 + cos πp) / 2), `linear` is
    peak · (1 − (1 − f) · p), `constant` stays at the peak.
    """
    if step <= warmup_steps:
        return peak * step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    if schedule == "constant":
        return peak
    if schedule == "linear":
        return peak * (1 - (1 - final_rate) * progress)
    return peak * (final_rate + (1 - final_rate) * 0.5 * (1 + math.cos(math.pi * progress)))


class Optimizer:
    """Steps the parameters of `model` through float32 copies of them, or in place where they are float32 already.

    A bfloat16 weight near 1 cannot take a step below 0.004; the float32 master can.

    Args:
        model: whose parameters that have a gradient are trained.
        weight_decay: of matrices.
        gradient_clip: largest norm of all gradients together.
        kind: `"adamw"`, or one of `ringspan.training.low_memory.BLOCKS`, whose moments have few bits.

    Raises:
        RingspanError: where moments of few bits cannot be had, or not of these parameters.

    Attributes:
        masters: the float32 weights by name, whose `.grad` a step follows.
        updates: steps taken.
    """

    def __init__(self, model: nn.Module, *, weight_decay: float, gradient_clip: float, kind: str = "adamw") -> None:
        self._parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.masters: dict[str, Tensor] = {
            name: parameter if parameter.dtype == torch.float32 else nn.Parameter(parameter.detach().float())
            for name, parameter in self._parameters.items()
        }
        self.updates = 0
        self._gradient_clip = gradient_clip
        matrices = [master for master in self.masters.values() if master.dim() >= 2]
        vectors = [master for master in self.masters.values() if master.dim() < 2]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        groups = [group for group in groups if group["params"]]
        if kind == "adamw":
            # foreach and fused give other roundings on other devices; for-loops are fast enough for weights in the millions on a CPU.
            self._adam = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8)
            self._stepping: Callable[[], AbstractContextManager[object]] = nullcontext
        else:
            check_blocks(kind, self.masters)
            self._adam = make_low_memory(kind, groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8)
            self._stepping = lambda: stepping(next(iter(self.masters.values())).device)

    @torch.no_grad()
    def collect(self) -> None:
        """Adds the parameters' gradients to the masters' in float32 and clears them; where a parameter is its own master, autograd has.

        Called after each backward pass: gradients that are summed in bfloat16 lose what is below 1/256 of the sum.
        """
        for name, parameter in self._parameters.items():
            master = self.masters[name]
            if master is parameter or parameter.grad is None:
                continue
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad.add_(parameter.grad)
            parameter.grad = None

    @torch.no_grad()
    def gradient_norm(self) -> Float[Tensor, ""]:
        """The norm of all gradients together, before clipping."""
        self.collect()
        return nn.utils.get_total_norm([master.grad for master in self.masters.values() if master.grad is not None])

    def discard(self) -> None:
        """Clears the gradients without a step."""
        self._adam.zero_grad()
        for parameter in self._parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def step(self, learning_rate: float) -> Float[Tensor, ""]:
        """Takes one step along the gradients, clears them, and returns their norm before clipping."""
        self.collect()
        norm = nn.utils.clip_grad_norm_(self.masters.values(), self._gradient_clip)
        for group in self._adam.param_groups:
            # A tensor stays the one that it is: a step that has been compiled is given it.
            group["lr"] = group["lr"].fill_(learning_rate) if isinstance(group["lr"], Tensor) else learning_rate
        with self._stepping():
            self._adam.step()
        self.updates += 1
        for name, parameter in self._parameters.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])
        self.discard()
        return norm

    def moments(self) -> dict[str, Tensor]:
        """Both moments of every parameter, by `exp_avg.<name>` and `exp_avg_sq.<name>`; zeros before the first step.

        Of a moment of few bits its codes and scales, by `exp_avg.<name>.codes` and `exp_avg.<name>.scale`: these are what goes on exactly.
        """
        return {
            key: part
            for name, master in self.masters.items()
            for moment in _MOMENTS
            for key, part in parts_of(
                f"{moment}.{name}", self._adam.state[master].get(moment, torch.zeros_like(master, requires_grad=False))
            ).items()
        }

    @torch.no_grad()
    def restore(self, moments: dict[str, Tensor], step: int) -> None:
        """Takes up `moments` as they were after `step` updates, and copies the masters into the model."""
        self.updates = step
        for name, master in self.masters.items():
            if step:
                state = self._adam.state[master]
                state["step"] = torch.tensor(float(step))
                for moment in _MOMENTS:
                    key = f"{moment}.{name}"
                    if key in moments:
                        state[moment] = moments[key]
                    else:
                        for part, tensor in parts_of(key, state[moment]).items():
                            tensor.copy_(moments[part])
            if self._parameters[name] is not master:
                self._parameters[name].copy_(master)
