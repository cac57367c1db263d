from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knode.agents.inputs import MAX_ARGUMENT_BYTES, parse_line, parse_source
from knode.errors import Code, KnodeError


@pytest.mark.parametrize(
    "data", [b"\xff", b'{"argv":[]}', b'{"argv":[""]}', b"a\0b", b"x" * (MAX_ARGUMENT_BYTES + 1)]
)
def test_bad_command_says_what_is_expected(data: bytes) -> None:
    with pytest.raises(KnodeError) as caught:
        parse_line(data)
    assert caught.value.code is Code.AGENT_FAILED
    assert "takes a shell line" in caught.value.message


def test_python_source_may_look_like_json() -> None:
    assert parse_source(b'{"a": 1}["a"]').code == '{"a": 1}["a"]'
    assert parse_source(b'{"code": "1"}').code == "1"


@pytest.mark.parametrize("data", [b"\xff\xfe", b'{"code":"\xff"}'])
def test_source_that_is_no_utf_8_is_refused_by_name(data: bytes) -> None:
    with pytest.raises(KnodeError) as caught:
        parse_source(data)
    assert caught.value.code is Code.AGENT_FAILED


@given(st.binary(max_size=200))
def test_any_input_is_a_command_or_refused_by_name(data: bytes) -> None:
    try:
        line = parse_line(data)
    except KnodeError as error:
        assert error.code is Code.AGENT_FAILED  # noqa: PT017
    else:
        assert all("\0" not in argument for argument in line.argv)
