"""The README and the guides, read by their parts: blocks of code, sections, tables."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
GUIDES = ("adding_a_strategy", "compile", "exactness", "gallery", "masks", "tracing", "training", "training_longer")
PAGES = (README, *(ROOT / "docs" / f"{name}.md" for name in GUIDES))


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; `follows` says whether nothing but an empty line stands between it and the block before."""

    page: Path
    line: int
    language: str
    text: str
    follows: bool


@cache
def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found, end = [], -1
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        follows = end >= 0 and not text[end : match.start()].strip()
        found.append(Block(page, text[: match.start()].count("\n") + 1, match[1], match[2], follows))
        end = match.end()
    return found


def section(page: Path, heading: str) -> str:
    """What stands under `## heading`."""
    match = re.search(rf"^##+ {re.escape(heading)}\n(.*?)(?=^## |\Z)", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert match is not None, f"{page.name} has no section {heading!r}"
    return match[1]


def rows(text: str) -> list[list[str]]:
    """The cells of every table row below a header."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    rules = [index for index, row in enumerate(cells) if all(set(cell) <= set("-:") for cell in row)]
    return [row for index, row in enumerate(cells) if index not in rules and index + 1 not in rules]


def named(text: str) -> list[str]:
    """The first cells of a table's rows, without their quotes."""
    return [row[0].strip("`") for row in rows(text)]


def in_order(shown: list[str], printed: list[str]) -> str | None:
    """The first line of `shown` that `printed` does not have where it belongs; `…` stands for lines left out."""
    place, free = 0, False
    for line in shown:
        if line.strip() == "…":
            free = True
            continue
        rest = printed[place:] if free else printed[place : place + 1]
        if line not in rest:
            return line
        place += rest.index(line) + 1
        free = False
    return None
