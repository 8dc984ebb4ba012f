"""The pages of `docs/api` say what the docstrings say, and every public name has a docstring."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).parents[1] / "docs"


def load_generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_api", DOCS / "generate_api.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


generator = load_generator()


def test_the_committed_pages_are_what_the_docstrings_give():
    expected = generator.pages()
    committed = {path.name: path.read_text(encoding="utf-8") for path in (DOCS / "api").glob("*.md")}
    stale = sorted(name for name in expected.keys() | committed.keys() if expected.get(name) != committed.get(name))
    assert not stale, f"run `make docs` and commit docs/api; these pages differ: {', '.join(stale)}"


def test_every_room_says_which_of_its_names_are_public():
    # The command line's public names are its commands.
    silent = [module.__name__ for module in generator.modules() if not hasattr(module, "__all__") and module.__name__ != "ringspan.cli"]
    assert not silent, f"no __all__ in {', '.join(silent)}"


def test_every_public_name_has_a_docstring():
    import ringspan

    missing = []
    for module in [ringspan, *generator.modules()]:
        missing += [] if inspect.getdoc(module) else [module.__name__]
        for name in generator.public_names(module):
            label = f"{module.__name__}.{name.name}"
            missing += [] if name.docstring else [label]
            if inspect.isclass(name.value):
                missing += [f"{label}.{member.name}" for member in generator.members(name.value) if not member.docstring]
    assert not missing, "no docstring (for a constant: no string below its assignment):\n" + "\n".join(missing)


@dataclass(frozen=True)
class Undocumented:
    size: int
    kind: str = "plain"


@dataclass(frozen=True, kw_only=True)
class Documented(Undocumented):
    """Documented."""

    total: int = 0

    @property
    def half(self) -> float:
        return self.total / 2

    def scaled(self, factor: int, /, *rest: int, name: str = "x", **options: object) -> int:
        """Scaled."""
        return self.total * factor


LIMIT: int = 3
"""How many."""

BARE = 4


def test_a_name_without_a_docstring_is_noticed():
    assert generator.class_docstring(Undocumented) is None  # dataclass writes one of its own, which says nothing
    assert generator.class_docstring(Documented) == "Documented."
    assert [(member.name, member.docstring) for member in generator.members(Documented)] == [("half", None), ("scaled", "Scaled.")]
    here = sys.modules[__name__]
    assert generator.constant(here, "LIMIT") == ("How many.", "LIMIT: int")
    assert generator.constant(here, "BARE") == (None, "BARE = 4")


def test_signatures_read_as_their_author_wrote_them():
    assert generator.class_signature("Undocumented", Undocumented) == "class Undocumented(size: int, kind: str = 'plain')"
    half, scaled = generator.members(Documented)
    assert half.signature == "half: float"
    assert scaled.signature == "scaled(factor: int, /, *rest: int, name: str = 'x', **options: object) -> int"


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("One line.", "One line."),
        ("Four tokens::\n\n    0 1 1 0\n\nAfter.", "Four tokens:\n\n```text\n0 1 1 0\n```\n\nAfter."),
        (
            "Sum.\n\nArgs:\n    x: the first,\n        continued.\n    y: the *second*.",
            "Sum.\n\n**Args**\n\n- `x`: the first,\n  continued.\n- `y`: the \\*second\\*.",
        ),
        ("Needs a<b, not `a<b`; i * j.", "Needs a\\<b, not `a<b`; i * j."),
    ],
)
def test_docstrings_become_markdown(docstring: str, expected: str):
    assert generator.markdown(docstring) == expected
