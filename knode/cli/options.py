"""The options that every command has, wherever they stand in the line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from knode.errors import Code, KnodeError


@dataclass(frozen=True, slots=True)
class Options:
    """What `--home PATH`, `--json`, `--no-input` and `-q` say; the last `--home` counts."""

    home: str | None = None
    json: bool = False
    no_input: bool = False
    quiet: bool = False


def hoist(words: Sequence[str]) -> tuple[Options, list[str]]:
    """Take the global options out of a command line; the other words keep their order.

    Nothing after a `--` is taken. A value that looks like one of these options is given with an equals
    sign, `--input=--json`, or behind `--`.

    Raises:
        KnodeError: INVALID_ARGUMENT when `--home` is the last word.
    """
    home: str | None = None
    flags: set[str] = set()
    rest: list[str] = []
    remaining = iter(words)
    for word in remaining:
        if word == "--":
            rest += [word, *remaining]
        elif word == "--home":
            home = next(remaining, None)
            if home is None or home == "--":
                raise KnodeError(Code.INVALID_ARGUMENT, "--home needs a path", "knode --home PATH …")
        elif word.startswith("--home="):
            home = word.removeprefix("--home=")
        elif word in ("--json", "--no-input", "--quiet", "-q"):
            flags.add(word)
        else:
            rest.append(word)
    options = Options(
        home=home,
        json="--json" in flags,
        no_input="--no-input" in flags,
        quiet=bool(flags & {"-q", "--quiet"}),
    )
    return options, rest
