"""What the pages tell people to type exists."""

from __future__ import annotations

import contextlib
import re
from typing import Any

import pytest
import typer
from docs_pages import ROOT, Page, knode_words, pages

from knode.cli.app import app
from knode.cli.options import hoist

COMMAND: Any = typer.main.get_command(app)
GLOBAL_OPTIONS = {"--home", "--json", "--no-input", "--quiet", "-q", "--help", "-h"}
TYPED = [(page, line) for page in pages() for line in page.shell_lines]
MENTIONED = [
    (page, code) for page in pages() for code in page.inline_code if re.match(r"(knode|kai) [a-z]", code)
]


def parse(words: list[str]) -> None:
    """Parse a command line with the real command line's parser, and run nothing."""
    _, rest = hoist(words)
    command, context = COMMAND, None
    name = "knode"
    while True:
        context = command.make_context(name, rest, parent=context)
        if not hasattr(command, "commands"):
            return
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])


@pytest.mark.parametrize(("page", "line"), TYPED, ids=[f"{page.name}:{line}" for page, line in TYPED])
def test_a_line_in_a_shell_block_can_be_typed(page: Page, line: str) -> None:
    words = knode_words(line)
    if words is None:
        assert_other_program(line)
        return
    with contextlib.suppress(typer.Exit):  # --help has been printed
        parse(words)


@pytest.mark.parametrize(("page", "code"), MENTIONED, ids=[f"{page.name}:{code}" for page, code in MENTIONED])
def test_a_command_that_a_page_mentions_exists_with_its_options(page: Page, code: str) -> None:
    words = re.sub(r"[\[\]…]", " ", code).split()[1:]
    command = COMMAND
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        choices = words.pop(0).split("|")
        if choices[0].isupper():  # a placeholder: COMMAND
            return
        assert set(choices) <= set(command.commands), f"{page.name}: {code}"
        command = command.commands[choices[0]]
    known = GLOBAL_OPTIONS | {
        name for param in command.params for name in (*param.opts, *param.secondary_opts)
    }
    asked = {word.split("=")[0] for word in words if re.fullmatch(r"--?[a-z][a-z-]*(=.*)?", word)}
    assert asked <= known, f"{page.name}: {code}"


def test_every_command_has_its_section_in_the_page_of_the_command_line() -> None:
    text = Page(ROOT / "docs/cli.md").text
    for name, command in COMMAND.commands.items():
        for path in [f"{name} {inner}" for inner in getattr(command, "commands", {})] or [name]:
            assert re.search(rf"`{path}\b|knode {path}\b|knode {name} \S*\b{path.split()[-1]}\b", text), path


def test_a_line_that_does_not_exist_would_be_found() -> None:
    for line in (
        "knode frobnicate",
        "knode peer pong home",
        "knode status --jason",
        "knode join",
        "make love",
    ):
        with pytest.raises((typer.TyperException, AssertionError)):
            test_a_line_in_a_shell_block_can_be_typed(Page(ROOT / "README.md"), line)


def assert_other_program(line: str) -> None:
    """A make target exists; the rest are a few well-known programs."""
    words = line.removeprefix("sudo ").split()
    if words[0] == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(word for word in words[1:] if "=" not in word) <= set(targets), line
    else:
        known = {
            "export",
            "tar",
            "git",
            "systemctl",
            "loginctl",
            "ufw",
            "cat",
            "mkdir",
            "echo",
            "cp",
            "printf",
        }
        assert words[0] in known or words[0].startswith(".venv/bin/"), line
