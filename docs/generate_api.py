"""Write `docs/api/*.md`: a page for each room, from the docstrings of its public names (`make docs`).

Public is what a room's `__all__` names. A name has its entry on the page of the lowest room that shows it; other pages point there.
Signatures are taken from the source as their author wrote them, so that the pages do not depend on the Python that runs this.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import pkgutil
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import ringspan

PAGES = Path(__file__).parent / "api"
# Bottom to top, as in the house plan; a module that is not named here comes after these.
ROOMS = (
    *("errors", "geometry", "schedule", "strategies", "kernels", "transport", "attention", "verify", "bench", "trace"),
    *("transformer", "training", "inference", "planner", "viz", "cli", "transformers"),
)
WIDTH = 100
SECTIONS = ("Args", "Returns", "Yields", "Raises", "Attributes", "Shapes", "Example", "Examples")


@dataclass(frozen=True)
class Name:
    """A public name: where it is shown, what it is, and the docstring that its author wrote for it (None where there is none)."""

    module: str
    name: str
    value: Any
    docstring: str | None
    signature: str | None = None


# --- reading ---------------------------------------------------------------------------------------------------------------------


def modules() -> list[ModuleType]:
    """The rooms from bottom to top."""
    found = [info.name for info in pkgutil.iter_modules(ringspan.__path__) if not info.name.startswith("_")]
    order = {name: place for place, name in enumerate(ROOMS)}
    return [importlib.import_module(f"ringspan.{name}") for name in sorted(found, key=lambda name: (order.get(name, len(order)), name))]


def public_names(module: ModuleType) -> list[Name]:
    """What `module.__all__` names, in alphabetical order; for a module without `__all__`, nothing."""
    return [read_name(module, name) for name in sorted(getattr(module, "__all__", ()), key=lambda name: (name.lower(), name))]


def read_name(module: ModuleType, name: str) -> Name:
    """The public name `name` of `module`, with its docstring and signature."""
    value = getattr(module, name)
    if inspect.isclass(value):
        return Name(module.__name__, name, value, class_docstring(value), class_signature(name, value))
    if inspect.ismodule(value):
        return Name(module.__name__, name, value, inspect.getdoc(value))
    if callable(value) and inspect.isfunction(inspect.unwrap(value)):
        return Name(module.__name__, name, value, inspect.getdoc(value), function_signature(name, value))
    return Name(module.__name__, name, value, *constant(module, name))


def members(cls: type) -> Iterator[Name]:
    """The public methods and properties that `cls` itself defines, in the order of its source."""
    for name, value in vars(cls).items():
        if name.startswith("_"):
            continue
        function = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        if isinstance(function, property | functools.cached_property):
            getter = function.fget if isinstance(function, property) else function.func
            yield Name(cls.__module__, name, value, inspect.getdoc(getter), property_signature(name, getter))
        elif inspect.isfunction(inspect.unwrap(function)):
            yield Name(cls.__module__, name, value, inspect.getdoc(function), function_signature(name, function, method=True))


def class_docstring(cls: type) -> str | None:
    """The class's own docstring; neither an inherited one nor the one that `dataclass` writes."""
    own = cls.__dict__.get("__doc__")
    return None if own is None or own.startswith(f"{cls.__name__}(") else inspect.cleandoc(own)


@functools.cache
def tree(module: str) -> ast.Module:
    """The syntax tree of a module's source."""
    return ast.parse(inspect.getsource(importlib.import_module(module)))


def node_of(value: Any) -> Any:
    """The syntax tree of a function or class."""
    return ast.parse(textwrap.dedent(inspect.getsource(value))).body[0]


def constant(module: ModuleType, name: str) -> tuple[str | None, str | None]:
    """The string written below the assignment of a constant, followed through imports, and its declared type or, if short, its value."""
    body = tree(module.__name__).body
    for statement, below in zip(body, [*body[1:], None], strict=True):
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            declared = f"{name}: {ast.unparse(statement.annotation)}" if isinstance(statement, ast.AnnAssign) else ast.unparse(statement)
            written = below.value.value if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) else None
            return (inspect.cleandoc(written) if isinstance(written, str) else None), (declared if len(declared) <= WIDTH else None)
        if isinstance(statement, ast.ImportFrom) and statement.module and not statement.level:
            for alias in statement.names:
                if (alias.asname or alias.name) == name:
                    return constant(importlib.import_module(statement.module), alias.name)
    return None, None


# --- signatures ------------------------------------------------------------------------------------------------------------------


def function_signature(name: str, function: Any, *, method: bool = False) -> str:
    """`name(arguments) -> result`; a method's own object or class is left out."""
    node = node_of(inspect.unwrap(function))
    static = any(ast.unparse(decorator) == "staticmethod" for decorator in node.decorator_list)
    result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return call(name, arguments(node.args, skip_first=method and not static), result)


def property_signature(name: str, getter: Any) -> str:
    """`name: type`."""
    returns = node_of(getter).returns
    return f"{name}: {ast.unparse(returns)}" if returns else name


def class_signature(name: str, cls: type) -> str:
    """How the class is called: the arguments of its own `__init__`, or the fields of a dataclass."""
    node = node_of(cls)
    for statement in node.body:
        if isinstance(statement, ast.FunctionDef) and statement.name == "__init__":
            return f"class {call(name, arguments(statement.args, skip_first=True))}"
    if not getattr(cls, "__dataclass_fields__", None):
        bases = [ast.unparse(base) for base in node.bases]
        return f"class {call(name, bases)}" if bases else f"class {name}"
    keyword_only = any("kw_only=True" in ast.unparse(decorator) for decorator in node.decorator_list)
    fields = [field for base in reversed(cls.__mro__) if "__dataclass_fields__" in vars(base) for field in own_fields(base)]
    return f"class {call(name, ['*', *fields] if keyword_only and fields else fields)}"


def own_fields(cls: type) -> list[str]:
    """The fields that a dataclass itself declares, as arguments; those that its `__init__` does not take are left out."""
    fields = []
    for statement in node_of(cls).body:
        if isinstance(statement, ast.AnnAssign) and "ClassVar" not in ast.unparse(statement.annotation):
            default = f" = {ast.unparse(statement.value)}" if statement.value else ""
            if "init=False" not in default:
                fields.append(f"{ast.unparse(statement.target)}: {ast.unparse(statement.annotation)}{default}")
    return fields


def arguments(node: ast.arguments, *, skip_first: bool) -> list[str]:
    """Each argument as it is written, with the lone `*` and `/` that divide them."""
    positional = [*node.posonlyargs, *node.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(node.defaults)) + list(node.defaults)
    written = [argument(arg, default) for arg, default in zip(positional, defaults, strict=True)]
    if node.posonlyargs:
        written.insert(len(node.posonlyargs), "/")
    if skip_first:
        written = written[1:]
    if node.vararg:
        written.append("*" + argument(node.vararg, None))
    elif node.kwonlyargs:
        written.append("*")
    written += [argument(arg, default) for arg, default in zip(node.kwonlyargs, node.kw_defaults, strict=True)]
    return [*written, "**" + argument(node.kwarg, None)] if node.kwarg else written


def argument(arg: ast.arg, default: ast.expr | None) -> str:
    """`name: type = default`."""
    annotation = f": {ast.unparse(arg.annotation)}" if arg.annotation else ""
    equals = " = " if annotation else "="
    return f"{arg.arg}{annotation}" + (f"{equals}{ast.unparse(default)}" if default else "")


def call(name: str, written: list[str], result: str = "") -> str:
    """`name(a, b) -> result` on one line, or an argument a line where that is too long."""
    line = f"{name}({', '.join(written)}){result}"
    if len(line) <= WIDTH or not written:
        return line
    return f"{name}(\n" + "".join(f"    {one},\n" for one in written) + f"){result}"


# --- writing ---------------------------------------------------------------------------------------------------------------------


def markdown(docstring: str) -> str:
    """A docstring as Markdown: indented blocks become fenced ones, `Args:` and the like become lists, loose signs are escaped."""
    lines, out, place = docstring.splitlines(), [], 0
    while place < len(lines):
        line = lines[place]
        block, after = indented(lines, place + 1)
        if line.rstrip(":") in SECTIONS and line.endswith(":") and block:
            out += ["", f"**{line[:-1]}**", "", *(section(block) if not line.startswith("Example") else fence(block))]
            place = after
        elif line.startswith("    "):
            block, place = indented(lines, place)
            out += fence(block)
        else:
            out.append(escape(line[:-1] if line.endswith("::") else line))
            place += 1
    return re.sub(r"\n{3,}", "\n\n", "\n".join(out)).strip()


def indented(lines: list[str], start: int) -> tuple[list[str], int]:
    """The indented lines from `start` on, blank ones between them included, dedented; and the place of the line after them."""
    stop = start
    for place in range(start, len(lines)):
        if lines[place].startswith("    "):
            stop = place + 1
        elif lines[place].strip():
            break
    return textwrap.dedent("\n".join(lines[start:stop])).strip("\n").splitlines(), stop


def fence(block: list[str]) -> list[str]:
    """A fenced block; Python where it looks like an interpreter's or a program's lines."""
    python = any(re.match(r">>> |import |from \w|\w+ = \w", line) for line in block)
    return ["", f"```{'python' if python else 'text'}", *block, "```", ""]


def section(block: list[str]) -> list[str]:
    """`name: text` entries as a list; lines that are indented further belong to the entry above them."""
    out: list[str] = []
    for line in block:
        if line.startswith(" ") and out:
            out.append(f"  {escape(line.strip())}")
        elif line.strip():
            head, colon, text = line.partition(": ")
            named = colon and re.fullmatch(r"\*{0,2}[\w., |\[\]]+", head)
            out.append(f"- `{head}`: {escape(text)}" if named else f"- {escape(line)}")
    return [*out, ""]


def escape(line: str) -> str:
    """`line` with the signs that Markdown would swallow outside of code escaped; a list's leading `*` stays."""
    parts = re.split(r"(`+[^`]*`+)", line)
    return "".join(part if part.startswith("`") else re.sub(r"<|(?<=\S)\*|\*(?=\S)|(?<!\w)__(?=\w)", r"\\\g<0>", part) for part in parts)


def first_sentence(docstring: str | None) -> str:
    """The docstring's first paragraph up to its first full stop, on one line."""
    paragraph = " ".join((docstring or "").split("\n\n")[0].split())
    return escape(re.split(r"(?<=[.:;]) (?=[A-Z`])|::$", paragraph, maxsplit=1)[0])


def entry(name: Name) -> list[str]:
    """A name's part of its room's page."""
    out = [f"## `{name.name}`", ""]
    if name.signature:
        out += ["```python", name.signature, "```", ""]
    out += [markdown(name.docstring or ""), ""]
    if isinstance(name.value, dict) and name.value and all(isinstance(key, str) for key in name.value):
        for key, value in name.value.items():
            documented = inspect.isclass(value) or inspect.isfunction(inspect.unwrap(value))
            out.append(f"- `{key}`" + (f": {first_sentence(inspect.getdoc(value))}" if documented and inspect.getdoc(value) else ""))
        out.append("")
    if inspect.isclass(name.value):
        for member in members(name.value):
            out += [
                f"### `{name.name}.{member.name}`",
                "",
                "```python",
                member.signature or "",
                "```",
                "",
                markdown(member.docstring or ""),
                "",
            ]
    return out


def homes(rooms: list[ModuleType]) -> dict[tuple[str, int], str]:
    """For each public name and object, the lowest room that shows it."""
    found: dict[tuple[str, int], str] = {}
    for room in rooms:
        for name in getattr(room, "__all__", ()):
            found.setdefault((name, id(getattr(room, name))), room.__name__)
    return found


def page(module: ModuleType, home: dict[tuple[str, int], str]) -> str:
    """The page of one module: its own names in full, and where the others are described."""
    out = [f"# {module.__name__}", "", markdown(inspect.getdoc(module) or ""), ""]
    elsewhere = []
    for name in public_names(module):
        room = home.get((name.name, id(name.value)), module.__name__)
        if inspect.ismodule(name.value):
            elsewhere.append(link(name, name.value.__name__, anchor=False))
        elif room != module.__name__:
            elsewhere.append(link(name, room))
        else:
            out += entry(name)
    if elsewhere:
        out += ["## Described elsewhere", "", *elsewhere, ""]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(out)).strip() + "\n"


def link(name: Name, room: str, *, anchor: bool = True) -> str:
    """One line that points to a name's entry. Of two names that differ in case alone, a page calls the second one's entry `…-1`."""
    earlier = {other.lower() for other in getattr(importlib.import_module(room), "__all__", ()) if other < name.name}
    slug = name.name.lower() + ("-1" if name.name.lower() in earlier else "")
    target = f"{room}.md" + (f"#{slug}" if anchor else "")
    return f"- [`{name.name}`]({target}): {first_sentence(name.docstring)}"


def pages() -> dict[str, str]:
    """Every page by its file name."""
    rooms = modules()
    home = homes(rooms)
    documented = [ringspan, *(room for room in rooms if getattr(room, "__all__", ()))]
    index = ["# Public names", "", "Written by `make docs` from the docstrings; do not edit. The rooms are listed from bottom to top.", ""]
    index += [f"- [`{module.__name__}`]({module.__name__}.md): {first_sentence(inspect.getdoc(module))}" for module in documented]
    return {"index.md": "\n".join(index) + "\n"} | {f"{module.__name__}.md": page(module, home) for module in documented}


def main() -> None:
    """Write the pages, and delete those that no longer have a room."""
    PAGES.mkdir(exist_ok=True)
    written = pages()
    for stale in {path.name for path in PAGES.glob("*.md")} - set(written):
        (PAGES / stale).unlink()
    for name, text in written.items():
        (PAGES / name).write_text(text, encoding="utf-8")
    print(f"{len(written)} pages in {PAGES}")


if __name__ == "__main__":
    main()
