"""The rooms of `src/ringspan` stand one above another; imports point only at rooms below, and the core needs torch and jaxtyping alone.

Imports are read from the syntax tree, so those inside functions and under `TYPE_CHECKING` count like any other.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "ringspan"

# Bottom to top. A room may import the rooms named before it, and itself.
ROOMS = (
    "errors",
    "geometry",
    "schedule",
    "strategies",
    "kernels",
    "transport",
    "attention",
    "compat",
    "verify",
    "bench",
    "trace",
    "transformer",
    "training",
    "inference",
    "planner",
    "viz",
    "cli",
)
# The planner never touches a device, so the rooms between it and the strategies are closed to it.
NARROWER = {"planner": {"errors", "geometry", "schedule", "strategies"}}
# Special files at the top: the package itself, which shows the core's public names and (late, when asked) the alias `transformers`;
# that alias of the transformer room; `python -m ringspan`.
SPECIAL = {
    "__init__": {*ROOMS[: ROOMS.index("attention") + 1], "transformers"},
    "transformers": {"transformer"},
    "__main__": {"cli"},
}

CORE = {"torch", "jaxtyping"}
MODELS = CORE | {"transformers", "safetensors", "tokenizers"}
THIRD_PARTY: dict[str, set[str]] = {
    "errors": set(),
    "geometry": set(),
    "schedule": set(),
    "strategies": set(),
    # Both only where a GPU is, and each with a fallback: Triton comes with torch there, FlashAttention-4 is an extra.
    "kernels": CORE | {"triton", "flash_attn"},
    "transport": CORE,
    "attention": CORE,
    "compat": CORE,
    "verify": CORE,
    # Beside the core: NVML's counter of joules and the peers, each where it is installed.
    "bench": CORE | {"pynvml", "flash_attn", "ring_flash_attn", "yunchang"},
    "trace": CORE,
    "transformer": MODELS,
    # Optional, each refused or left out with the reason where it is not installed.
    "training": MODELS | {"peft", "datasets", "pynvml", "torchao"},
    "inference": MODELS,
    "planner": set(),
    "viz": CORE | {"matplotlib", "rich"},
    "cli": MODELS | {"matplotlib", "rich", "typer"},
    "__init__": CORE,
    "transformers": set(),
    "__main__": set(),
}


@dataclass(frozen=True)
class Import:
    """`module` with its dots resolved, and the line where it is imported."""

    module: str
    line: int


def imports_of(source: str, package: str) -> Iterator[Import]:
    """Every module that `source`, a file of `package`, imports; `from a import b` counts as `a.b`, since b may be a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = parents[: len(parents) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            yield from (Import(f"{origin}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in {"__import__", "import_module", "importlib.import_module"}:
            target = node.args[0] if node.args else None
            if isinstance(target, ast.Constant) and isinstance(target.value, str) and not target.value.startswith("."):
                yield Import(target.value, node.lineno)


def violations(source: str, path: str) -> list[str]:
    """What `source`, read from `path` (relative to `src/ringspan`), imports against the rules, a sentence each."""
    parts = Path(path).with_suffix("").parts
    room = parts[0]
    if room not in ROOMS and (len(parts) > 1 or room not in SPECIAL):
        return [f"{path}: '{room}' is no room of DESIGN.md; the rooms are {', '.join(ROOMS)}"]
    below = set(ROOMS[: ROOMS.index(room) + 1]) if room in ROOMS else SPECIAL[room]
    allowed = NARROWER[room] | {room} if room in NARROWER else below
    package = ".".join(["ringspan", *parts[:-1]])
    found = []
    for imported in imports_of(source, package):
        top, _, rest = imported.module.partition(".")
        where = f"{path}:{imported.line}: '{room}' imports {imported.module}"
        if top == "ringspan":
            target = rest.partition(".")[0]
            if target not in ROOMS and target not in allowed:
                found.append(f"{where}; a name is imported from the room that defines it")
            elif target not in allowed:
                found.append(f"{where}; imports point only at rooms below")
        elif top not in sys.stdlib_module_names and top not in THIRD_PARTY[room]:
            found.append(f"{where}; of other packages this room may use {', '.join(sorted(THIRD_PARTY[room])) or 'none'}")
    return found


def test_imports_point_only_at_rooms_below_and_at_the_packages_that_a_room_may_use():
    files = sorted(SOURCE.rglob("*.py"))
    assert len(files) > 10, "the source is where the test looks for it"
    found = [line for file in files for line in violations(file.read_text(), file.relative_to(SOURCE).as_posix())]
    assert not found, "\n" + "\n".join(found)


def test_every_room_is_a_package():
    # Without its __init__.py a folder would import, but neither pages nor wheels would show what is public in it.
    folders = {file.parent for file in SOURCE.rglob("*.py")}
    bare = sorted(folder.relative_to(SOURCE).as_posix() for folder in folders if not (folder / "__init__.py").exists())
    assert not bare, f"no __init__.py in {', '.join(bare)}"


def test_every_room_has_its_rule():
    assert set(THIRD_PARTY) == {*ROOMS, *SPECIAL}
    for room in ("geometry", "schedule", "strategies", "planner"):
        assert "torch" not in THIRD_PARTY[room]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("geometry/mask.py", "import torch"),
        ("schedule/actions.py", "def late():\n    import torch.nn.functional as F"),
        ("strategies/ring.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from torch import Tensor"),
        ("planner/time.py", "import torch"),
        ("planner/time.py", "from ringspan.kernels import KERNELS"),
        ("geometry/span.py", "from ringspan.schedule import actions"),
        ("geometry/span.py", "from ..schedule.actions import Piece"),
        ("geometry/span.py", "from .. import attention"),
        ("geometry/span.py", "import ringspan.attention.executor"),
        ("errors.py", "from ringspan.geometry import Span"),
        ("errors.py", "from .geometry import Span"),
        ("schedule/nested/deep.py", "from ...strategies import STRATEGIES"),
        ("kernels/flash.py", "import importlib\nimportlib.import_module('ringspan.attention')"),
        ("kernels/flash.py", "import numpy"),
        ("attention/executor.py", "from transformers import AttentionInterface"),
        ("attention/executor.py", "from ringspan.transformer import register"),
        ("training/loop.py", "import typer"),
        ("cli/train.py", "import pandas"),
        ("cli/train.py", "from ringspan import ContextParallel"),
        ("transformer/hook.py", "import ringspan"),
        ("attention/executor.py", "from ringspan import transformers"),
        ("__init__.py", "from ringspan.transformer import register"),
        ("transformers.py", "from ringspan.training import loop"),
        ("utils/helpers.py", ""),
        ("helpers.py", ""),
    ],
)
def test_an_import_against_the_rules_is_caught(path: str, source: str):
    assert len(violations(source, path)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("geometry/mask.py", "from ringspan.geometry.span import Span\nfrom ringspan.errors import RingspanError\nimport functools"),
        ("strategies/ring.py", "from ..schedule import actions\nfrom .shared import helper"),
        ("kernels/reference.py", "import torch\nfrom jaxtyping import Float\nfrom ringspan.geometry import Tile"),
        ("planner/time.py", "from ringspan.strategies import make_schedules"),
        ("cli/train.py", "import typer\nfrom ringspan.viz import draw\nfrom ringspan.training.loop import train"),
        ("__init__.py", "from ringspan.attention import ContextParallel\nfrom .geometry import causal"),
        ("__init__.py", "def __getattr__(name):\n    from ringspan import transformers"),
        ("transformers.py", "from ringspan.transformer import register"),
        ("__main__.py", "from ringspan.cli.main import main"),
    ],
)
def test_an_import_within_the_rules_passes(path: str, source: str):
    assert violations(source, path) == []


def test_the_attention_core_imports_without_any_extra():
    extras = sorted(set().union(*THIRD_PARTY.values()) - CORE)
    # None in sys.modules makes an import of that name fail, as it fails where the package is not installed.
    program = f"import sys; sys.modules.update(dict.fromkeys({extras!r})); import ringspan; ringspan.ContextParallel"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
