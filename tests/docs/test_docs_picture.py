"""The picture in docs/architecture.md is the contract, the folders and the imports."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator

from docs_pages import ROOT, page

PACKAGE = ROOT / "knode"
PICTURE = next(block.text for block in page("docs/architecture.md").blocks if block.language == "mermaid")


def floors() -> list[set[str]]:
    """The picture's floors, from the top."""
    bodies = re.findall(r"subgraph \w+\[[^\]]+\]\n(.*?)\n +end\n", PICTURE, re.DOTALL)
    return [set(body.split()) for body in bodies]


def arrows() -> set[tuple[str, str]]:
    return set(re.findall(r"(\w+) --> (\w+)", PICTURE))


def rooms() -> set[str]:
    """The folders of the package, and the modules beside them."""
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    return folders | {path.stem for path in PACKAGE.glob("*.py") if not path.name.startswith("__")}


def imports() -> set[tuple[str, str]]:
    """Each pair of rooms of which the first imports the second, lazily or for types alone too."""
    found: set[tuple[str, str]] = set()
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for name in imported(ast.parse(path.read_text())):
            parts = name.split(".")
            if parts[0] == "knode" and len(parts) > 1 and parts[1] in rooms() - {room}:
                found.add((room, parts[1]))
    return {(importer, room) for importer, room in found if importer in rooms()}


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=str(module), names=names):
                yield from (f"{module}.{alias.name}" for alias in names)


def below(edges: set[tuple[str, str]]) -> dict[str, set[str]]:
    """What each room reaches, directly or through others; the edges must have no cycle."""
    reached: dict[str, set[str]] = {}

    def reach(room: str, path: tuple[str, ...] = ()) -> set[str]:
        assert room not in path, f"a cycle of imports: {(*path, room)}"
        if room not in reached:
            direct = {to for source, to in edges if source == room}
            reached[room] = direct.union(*(reach(to, (*path, room)) for to in direct))
        return reached[room]

    for room in rooms():
        reach(room)
    return reached


def test_the_pictures_floors_are_those_of_the_contract() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    assert floors() == [set(layer.split(" : ")) for layer in layers]


def test_the_pictures_rooms_are_the_folders() -> None:
    assert set().union(*floors()) == rooms()


def test_the_pictures_arrows_are_the_imports_that_follow_from_no_others() -> None:
    edges = imports()
    reached = below(edges)
    needed = {
        (source, to)
        for source, to in edges
        if not any(to in reached[between] for start, between in edges if start == source and between != to)
    }
    assert arrows() == needed


def test_every_room_is_described() -> None:
    described = set(re.findall(r"^- \*\*(\w+)\*\*", page("docs/architecture.md").text, re.MULTILINE))
    assert described == rooms()
