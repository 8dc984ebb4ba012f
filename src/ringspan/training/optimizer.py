"""AdamW over float32 master weights, with warm-up, a half cosine, and clipping by the norm of all gradients."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

_MOMENTS = ("exp_avg", "exp_avg_sq")


def learning_rate_at(step: int, *, peak: float, warmup_steps: int, steps: int) -> float:
    """The learning rate of `step` (from 1): linear up to `peak`, then half a cosine down to a tenth of it at `steps`."""
    if step <= warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


class Optimizer:
    """Steps the parameters of `model` through float32 copies of them, or in place where they are float32 already.

    A bfloat16 weight near 1 cannot take a step below 0.004; the float32 master can.
    """

    def __init__(self, model: nn.Module, *, weight_decay: float, gradient_clip: float) -> None:
        self._parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.masters: dict[str, Tensor] = {
            name: parameter if parameter.dtype == torch.float32 else parameter.detach().float()
            for name, parameter in self._parameters.items()
        }
        self._gradient_clip = gradient_clip
        matrices = [master for master in self.masters.values() if master.dim() >= 2]
        vectors = [master for master in self.masters.values() if master.dim() < 2]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        # foreach and fused give other roundings on other devices; for-loops are fast enough for weights in the millions on a CPU.
        self._adam = torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, betas=(0.9, 0.95), eps=1e-8)

    @torch.no_grad()
    def step(self, learning_rate: float) -> Float[Tensor, ""]:
        """Takes one step along the parameters' gradients, clears them, and returns their norm before clipping."""
        for name, parameter in self._parameters.items():
            if self.masters[name] is not parameter:
                self.masters[name].grad = None if parameter.grad is None else parameter.grad.float()
        norm = nn.utils.clip_grad_norm_(self.masters.values(), self._gradient_clip)
        for group in self._adam.param_groups:
            group["lr"] = learning_rate
        self._adam.step()
        for name, parameter in self._parameters.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])
                parameter.grad = None
        self._adam.zero_grad()
        return norm

    def moments(self) -> dict[str, Tensor]:
        """Both moments of every parameter, by `exp_avg.<name>` and `exp_avg_sq.<name>`; zeros before the first step."""
        return {
            f"{moment}.{name}": self._adam.state[master].get(moment, torch.zeros_like(master, requires_grad=False))
            for name, master in self.masters.items()
            for moment in _MOMENTS
        }

    @torch.no_grad()
    def restore(self, moments: dict[str, Tensor], step: int) -> None:
        """Takes up `moments` as they were after `step`, and copies the masters into the model."""
        for name, master in self.masters.items():
            if step:
                state = {moment: moments[f"{moment}.{name}"] for moment in _MOMENTS}
                self._adam.state[master] = {"step": torch.tensor(float(step)), **state}
            if self._parameters[name] is not master:
                self._parameters[name].copy_(master)
