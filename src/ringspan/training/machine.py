"""Whether this machine can compute what was asked for: device, strategy, layout, mask and kernel."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

from ringspan.errors import RingspanError
from ringspan.training.config import TrainingConfig, check_name
from ringspan.training.model import head_sizes
from ringspan.training.spread import context_ranks

Result = TypeVar("Result")


def settled_device(config: TrainingConfig) -> str:
    """`"cuda"` or `"cpu"`.

    Raises:
        RingspanError: where there are fewer GPUs than ranks that want one.
    """
    import torch

    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", config.ranks))
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if config.device == "cuda" and gpus < local_ranks:
        nearest = f"--ranks {gpus}, or --device cpu" if gpus else "--device cpu"
        raise RingspanError(
            f"--device cuda with {local_ranks} ranks", f"this machine has {gpus} CUDA devices", "NCCL wants one GPU a rank", nearest
        )
    if config.device == "auto":
        return "cuda" if gpus >= local_ranks else "cpu"
    return config.device


def check_attention(config: TrainingConfig) -> None:
    """Strategy, layout and mask by themselves, and together at this context on these ranks.

    Raises:
        RingspanError: for a name that there is not, and a combination that cannot be computed.
    """
    from ringspan.geometry import LAYOUTS, looks_ahead, make_layout, parse_mask
    from ringspan.strategies import STRATEGIES, make_schedules

    check_name("strategy", config.strategy, (*STRATEGIES, "auto"))
    check_name("layout", config.layout, (*LAYOUTS, "auto"))
    mask = _said_as(f"--mask {config.mask}", "--mask causal", lambda: parse_mask(config.mask))
    if looks_ahead(mask):
        raise RingspanError(
            f"--mask {config.mask}",
            "it shows a token what follows it",
            "A token that sees its successor has nothing to predict",
            "--mask causal",
        )
    ranks = context_ranks(config)
    asked = f"--strategy {config.strategy} --layout {config.layout} --mask {config.mask} --context {config.context}"
    asked += f" --ranks {config.ranks}" if ranks == config.ranks else f" over {ranks} ranks"
    # What auto chooses from holds the ring, which nothing refuses.
    strategy = "ring" if config.strategy == "auto" else config.strategy
    layout = _said_as(asked, None, lambda: make_layout(config.layout, config.context, ranks, mask=mask))
    if empty := [rank for rank, length in enumerate(layout.shard_lengths) if not length]:
        found = f"rank {empty[0]} would own none of the {config.context} tokens"
        raise RingspanError(asked, found, "A model computes at least one token on every rank", f"--context {2 * ranks}, or fewer ranks")
    _said_as(asked, None, lambda: make_schedules(strategy, layout, mask))


def check_kernel(config: TrainingConfig, model: str, device: str) -> None:
    """Whether the kernel computes the model's heads here.

    Raises:
        RingspanError: where it does not.
    """
    import torch

    from ringspan.attention.checks import features
    from ringspan.geometry import parse_mask
    from ringspan.kernels import KERNELS, Problem, select_kernel

    check_name("kernel", config.kernel, ("auto", *KERNELS))
    heads, kv_heads, head_dim = head_sizes(model)
    problem = Problem(
        device=device,
        dtype=getattr(torch, config.dtype),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        features=features(parse_mask(config.mask), None),
    )
    _said_as(f"--kernel {config.kernel}", "--kernel auto", lambda: select_kernel(config.kernel, problem))


def _said_as(asked: str, nearest: str | None, check: Callable[[], Result]) -> Result:
    """Calls `check`, and puts its error in terms of the command line."""
    try:
        return check()
    except RingspanError as error:
        raise RingspanError(asked, error.found or error.asked, error.rule, nearest or error.nearest) from None
