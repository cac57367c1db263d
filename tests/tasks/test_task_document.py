from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from knode.tasks.task import MAX_PROGRESS, Task


def make_task() -> Task:
    return Task("ab" * 16, "kExecutor:text", "12D3Koo", "desk", 7)


def result_of(output: bytes) -> Any:
    task = make_task()
    task.succeed(output)
    return task.document()["result"]


@pytest.mark.parametrize(
    ("output", "result"),
    [
        (b"", ""),
        (b"plain text\n", "plain text\n"),
        (b'{"a": [1, null]}', {"a": [1, None]}),
        (b" [1] ", [1]),
        (b"42", "42"),
        (b"[not json", "[not json"),
        (b"\xff\x00", {"base64": "/wA="}),
    ],
)
def test_a_result_is_json_or_text_or_base64(output: bytes, result: Any) -> None:
    assert result_of(output) == result


@pytest.mark.parametrize(
    "output",
    [
        b'["\\ud800"]',
        b"[123456789012345678901234567890]",
        b"[1e999]",
        b"[" * 5000 + b"]" * 5000,
        b"[" * 500 + b"]" * 500,
        b'{"a":' * 60 + b"1" + b"}" * 60,
    ],
)
def test_json_that_would_trip_who_shows_it_is_shown_as_text(output: bytes) -> None:
    document = json.loads(msgspec.json.encode({"tasks": [result_of(output)]}))
    json.dumps(document, indent=2)


@given(
    st.one_of(
        st.binary(max_size=200),
        st.text(max_size=100).map(str.encode),
        st.text('[]{},:"\\u0d8e1', max_size=60).map(str.encode),
    )
)
def test_every_output_can_be_shown(output: bytes) -> None:
    task = make_task()
    task.succeed(output)
    json.dumps(json.loads(msgspec.json.encode(task.document())), indent=2)


async def test_reports_come_once_each_to_everyone_and_end_with_the_task() -> None:
    task, early, late = make_task(), list[Any](), list[Any]()

    async def watch(into: list[Any]) -> None:
        async for report in task.reports():
            into.append(report["text"])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch, early)
        await trio.testing.wait_all_tasks_blocked()
        task.report(0.5, "one")
        task.report(None, "two")
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(watch, late)
        await trio.testing.wait_all_tasks_blocked()
        task.report(1.0, "three")
        task.succeed(b"")
    assert early == late == ["one", "two", "three"]


async def test_who_begins_to_watch_late_gets_the_last_hundred_reports() -> None:
    task = make_task()
    for number in range(MAX_PROGRESS + 50):
        task.report(None, str(number))
    task.succeed(b"")
    texts = [report["text"] async for report in task.reports()]
    assert texts == [str(number) for number in range(50, MAX_PROGRESS + 50)]
