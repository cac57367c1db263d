from __future__ import annotations

import time
import tracemalloc
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from knode.agents import text as text_module
from knode.agents.limits import MAX_RESULT_BYTES
from knode.agents.text import answer, count_text, find_emails, parse_request


def ask(request: object, files: dict[str, bytes] | None = None, limit_bytes: int = MAX_RESULT_BYTES) -> Any:
    data = request if isinstance(request, bytes) else msgspec.json.encode(request)
    result = answer(parse_request(data), files or {}, limit_bytes)
    assert len(result) <= limit_bytes
    assert result == msgspec.json.encode(msgspec.json.decode(result), order="sorted")
    return msgspec.json.decode(result)


def test_plain_text_is_counted() -> None:
    assert ask("zwölf Wörter\nmehr".encode())["total"] == {
        "bytes": 19,
        "characters": 17,
        "lines": 2,
        "words": 3,
    }


def test_text_that_begins_like_json_is_counted_all_the_same() -> None:
    assert ask(b"{curly} words")["total"]["words"] == 2


def test_files_are_counted_one_by_one_and_together() -> None:
    result = ask({"op": "count"}, {"a.txt": b"one two\n", "b.txt": b"three"})
    assert result == {
        "files": [
            {"bytes": 8, "characters": 8, "lines": 1, "name": "a.txt", "words": 2},
            {"bytes": 5, "characters": 5, "lines": 1, "name": "b.txt", "words": 1},
        ],
        "total": {"bytes": 13, "characters": 13, "lines": 2, "words": 3},
        "truncated": False,
    }


def test_files_without_a_word_of_input_are_counted() -> None:
    assert ask(b"", {"a.txt": b"one two\n"}) == ask({"op": "count"}, {"a.txt": b"one two\n"})


@given(st.text())
def test_counts_agree_with_their_definitions(text: str) -> None:
    data = text.encode("utf-8", "replace")
    text = data.decode()
    assert count_text(data) == {
        "bytes": len(data),
        "characters": len(text),
        "lines": len(text.removesuffix("\n").split("\n")) if text else 0,
        "words": len(text.split()),
    }


@given(st.binary(max_size=40) | st.text(st.sampled_from("a \n\u2003雪"), max_size=40).map(str.encode))
def test_counts_are_the_same_in_pieces_of_any_size(data: bytes) -> None:
    whole = count_text(data)
    for size in (1, 2, 3, 7):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(text_module, "PIECE_BYTES", size)
            assert count_text(data) == whole


@pytest.mark.parametrize("end", [b"\n", b" "])
@pytest.mark.parametrize(
    "request_", [{"op": "count"}, {"op": "search", "query": "x"}, {"op": "extract", "kind": "headings"}]
)
def test_a_large_text_takes_little_more_memory_than_its_size(request_: object, end: bytes) -> None:
    data = (b"ab" + end) * 500_000
    tracemalloc.start()
    try:
        ask(request_, {"a.txt": data})
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 2 * len(data)


@given(
    st.lists(st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"])), max_size=20),
    st.data(),
)
def test_search_finds_exactly_the_lines_that_hold_the_words(lines: list[str], data: st.DataObject) -> None:
    query = data.draw(
        st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"]), min_size=1, max_size=3)
    )
    result = ask({"op": "search", "query": query, "text": "\n".join(lines)})
    expected = [number for number, line in enumerate(lines, start=1) if query in line]
    assert [match["line"] for match in result["matches"]] == expected


def test_search_is_literal() -> None:
    assert ask({"op": "search", "query": ".*", "text": "abc\na.*c"})["matches"] == [
        {"file": "text", "line": 2, "text": "a.*c"}
    ]


def test_search_can_ignore_case() -> None:
    text = "Straße\nSTRASSE\nstrand"
    found = ask({"op": "search", "query": "strasse", "text": text, "ignore_case": True})["matches"]
    assert [match["line"] for match in found] == [1, 2]


def test_matches_are_bounded_in_number_and_in_bytes() -> None:
    many = ask({"op": "search", "query": "x", "text": "x\n" * 5000})
    assert len(many["matches"]) == 1000
    assert many["truncated"] is True
    wide = ask({"op": "search", "query": "x", "text": ("x" * 5000 + "\n") * 100}, limit_bytes=8192)
    assert 0 < len(wide["matches"]) < 100
    assert wide["truncated"] is True


@pytest.mark.parametrize(
    ("kind", "text", "values"),
    [
        (
            "emails",
            "to a.b+c@example.co.uk, <x@y.org>; not @z.com, a@b, a@b.c1",
            ["a.b+c@example.co.uk", "x@y.org"],
        ),
        ("emails", "one@two@three.com", ["two@three.com"]),
        ("emails", "end@example.com.", ["end@example.com"]),
        (
            "urls",
            "see https://a.org/b?c=1#d. (http://e.net) ftp://no",
            ["https://a.org/b?c=1#d", "http://e.net"],
        ),
        ("numbers", "1, -2.5 +3e10 x4 5.6.7 80%", ["1", "-2.5", "+3e10", "80"]),
        ("headings", "# One\ntext # no\n### Two ##\n#no", ["One", "Two"]),
    ],
)
def test_extracts(kind: str, text: str, values: list[str]) -> None:
    result = ask({"op": "extract", "kind": kind, "text": text})
    assert [item["value"] for item in result["items"]] == values


def test_same_item_is_given_once_a_file() -> None:
    files = {"a": b"a@b.org a@b.org", "b": b"a@b.org"}
    items = ask({"op": "extract", "kind": "emails"}, files)["items"]
    assert [item["file"] for item in items] == ["a", "b"]


@pytest.mark.parametrize(
    "hostile",
    [
        "a" * 400_000,
        "a@" * 200_000,
        "@" * 400_000,
        "a." * 200_000,
        "x@" + "a." * 200_000,
        "x@" + "a-" * 200_000,
        "1" * 400_000,
        "1." * 200_000,
        "1e" * 200_000,
        "http://" * 60_000,
        "#" * 400_000,
        " " * 400_000,
        "# " * 200_000,
    ],
)
@pytest.mark.parametrize("kind", ["emails", "urls", "numbers", "headings"])
def test_hostile_text_takes_linear_time(hostile: str, kind: str) -> None:
    begun = time.process_time()
    ask({"op": "extract", "kind": kind, "text": hostile})
    assert time.process_time() - begun < 3


@given(st.text("ab@.-", max_size=60))
def test_emails_have_one_at_sign_and_a_domain(line: str) -> None:
    for email in find_emails(line):
        local, _, domain = email.partition("@")
        assert local
        assert "@" not in domain
        assert "." in domain
        assert email in line


@pytest.mark.parametrize(
    "request_",
    [{"op": "shout"}, {"op": "search"}, {"op": "search", "query": ""}, {"op": "extract", "kind": "x"}, {}],
)
def test_bad_request_says_what_is_expected(request_: object) -> None:
    with pytest.raises(ValueError, match="expected"):
        parse_request(msgspec.json.encode(request_))


@pytest.mark.parametrize(
    "data", [b'{"a":' * 100_000, b'{"op":"count","text":"\xff"}', b'{"op":' + b"[" * 100_000]
)
def test_what_is_no_json_after_all_is_counted(data: bytes) -> None:
    assert ask(data)["total"]["words"] == 1
