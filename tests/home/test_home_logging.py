from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import structlog
import trio
from hypothesis import given
from hypothesis import strategies as st

from knode.errors import Code, KnodeError
from knode.home.broadcast import FOLLOWERS_AT_ONCE, LINES_WAITING, Broadcast
from knode.home.configuration import LogSettings
from knode.home.folder import create_home
from knode.home.layout import Home
from knode.home.log_file import LogFile
from knode.home.logging import (
    HIDDEN,
    LINE_LIMIT_CHARACTERS,
    SECRET_WORDS,
    is_secret,
    log_to,
    open_log,
    redact,
)
from knode.world import Monotonic, WallTime, World
from knode.world.real import real_world


class Stopped:
    """A clock that stands still."""

    def monotonic(self) -> Monotonic:
        return Monotonic(0.0)

    def wall(self) -> WallTime:
        return WallTime(1_700_000_000_123)


@pytest.fixture
def world() -> World:
    return replace(real_world(), clock=Stopped())


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path / "home", None)
    create_home(real_world(), home, name="attic")
    return home


@pytest.fixture(autouse=True)
def nothing_bound() -> Iterator[None]:
    structlog.contextvars.clear_contextvars()
    yield
    structlog.contextvars.clear_contextvars()


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_has_time_level_event_then_what_is_bound_and_what_is_given(world: World) -> None:
    lines: list[str] = []
    log = log_to(world, lines.append)
    structlog.contextvars.bind_contextvars(trace="t1")
    log.logger.bind(task="k1").info("task started", node="attic")
    assert lines == [
        '{"time": "2023-11-14T22:13:20.123Z", "level": "info", "event": "task started", '
        '"task": "k1", "node": "attic", "trace": "t1"}'
    ]


def test_lines_below_the_level_are_not_made(world: World) -> None:
    lines: list[str] = []
    logger = log_to(world, lines.append, level="warning").logger
    logger.debug("a")
    logger.info("b")
    logger.warning("c")
    logger.error("d")
    assert [json.loads(line)["event"] for line in lines] == ["c", "d"]


def test_an_exception_is_written_with_its_trace(world: World) -> None:
    lines: list[str] = []
    try:
        raise ZeroDivisionError("by nothing")
    except ZeroDivisionError:
        log_to(world, lines.append).logger.exception("failed")
    line = json.loads(lines[0])
    assert line["level"] == "error"
    assert "ZeroDivisionError: by nothing" in line["exception"]


async def test_each_trio_task_has_its_own_ids(world: World) -> None:
    lines: list[str] = []
    log = log_to(world, lines.append)

    async def work(task: str) -> None:
        structlog.contextvars.bind_contextvars(task=task)
        await trio.lowlevel.checkpoint()
        log.logger.info(task)

    async with trio.open_nursery() as nursery:
        for number in range(5):
            nursery.start_soon(work, f"k{number}")
    assert all(json.loads(line)["task"] == json.loads(line)["event"] for line in lines)
    assert len(lines) == 5


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5).filter(lambda key: not is_secret(key)), inner, max_size=3)
    ),
    max_leaves=10,
)


@given(word=st.sampled_from(sorted(SECRET_WORDS)), before=st.sampled_from(["", "owner_", "X-"]), around=JSON)
def test_no_secret_is_written_however_deep_it_lies(word: str, before: str, around: object) -> None:
    mark = "correct horse battery staple"
    event = {"a": [{"b": around, before + word.upper(): {"inner": mark}}], before + word: [mark]}
    assert mark not in json.dumps(redact(event))
    assert HIDDEN in json.dumps(redact(event))


@given(JSON)
def test_what_is_no_secret_is_written_as_it_is(value: object) -> None:
    assert redact({"key": value}) == {"key": value}


def test_bytes_and_huge_values_do_not_make_huge_lines(world: World) -> None:
    lines: list[str] = []
    log = log_to(world, lines.append)
    log.logger.info("large", data=b"x" * 10_000_000, text="y" * 10_000_000, many=["z" * 1000] * 1000)
    log.logger.info("odd", surrogate="\ud800", strange=object(), number=float("nan"), pair={1: 2})
    assert all(len(line) <= LINE_LIMIT_CHARACTERS for line in lines)
    assert json.loads(lines[0])["event"] == "large"
    odd = json.loads(lines[1].encode())
    assert (odd["pair"], odd["number"], odd["surrogate"]) == ({"1": 2}, "nan", "\ud800")


def test_a_log_goes_to_its_private_file_and_to_the_terminal_for_people(world: World, home: Home) -> None:
    terminal = io.StringIO()
    log = open_log(world, home, LogSettings(), terminal=terminal)
    log.logger.warning("peer lost", peer="attic", ticket="abc")
    log.close()
    assert lines_of(home.log_file)[0] == {
        "time": "2023-11-14T22:13:20.123Z",
        "level": "warning",
        "event": "peer lost",
        "peer": "attic",
        "ticket": HIDDEN,
    }
    assert terminal.getvalue() == f"22:13:20 warning peer lost  peer=attic ticket={HIDDEN}\n"
    assert home.log_file.stat().st_mode & 0o777 == 0o600


def test_what_other_nodes_say_cannot_steer_the_terminal(world: World, home: Home) -> None:
    terminal = io.StringIO()
    log = open_log(world, home, LogSettings(), terminal=terminal)
    log.logger.info("peer says", name="\x1b]0;owned\x07\r\n\u202e", other="schön")
    log.close()
    assert terminal.getvalue() == (
        "22:13:20 info    peer says  name=\\x1b]0;owned\\x07\\r\\n\\u202e other=schön\n"
    )


def test_a_terminal_that_is_gone_does_not_stop_the_node(world: World, home: Home) -> None:
    terminal = io.StringIO()
    terminal.close()
    log = open_log(world, home, LogSettings(), terminal=terminal)
    log.logger.info("on")
    log.close()
    assert lines_of(home.log_file)[0]["event"] == "on"


def test_a_log_goes_on_after_a_restart_and_half_a_line_stays_one_line(world: World, home: Home) -> None:
    home.log_file.write_text('{"event": "whole"}\n{"event": "ha')
    log = open_log(world, home, LogSettings())
    log.logger.info("next")
    log.close()
    lines = home.log_file.read_text().splitlines()
    assert lines[:2] == ['{"event": "whole"}', '{"event": "ha']
    assert json.loads(lines[2])["event"] == "next"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_loses_lines_and_says_how_many_when_there_is_room_again(world: World, home: Home) -> None:
    home.log_file.symlink_to("/dev/full")
    log = open_log(world, home, LogSettings())
    for number in range(3):
        log.logger.info("lost", number=number)
    home.log_file.unlink()
    log.logger.info("kept")
    log.logger.info("after")
    log.close()
    lines = lines_of(home.log_file)
    assert [line["event"] for line in lines] == ["kept", "log lines lost", "after"]
    assert lines[1]["count"] == 3


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_rotation_keeps_the_newest_lines_in_bounded_files(tmp_path: Path, keep: int) -> None:
    file = LogFile(tmp_path / "log", max_bytes=100, keep=keep)
    for number in range(1000):
        assert file.append(f"line {number:04}")
    file.close()
    names = ["log", *(f"log.{number}" for number in range(1, keep))]
    assert sorted(os.listdir(tmp_path)) == names
    assert all((tmp_path / name).stat().st_size <= 100 for name in names)
    kept = [line for name in reversed(names) for line in (tmp_path / name).read_text().splitlines()]
    assert kept == [f"line {number:04}" for number in range(1000 - len(kept), 1000)]
    assert len(kept) > 10 * (keep - 1)


async def test_followers_get_the_lines_from_now_on(world: World) -> None:
    log = log_to(world, lambda line: None)
    log.logger.info("before")
    first = log.lines.subscribe()
    log.logger.info("one")
    second = log.lines.subscribe()
    log.logger.info("two")
    log.close()
    assert [json.loads(line)["event"] async for line in first] == ["one", "two"]
    assert [json.loads(line)["event"] async for line in second] == ["two"]


async def test_a_slow_follower_loses_lines_and_is_told_how_many(world: World) -> None:
    broadcast = Broadcast()
    receive = broadcast.subscribe()
    for number in range(LINES_WAITING + 7):
        broadcast.publish(str(number))
    assert [await receive.receive() for _ in range(LINES_WAITING)] == [str(n) for n in range(LINES_WAITING)]
    broadcast.publish("next")
    assert json.loads(await receive.receive())["count"] == 7
    assert await receive.receive() == "next"


async def test_followers_are_limited_and_a_closed_one_makes_room() -> None:
    broadcast = Broadcast()
    receives = [broadcast.subscribe() for _ in range(FOLLOWERS_AT_ONCE)]
    with pytest.raises(KnodeError) as error:
        broadcast.subscribe()
    assert error.value.code is Code.RATE_LIMITED
    await receives[0].aclose()
    broadcast.publish("line")
    broadcast.subscribe()
