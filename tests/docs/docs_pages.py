"""The project's pages, taken apart: headings, blocks, links, tables, and the commands that they show."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[2]
_FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^(#{1,6}) (.+)$", re.MULTILINE)
_PROMPT = re.compile(r"^(?P<machine>\w*)\$ (?P<command>.+)$")


@dataclass(frozen=True)
class Block:
    """A fenced block, and the heading that it stands under."""

    language: str
    text: str
    heading: str


@dataclass(frozen=True)
class Page:
    """One Markdown file."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    @cached_property
    def text(self) -> str:
        return self.path.read_text()

    @cached_property
    def prose(self) -> str:
        """The text without its blocks."""
        return _FENCE.sub("", self.text)

    @cached_property
    def blocks(self) -> list[Block]:
        return [
            Block(match["language"], match["text"], self._heading_before(match.start()))
            for match in _FENCE.finditer(self.text)
        ]

    @cached_property
    def anchors(self) -> set[str]:
        """The anchors that GitHub gives the headings."""
        return {anchor_of(match[2]) for match in _HEADING.finditer(self.prose)}

    @cached_property
    def shell_lines(self) -> list[str]:
        """What is typed in the shell blocks; what else a console shows is output."""
        lines: list[str] = []
        for block in self.blocks:
            if block.language == "sh":
                lines += block.text.splitlines()
                continue
            if not block.language:
                lines += [line for line in block.text.splitlines() if line.startswith("knode ")]
            if block.language in ("", "console"):
                lines += [m["command"] for line in block.text.splitlines() if (m := _PROMPT.match(line))]
        return [line for line in lines if line.strip()]

    @cached_property
    def inline_code(self) -> list[str]:
        return re.findall(r"`([^`\n]+)`", self.prose)

    def section(self, heading: str) -> str:
        """The prose under a heading, up to the next of any level."""
        found = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", self.prose, re.MULTILINE | re.DOTALL)
        assert found is not None, f"{self.name} has no heading {heading!r}"
        return found[1]

    def _heading_before(self, position: int) -> str:
        found = [match[2] for match in _HEADING.finditer(self.text) if match.start() < position]
        return found[-1] if found else ""


def pages() -> list[Page]:
    """Every page of the project, the specification and the guides included."""
    paths = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md"))]
    return [Page(path) for path in paths]


def page(name: str) -> Page:
    return Page(ROOT / name)


def anchor_of(heading: str) -> str:
    kept = re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", heading).lower())
    return kept.replace(" ", "-")


def rows(table: str) -> list[list[str]]:
    """The rows of the Markdown tables in a text, without their headings; code marks are taken off."""
    cells = [
        [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]
        for line in table.splitlines()
        if line.startswith("|")
    ]
    rules = [number for number, row in enumerate(cells) if all(set(cell) <= set("-:") for cell in row)]
    headings = {number - 1 for number in rules}
    return [row for number, row in enumerate(cells) if number not in headings and number not in rules]


def codes(cell: str) -> list[str]:
    """What stands in code marks in a table's cell."""
    return re.findall(r"`([^`]+)`", cell)


def knode_words(line: str) -> list[str] | None:
    """The words after `knode` of a shell line; None for another program's line."""
    words = shlex.split(line, comments=True)
    if words and words[0] == "sudo":
        words = words[1:]
    if not words or words[0].rsplit("/", 1)[-1] not in ("knode", "kai"):
        return None
    return words[1:]
