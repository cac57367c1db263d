"""The file in which an agent leaves effects: typed, bounded, and a plain file."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knode.agents import effects as effects_module
from knode.agents.effects import MAX_LINES, NO_EFFECTS, Effects, FollowUp, parse_effects
from knode.errors import Code, KnodeError


def refused(data: bytes, code: Code = Code.AGENT_FAILED) -> str:
    with pytest.raises(KnodeError) as caught:
        parse_effects(data)
    assert caught.value.code is code
    return caught.value.message


def test_operations_and_tasks_come_in_their_order_as_they_were_written() -> None:
    data = (
        b'{"operation": {"put": "x", "n": 1.50}}\n\n{"task":{"agent":"kExecutor:text","input":"a\\u00e9"}}\n'
        b'{"operation":null}\n  {"task": {"agent": "kExecutor:x", "input": {"op": "count"}}}\n{"operation":2}'
    )
    assert parse_effects(data) == Effects(
        (b'{"put": "x", "n": 1.50}', b"null", b"2"),
        (FollowUp("kExecutor:text", "aé".encode()), FollowUp("kExecutor:x", b'{"op": "count"}')),
    )


def test_an_operation_as_deep_as_can_be_is_taken_by_every_python() -> None:
    deepest = b"[" * 31 + b'{"a":1}' + b"]" * 31
    assert parse_effects(b'{"operation": ' + deepest + b"}").operations == (deepest,)


def test_nothing_is_no_effect() -> None:
    assert parse_effects(b"") == parse_effects(b"\n \n") == NO_EFFECTS
    assert not NO_EFFECTS


@pytest.mark.parametrize(
    "line",
    [
        b"text",
        b"{}",
        b"[]",
        b"null",
        b'{"operation": }',
        b'{"operation": {"a":}}',
        b'{"operation": 1, "task": {"agent": "kExecutor:x"}}',
        b'{"operation": 1, "other": 2}',
        b'{"task": {"agent": 1}}',
        b'{"task": {"input": "x"}}',
        b'{"task": {"agent": "kExecutor:x", "input": "x", "on": "desk"}}',
        b'{"operation": "\xff"}',
        b'{"operation": "\\ud800"}',
        b'{"operation": ' + b"[" * 33 + b"]" * 33 + b"}",
        b'{"operation": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"operation": ' + b'{"a":' * 200000 + b"1" + b"}" * 200000 + b"}",
        b'{"task": {"agent": "kExecutor:x", "input": ' + b"[" * 33 + b"]" * 33 + b"}}",
        b'{"operation": 1} {"operation": 2}',
    ],
)
def test_a_line_that_is_none_fails_the_attempt_by_its_number(line: bytes) -> None:
    assert "line 2 of effects.jsonl" in refused(b'{"operation": 1}\n' + line)


def test_too_many_lines_are_too_large() -> None:
    line = b'{"operation":1}\n'
    assert len(parse_effects(line * MAX_LINES).operations) == MAX_LINES
    refused(line * (MAX_LINES + 1), Code.TOO_LARGE)


@given(st.binary(max_size=200))
def test_any_bytes_are_effects_or_the_agents_failure(data: bytes) -> None:
    code = None
    try:
        parse_effects(data)
    except KnodeError as error:
        code = error.code
    assert code in (None, Code.AGENT_FAILED)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=10,
    )
)
def test_any_json_can_be_an_operation(value: object) -> None:
    [operation] = parse_effects(json.dumps({"operation": value}).encode()).operations
    assert json.loads(operation) == value


def test_the_name_of_the_file_is_what_the_guide_says() -> None:
    assert effects_module.EFFECTS_NAME == "effects.jsonl"
