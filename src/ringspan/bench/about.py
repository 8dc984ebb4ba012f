"""Where numbers come from: the commit, the machine, the versions."""

from __future__ import annotations

import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "triton", "flash-attn-4", "flash-attn", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12", "nvidia-nccl-cu13",
            "nvidia-nccl-cu12", "ring-flash-attn", "yunchang")  # fmt: skip


def about(device: torch.device, num_ranks: int, backend: str) -> dict[str, Any]:
    """Commit (and whether files differ from it), date, hardware, versions."""
    return {
        "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {platform.machine()}",
        "num_ranks": num_ranks,
        "backend": backend,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "python": platform.python_version(),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        "versions": {name: version for name in PACKAGES if (version := _version(name)) is not None},
    }


def commit() -> str:
    """The commit of the source that runs, `+` behind it where files differ; empty where it is not under git."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=False, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    found = git("rev-parse", "--short", "HEAD")
    return found + "+" * bool(found and git("status", "--porcelain", "--untracked-files=no"))


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
