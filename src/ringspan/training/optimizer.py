"""AdamW over float32 master weights, with warm-up, schedules, and clipping by the norm of all gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ringspan.training.low_memory import check_blocks, make_low_memory, parts_of, stepping
from ringspan.training.tensors import local_part
from ringspan.transformer.gradients import take_over

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
    """Steps the parameters of `model` through float32 copies of them, or in place where they are float32 already, as sharded ones are.

    A bfloat16 weight near 1 cannot take a step below 0.004; the float32 master can. Each rank steps its part of a sharded parameter, where
    that is, and the norm is that of all parts.

    Args:
        model: whose parameters that have a gradient are trained.
        weight_decay: of matrices.
        gradient_clip: largest norm of all gradients together.
        gather: every rank's numbers on every rank, in their order, as `Ranks.gather`; for sharded parameters.
        unrounded: the whole float32 weights, by name, that parameters of another dtype were rounded from: the masters begin with them, and
            may take over their memory. Of a name that is not there the master begins with the parameter.
        kind: `"adamw"`, or one of `ringspan.training.low_memory.BLOCKS`, whose moments have few bits.

    Raises:
        RingspanError: where moments of few bits cannot be had, or not of these parameters.

    Attributes:
        masters: the float32 weights by name, whose `.grad` a step follows.
        updates: steps taken.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        weight_decay: float,
        gradient_clip: float,
        kind: str = "adamw",
        gather: Callable[[list[float]], list[list[float]]] = lambda mine: [mine],
        unrounded: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.masters: dict[str, Tensor] = {
            name: parameter if parameter.dtype == torch.float32 else nn.Parameter(_first_of(parameter, (unrounded or {}).get(name)))
            for name, parameter in self._parameters.items()
        }
        self.updates = 0
        self._gradient_clip, self._gather = gradient_clip, gather
        matrices = [master for master in self.masters.values() if master.dim() >= 2]
        vectors = [master for master in self.masters.values() if master.dim() < 2]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        groups = [part for group in groups for part in _by_mesh(group) if part["params"]]
        self._is_sharded = any(isinstance(master, DTensor) for master in self.masters.values())
        if kind == "adamw":
            # foreach and fused give other roundings on other devices; for-loops are fast enough for weights in the millions on a CPU.
            # Sharded ones are more, on the host too, and a loop would go through DTensor's dispatch for each of its operations.
            self._adam = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8, fused=self._is_sharded or None)
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
        moved = {name: parameter for name, parameter in self._parameters.items() if self.masters[name] is not parameter}
        if self._is_sharded:
            take_over(moved.values())
        for name, parameter in moved.items():
            master = self.masters[name]
            if parameter.grad is None:
                continue
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad.add_(parameter.grad)
            parameter.grad = None

    @torch.no_grad()
    def gradient_norm(self) -> Float[Tensor, ""]:
        """The norm of all gradients together, before clipping. Collective where parameters are sharded."""
        self.collect()
        gradients = [master.grad for master in self.masters.values() if master.grad is not None]
        if not self._is_sharded:
            return nn.utils.get_total_norm(gradients)
        # Not over the mesh, whose groups carry tensors of its own device alone: gradients may be in host memory.
        mine = 0.0
        if gradients:
            norms = torch.stack([torch.linalg.vector_norm(local_part(gradient), dtype=torch.float32) for gradient in gradients])
            parts = torch.tensor([_num_parts(gradient) for gradient in gradients], dtype=torch.float64)
            mine = float((norms.double().cpu().square() * parts).sum())
        # A part that several ranks hold is counted by each of them: ranks / parts times.
        everyone = [theirs for (theirs,) in self._gather([mine])]
        return torch.tensor(math.sqrt(math.fsum(everyone) / len(everyone)))

    def discard(self) -> None:
        """Clears the gradients without a step."""
        self._adam.zero_grad()
        for parameter in self._parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def step(self, learning_rate: float, norm: Float[Tensor, ""] | None = None) -> Float[Tensor, ""]:
        """Takes one step along the gradients, clears them, and returns their norm before clipping; `norm` is that, where it is known."""
        self.collect()
        norm = self.gradient_norm() if norm is None else norm
        factor = (self._gradient_clip / (norm + 1e-6)).clamp(max=1.0)
        for master in self.masters.values():
            if master.grad is not None:
                local_part(master.grad).mul_(factor.to(master.grad.device))
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
        found: dict[str, Tensor] = {}
        for name, master in self.masters.items():
            state = self._adam.state[master]
            for moment in _MOMENTS:
                tensor = state[moment] if moment in state else torch.zeros_like(master.detach())
                found |= parts_of(f"{moment}.{name}", tensor)
        return found

    @torch.no_grad()
    def restore(self, moments: dict[str, Tensor], step: int) -> None:
        """Takes up `moments` as they were after `step` updates, and copies the masters into the model."""
        self.updates = step
        for name, master in self.masters.items():
            if step:
                state = self._adam.state[master]
                state["step"] = torch.tensor(float(step), device=master.device if self._is_sharded else None)
                for moment in _MOMENTS:
                    key = f"{moment}.{name}"
                    if key in moments:
                        state[moment] = moments[key]
                    else:
                        for part, tensor in parts_of(key, state[moment]).items():
                            tensor.copy_(moments[part])
            if self._parameters[name] is not master:
                self._parameters[name].copy_(master)


def _first_of(parameter: Tensor, unrounded: Tensor | None) -> Tensor:
    """What a parameter's master begins with: this rank's part of `unrounded`, where it is known."""
    if unrounded is None:
        return parameter.detach().float()
    if not isinstance(parameter, DTensor):
        return unrounded.detach()
    # Every rank has the whole: nothing is sent. A copy, since a part that is a view would hold the whole.
    return distribute_tensor(unrounded.detach(), parameter.device_mesh, parameter.placements, src_data_rank=None).clone()


def _by_mesh(group: dict[str, Any]) -> list[dict[str, Any]]:
    """A group of parameters as one for each mesh that they are sharded over: no operation takes tensors of two meshes at once."""
    meshes = [getattr(parameter, "device_mesh", None) for parameter in group["params"]]
    distinct = [mesh for place, mesh in enumerate(meshes) if mesh not in meshes[:place]]
    return [{**group, "params": [each for each, its in zip(group["params"], meshes, strict=True) if its == mesh]} for mesh in distinct]


def _num_parts(tensor: Tensor) -> int:
    """How many parts a tensor is in."""
    if not isinstance(tensor, DTensor):
        return 1
    # Rows that both a tensor axis and FSDP split are in strided shards, which do not call themselves shards.
    return math.prod(tensor.device_mesh.size(dim) for dim, placement in enumerate(tensor.placements) if not placement.is_replicate())
