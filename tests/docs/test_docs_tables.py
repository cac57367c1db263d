"""Tables and names in the pages are those of the code."""

from __future__ import annotations

import inspect
import re
import tomllib
from typing import Any, cast

import msgspec
import pytest
from docs_pages import ROOT, Page, codes, page, pages, rows

from knode import errors
from knode.control.methods import ControlMethods
from knode.errors import Code
from knode.tasks import failures, lifecycle

NO_CODES = {
    "XDG_RUNTIME_DIR",
    "NO_COLOR",
    "RLIMIT_AS",
    "PERMISSION_DENIED",
    "NO_RESERVATION",
}  # of relays, too
NO_CODES_PREFIXES = ("KNODE_", "MAX_")


def test_the_table_of_exit_codes_is_that_of_the_code() -> None:
    documented = {int(row[0]) for row in rows(page("docs/cli.md").section("Exit codes"))}
    assert documented == {value for name, value in vars(errors).items() if name.startswith("EXIT_")}
    assert documented > {meaning.exit_code for meaning in errors.TABLE.values()}


@pytest.mark.parametrize("where", pages(), ids=lambda where: where.name)
def test_error_codes_that_a_page_names_exist(where: Page) -> None:
    named = set(re.findall(r"(?<![\w/.-])[A-Z]+(?:_[A-Z]+)+(?![\w.])", where.prose))
    unknown = {name for name in named - NO_CODES if not name.startswith(NO_CODES_PREFIXES)} - set(Code)
    assert not unknown, f"{where.name} names {unknown}"


def test_the_table_of_what_is_wrong_names_codes_each_once() -> None:
    section = page("docs/guides/home-server.md").section("When something is wrong")
    named = [code for row in rows(section) for code in row[0].split(", ")]
    assert set(named) <= set(Code)
    assert len(named) == len(set(named))


def test_the_diagram_of_a_tasks_states_is_the_table() -> None:
    (block,) = [block for block in page("docs/guides/tasks.md").blocks if block.language == "mermaid"]
    assert block.text == lifecycle.diagram() + "\n"


def test_the_table_of_failures_that_are_tried_again_is_that_of_the_code() -> None:
    section = page("docs/guides/tasks.md").section("When an attempt fails")
    named = [code for row in rows(section) for code in row[0].split(", ")]
    assert sorted(named) == sorted(failures.RETRYABLE)


def test_the_table_of_the_sockets_methods_is_that_of_the_daemon() -> None:
    documented = {
        method: {name for name in codes(row[1]) if name.isidentifier()}
        for row in rows(page("docs/cli.md").section("The socket"))
        for method in codes(row[0])
    }
    table = ControlMethods(cast(Any, None), cast(Any, None), lambda: None, lambda: None).table()
    assert set(documented) == set(table)
    for method, handler in table.items():
        fields = msgspec.structs.fields(inspect.getclosurevars(handler).nonlocals["kind"])
        assert documented[method] <= {field.name for field in fields}, method
        assert documented[method] >= {field.name for field in fields if field.required}, method


def test_the_changelog_says_what_is_unreleased() -> None:
    text = page("CHANGELOG.md").text
    kinds = re.findall(r"^### (.+)$", text.split("## [Unreleased]", 1)[1], re.MULTILINE)
    assert kinds
    assert set(kinds) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    for kind in kinds:
        assert re.search(rf"^### {kind}\n\n- \S", text, re.MULTILINE), f"nothing under {kind}"


def test_what_the_readme_shows_of_the_demo_is_what_the_demo_notes() -> None:
    block = next(b for b in page("README.md").blocks if b.heading == "Two commands" and b.language == "text")
    demo = (ROOT / "knode/testnet/demo.py").read_text()
    for line in block.text.splitlines():
        label = re.split(r" {2,}", line)[0]
        assert re.search(rf'note\(\s*"{label}"', demo), line


def test_decisions_are_numbered_listed_and_whole() -> None:
    files = sorted((ROOT / "docs/adr").glob("[0-9]*.md"))
    assert [int(file.name[:4]) for file in files] == list(range(1, len(files) + 1))
    index = page("docs/adr/README.md").text
    for file in files:
        text = file.read_text()
        title = text.splitlines()[0].removeprefix("# ")
        assert title.startswith(file.name[:4]), file.name
        assert f"[{title[:4]}]({file.name}) | {title[5:]} |" in index, file.name
        for part in ("Context", "Decision", "Consequence"):
            assert f"\n**{part}.** " in text, f"{file.name} has no {part}"


def test_the_record_of_dependencies_names_each_of_them() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = page("docs/adr/0001-dependencies.md").text.lower()
    for requirement in project["dependencies"]:
        name = re.split(r"[<>=; ]", requirement)[0]
        assert re.search(rf"\b{name}\b", named), f"{name} is not in the record of dependencies"


def test_every_test_that_proves_a_row_of_the_threat_model_is_there() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page("docs/threat-model.md").text)
    assert len(named) > 30
    for file, name in named:
        assert f"def {name}(" in (ROOT / file).read_text(), f"{file}::{name}"
