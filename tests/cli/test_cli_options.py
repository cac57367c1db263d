from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knode import __version__
from knode.cli.options import Options, hoist
from knode.errors import Code, KnodeError

PLAIN = st.text(min_size=1, max_size=8).filter(
    lambda word: not word.startswith("--home") and word not in ("--json", "--no-input", "--quiet", "-q", "--")
)
GLOBALS = st.sampled_from([["--json"], ["--no-input"], ["-q"], ["--quiet"], ["--home", "/h"], ["--home=/h"]])


@given(plain=st.lists(PLAIN), options=st.lists(GLOBALS), places=st.randoms(use_true_random=False))
def test_where_the_options_stand_changes_nothing(plain, options, places) -> None:  # type: ignore[no-untyped-def]
    pieces = [[word] for word in plain]
    for option in options:
        pieces.insert(places.randint(0, len(pieces)), option)
    scattered = [word for piece in pieces for word in piece]
    in_front = [word for option in options for word in option] + plain
    assert hoist(scattered) == hoist(in_front)
    assert hoist(scattered)[1] == plain


@given(
    plain=st.lists(PLAIN),
    behind=st.lists(st.one_of(PLAIN, st.sampled_from(["--json", "--home", "-q", "--"]))),
)
def test_nothing_behind_two_hyphens_is_taken(plain: list[str], behind: list[str]) -> None:
    assert hoist([*plain, "--", *behind]) == (Options(), [*plain, "--", *behind])


def test_each_option_is_understood() -> None:
    words = ["task", "--json", "list", "--home", "/a", "-q", "--no-input"]
    assert hoist(words) == (Options(home="/a", json=True, no_input=True, quiet=True), ["task", "list"])


def test_the_last_home_counts() -> None:
    assert hoist(["--home", "/a", "status", "--home=/b"])[0].home == "/b"


def test_a_value_behind_an_equals_sign_is_never_an_option() -> None:
    assert hoist(["--input=--json"]) == (Options(), ["--input=--json"])


@pytest.mark.parametrize("words", [["status", "--home"], ["--home", "--", "status"]])
def test_a_home_without_a_path_is_refused(words: list[str]) -> None:
    with pytest.raises(KnodeError) as caught:
        hoist(words)
    assert caught.value.code is Code.INVALID_ARGUMENT


def test_the_version_is_told_without_a_home_or_a_daemon(knode: Any) -> None:
    assert knode("--version").out == f"knode {__version__}\n"
    assert json.loads(knode("--version", "--json").out) == {"version": __version__}
