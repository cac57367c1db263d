from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knode.cli import render

MEMBER = {"node_id": "12D3KooWAAAABBBB", "name": "desk", "role": "admin", "state": "alive", "link": None}


@given(st.text())
def test_no_control_character_reaches_a_terminal(text: str) -> None:
    shown = render.printable(text)
    assert all(c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf") for c in shown)


def test_a_terminal_s_escape_sequence_is_shown_as_text() -> None:
    assert render.printable("\x1b[2Jhidden\r\u202e") == "\\x1b[2Jhidden\\r\\u202e"


def test_ordinary_text_is_left_as_it_is() -> None:
    assert render.printable("Grüße, 世界\n\t– ok") == "Grüße, 世界\n\t– ok"


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    assert render.table(("a", "b"), [("long", 1), ("x", None)]).splitlines() == [
        "A     B",
        "long  1",
        "x     -",
    ]


def test_wide_characters_take_two_columns() -> None:
    assert render.table(("a", "b"), [("世界", 1), ("x", 2)]).splitlines() == ["A     B", "世界  1", "x     2"]


@given(st.lists(st.tuples(st.text(), st.text()), max_size=5))
def test_a_row_is_one_line_whatever_its_cells_hold(rows: list[tuple[str, str]]) -> None:
    assert render.table(("a", "b"), rows).count("\n") == len(rows)


def test_a_table_without_rows_has_its_headings() -> None:
    assert render.table(("a", "b"), []) == "A  B"


def test_status_shows_the_members_and_the_warnings() -> None:
    text = render.status(
        {
            "node_id": "12D3KooWAAAABBBB",
            "name": "desk",
            "cell_id": "c",
            "role": "admin",
            "leader": None,
            "members": [
                {**MEMBER, "rtt_ms": None},
                {**MEMBER, "name": "pi", "link": "websocket", "rtt_ms": 1.25},
            ],
            "agents": ["kExecutor:text"],
            "tasks": {"succeeded": 2, "failed": 0},
            "warnings": ["the disk is nearly full: free some space"],
        }
    )
    lines = text.splitlines()
    assert "leader  -" in lines
    assert "tasks   2 succeeded" in lines
    assert any(line.startswith("pi") and line.endswith("websocket  1.2 ms") for line in lines)
    assert lines[-1] == "warning: the disk is nearly full: free some space"


@pytest.mark.parametrize(
    ("times", "lost", "summary"),
    [([1.0, 3.0, 2.0], 1, "3 of 4 answered, median 2.0 ms"), ([], 2, "0 of 2 answered")],
)
def test_a_ping_ends_with_its_summary_and_the_reason_for_the_link(
    times: list[float], lost: int, summary: str
) -> None:
    document = {"id": "x", "name": "pi", "link": "quic", "address": "a:1", "rtt_ms": times, "lost": lost}
    lines = render.ping(document | {"why": "no better way is known"}).splitlines()
    assert lines[-2:] == [summary, "link: no better way is known"]


@pytest.mark.parametrize(("relayed", "path"), [(True, "relayed"), (False, "direct"), (None, "-")])
def test_a_peer_is_reached_directly_or_through_a_relay(relayed: bool | None, path: str) -> None:
    peer = dict.fromkeys(("id", "name", "role", "state", "link", "address"), "x") | {"rtt_ms": None}
    assert render.peers([peer | {"relayed": relayed}]).splitlines()[-1].split()[5] == path


def test_progress_names_the_node_the_share_and_what_was_left_out() -> None:
    step = {"text": "reading", "fraction": 0.5, "node": "pi", "dropped": 3}
    assert render.progress(step) == "pi:  50 % reading (3 steps left out)"


def test_the_recovery_key_comes_with_its_advice() -> None:
    document = dict.fromkeys(("name", "node_id", "did", "cell_id", "home"), "x") | {"recovery_key": "one two"}
    text = render.initialised(document)
    assert "recovery key   one two" in text
    assert "Write the recovery key down" in text


def test_details_show_inner_fields_by_their_path_and_nothing_as_a_hyphen() -> None:
    document = {"id": "x", "load": {"running": 1}, "nodes": ["a"], "error": None, "none": {}}
    assert render.details(document).splitlines() == [
        "id            x",
        "load.running  1",
        'nodes         ["a"]',
        "error         -",
        "none          {}",
    ]


def test_a_peer_is_shown_with_a_line_for_each_way_to_it() -> None:
    ways = [
        {"link": "quic", "address": "10.0.0.2:4747", "scope": "local", "source": "told", "problem": None},
        {"link": "quic", "address": "\x1b[2J", "scope": "wide", "source": "heard", "problem": "refused"},
    ]
    shown = render.peer({"name": "attic", "traffic": {"bytes_sent": 3}, "refusal": None, "ways": ways})
    assert shown.splitlines() == [
        "name                attic",
        "traffic.bytes_sent  3",
        "refusal             -",
        "",
        "WAY   ADDRESS        SCOPE  SOURCE  PROBLEM",
        "quic  10.0.0.2:4747  local  told    -",
        "quic  \\x1b[2J        wide   heard   refused",
    ]
