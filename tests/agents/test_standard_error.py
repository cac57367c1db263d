from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knode.agents.sandbox.sandbox import STDERR_TAIL_BYTES
from knode.agents.sandbox.standard_error import StandardError, parse_progress


@pytest.mark.parametrize(
    ("line", "report"),
    [
        (b"knode:progress 0.5 half", (0.5, "half")),
        (b"knode:progress 1", (1.0, "")),
        (b"knode:progress 50 percent", (None, "50 percent")),
        (b"knode:progress nan x", (None, "nan x")),
        (b"knode:progress -1", (None, "-1")),
        (b"knode:progress bell\x07\x1b[2J", (None, "bell[2J")),
        (b"knode:progress 0.1 " + b"x" * 500, (0.1, "x" * 200)),
        (b"knode:progressive", None),
        (b"note", None),
    ],
)
def test_line_of_progress_is_read_or_left(line: bytes, report: tuple[float | None, str] | None) -> None:
    assert parse_progress(line) == report


@given(
    st.lists(st.sampled_from([b"note\n", b"knode:progress 0.5 x\n", b"\n", b"y" * 5000, b"end"]), max_size=20)
)
def test_pieces_are_read_as_the_whole(pieces: list[bytes]) -> None:
    whole, piecewise = StandardError(), StandardError()
    reports = whole.add(b"".join(pieces))
    assert [report for piece in pieces for report in piecewise.add(piece)] == reports
    assert piecewise.tail() == whole.tail()


@given(st.binary(max_size=3 * STDERR_TAIL_BYTES))
def test_tail_is_the_end_of_what_was_written(data: bytes) -> None:
    errors = StandardError()
    errors.add(data)
    if b"knode:progress" not in data:
        assert errors.tail() == data[-STDERR_TAIL_BYTES:]
