from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import apsw
import pytest
import trio
import trio.testing

from knode.errors import Code, KnodeError
from knode.storage import Database
from knode.storage import database as database_module
from knode.world.real import real_world

FIRST = "CREATE TABLE note (id INTEGER PRIMARY KEY, text TEXT NOT NULL) STRICT;"
SECOND = "ALTER TABLE note ADD COLUMN colour TEXT; CREATE INDEX note_by_colour ON note (colour);"


def insert(text: str) -> object:
    return lambda connection: connection.execute("INSERT INTO note (text) VALUES (?)", (text,))


def texts(connection: apsw.Connection) -> list[str]:
    return [text for (text,) in connection.execute("SELECT text FROM note ORDER BY id")]


async def test_what_was_written_is_read_again_after_closing(tmp_path: Path) -> None:
    path = tmp_path / "node.db"
    database = await Database.open(real_world(), path, [FIRST])
    await database.write(insert("one"))
    assert await database.read(texts) == ["one"]
    await database.aclose()
    await database.aclose()
    reopened = await Database.open(real_world(), path, [FIRST])
    assert await reopened.read(texts) == ["one"]
    await reopened.aclose()
    assert os.listdir(tmp_path) == ["node.db"]


async def test_it_is_set_up_as_promised_and_makes_no_shared_memory_file(tmp_path: Path) -> None:
    database = await Database.open(real_world(), tmp_path / "node.db", [FIRST])
    wanted = {"journal_mode": "wal", "locking_mode": "exclusive", "synchronous": 2, "foreign_keys": 1}
    for name, value in wanted.items():
        assert await database.read(lambda connection, name=name: connection.pragma(name)) == value
    assert sorted(os.listdir(tmp_path)) == ["node.db", "node.db-wal"]
    await database.aclose()


async def test_an_error_inside_rolls_back_and_reaches_the_caller(tmp_path: Path) -> None:
    database = await Database.open(real_world(), tmp_path / "node.db", [FIRST])

    def fail(connection: apsw.Connection) -> None:
        connection.execute("INSERT INTO note (text) VALUES ('half')")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await database.write(fail)
    with pytest.raises(apsw.ConstraintError):
        await database.write(lambda connection: connection.execute("INSERT INTO note (text) VALUES (NULL)"))
    assert await database.read(texts) == []
    await database.write(insert("whole"))
    assert await database.read(texts) == ["whole"]
    await database.aclose()


async def test_a_read_cannot_write(tmp_path: Path) -> None:
    database = await Database.open(real_world(), tmp_path / "node.db", [FIRST])
    with pytest.raises(RuntimeError, match="tried to write"):
        await database.read(insert("sly"))
    await database.write(insert("open"))
    assert await database.read(texts) == ["open"]
    await database.aclose()


async def test_a_closed_database_says_so(tmp_path: Path) -> None:
    database = await Database.open(real_world(), tmp_path / "node.db", [FIRST])
    await database.aclose()
    with pytest.raises(trio.ClosedResourceError):
        await database.read(texts)


async def test_an_older_schema_is_migrated_and_keeps_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "node.db"
    database = await Database.open(real_world(), path, [FIRST])
    await database.write(insert("old"))
    await database.aclose()
    database = await Database.open(real_world(), path, [FIRST, SECOND])
    assert await database.read(lambda c: c.execute("SELECT text, colour FROM note").fetchall()) == [
        ("old", None)
    ]
    assert await database.read(lambda c: c.pragma("user_version")) == 2
    await database.aclose()


async def test_a_migration_that_fails_leaves_the_version_before_it(tmp_path: Path) -> None:
    path = tmp_path / "node.db"
    broken = "CREATE TABLE other (id INTEGER PRIMARY KEY); INSERT INTO nowhere VALUES (1);"
    with pytest.raises(apsw.SQLError):
        await Database.open(real_world(), path, [FIRST, broken])
    database = await Database.open(real_world(), path, [FIRST])
    tables = await database.read(lambda c: c.execute("SELECT name FROM sqlite_schema").fetchall())
    assert tables == [("note",)]
    await database.aclose()


async def test_a_newer_schema_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "node.db"
    await (await Database.open(real_world(), path, [FIRST, SECOND])).aclose()
    before = path.read_bytes()
    with pytest.raises(KnodeError, match="version 2") as error:
        await Database.open(real_world(), path, [FIRST])
    assert error.value.code is Code.HOME_TOO_NEW
    assert path.read_bytes() == before


@pytest.mark.parametrize("data", [b"not a database" * 100, b"SQLite format 3\0" + b"\xff" * 4080])
async def test_a_damaged_file_is_named(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "node.db"
    path.write_bytes(data)
    with pytest.raises(KnodeError, match=r"node\.db") as error:
        await Database.open(real_world(), path, [FIRST])
    assert error.value.code is Code.HOME_DAMAGED
    assert path.read_bytes() == data


async def test_a_damaged_page_is_named_when_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "node.db"
    database = await Database.open(real_world(), path, [FIRST])
    await database.write(insert("x" * 3000))
    await database.aclose()
    data = bytearray(path.read_bytes())
    data[4096:8192] = b"\xff" * 4096
    path.write_bytes(data)
    database = await Database.open(real_world(), path, [FIRST])
    with pytest.raises(KnodeError) as error:
        await database.read(texts)
    assert error.value.code is Code.HOME_DAMAGED
    await database.aclose()


async def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(KnodeError, match=r"none/node\.db") as error:
        await Database.open(real_world(), tmp_path / "none" / "node.db", [FIRST])
    assert error.value.code is Code.NOT_FOUND


async def test_nobody_else_can_read_what_is_in_it(tmp_path: Path) -> None:
    database = await Database.open(real_world(), tmp_path / "node.db", [FIRST])
    await database.write(lambda connection: connection.execute("CREATE TABLE more (text TEXT)"))
    assert modes(tmp_path) == {0o600}
    await database.aclose()


def modes(folder: Path) -> set[int]:
    return {file.stat().st_mode & 0o777 for file in folder.iterdir()}


async def test_a_second_process_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "node.db"
    database = await Database.open(real_world(), path, [FIRST])
    script = """
import sys, trio, pathlib
from knode.errors import KnodeError
from knode.storage import Database
from knode.world.real import real_world
try:
    trio.run(Database.open, real_world(), pathlib.Path(sys.argv[1]), ())
except KnodeError as error:
    print(error.code)
"""
    done = await trio.run_process([sys.executable, "-c", script, str(path)], capture_stdout=True)
    assert done.stdout == b"LOCKED\n"
    await database.aclose()


async def test_a_cancelled_write_is_whole_or_not_begun(tmp_path: Path) -> None:
    database = await Database.open(real_world(), tmp_path / "node.db", [FIRST])
    begun: list[int] = []
    finished: list[int] = []
    token = trio.lowlevel.current_trio_token()

    async def write(number: int) -> None:
        def two_rows(connection: apsw.Connection) -> None:
            connection.execute("INSERT INTO note (text) VALUES (?)", (str(number),))
            begun.append(number)
            if len(begun) == 5:
                # Cancelled while this transaction runs: it ends first.
                trio.from_thread.run_sync(nursery.cancel_scope.cancel, trio_token=token)
            connection.execute("INSERT INTO note (text) VALUES (?)", (str(number),))

        await database.write(two_rows)
        finished.append(number)

    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(write, number)
    assert nursery.cancel_scope.cancelled_caught
    assert begun == finished
    assert len(finished) == 5
    stored = await database.read(texts)
    assert sorted(stored) == sorted(str(number) for number in finished for _ in range(2))
    await database.write(insert("after"))
    await database.aclose()


WRITER = """
import sys, trio, pathlib
from knode.storage import Database
from knode.world.real import real_world

async def main():
    database = await Database.open(real_world(), pathlib.Path(sys.argv[1]), [sys.argv[2]])
    for number in range(1_000_000):
        await database.write(lambda c: c.execute("INSERT INTO note (text) VALUES (?)", (str(number),)))
        print(number, flush=True)

trio.run(main)
"""


async def test_acknowledged_writes_survive_a_killed_process(tmp_path: Path) -> None:
    path = tmp_path / "node.db"
    command = [sys.executable, "-c", WRITER, str(path), FIRST]
    output = bytearray()
    async with trio.open_nursery() as nursery:
        run = partial(trio.run_process, command, stdout=subprocess.PIPE, check=False)
        writer = await nursery.start(run)
        async for chunk in writer.stdout:
            output += chunk
            if output.count(b"\n") >= 50:
                writer.kill()
    acknowledged = [int(line) for line in output.splitlines()]
    database = await Database.open(real_world(), path, [FIRST])
    stored = [int(text) for text in await database.read(texts)]
    await database.aclose()
    assert stored[: len(acknowledged)] == acknowledged
    assert len(stored) - len(acknowledged) in (0, 1)


async def test_the_log_beside_the_file_stays_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database_module, "CHECKPOINT_PAGES", 16)
    path = tmp_path / "node.db"
    database = await Database.open(real_world(), path, [FIRST])
    for _ in range(200):
        await database.write(insert("x" * 1000))
    disk = real_world().disk
    assert disk.size(tmp_path / "node.db-wal") < 40 * 4200
    assert disk.size(path) > 100 * 1000
    await database.aclose()


async def test_a_view_shows_one_state_while_others_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "CHECKPOINT_PAGES", 4)
    path = tmp_path / "a b%?#.db"
    database = await Database.open(real_world(), path, [FIRST], synchronous="NORMAL")
    await database.write(insert("before"))
    for turn in range(2):
        earlier = await database.read(texts)
        async with database.view() as view:
            rows = view.connection.execute("SELECT text FROM note ORDER BY id")
            seen = [await view.read(partial(next, rows))]
            for number in range(50):
                await database.write(insert("x" * 1000 + f"{turn} {number}"))
            seen += await view.read(lambda rows=rows: list(rows))
            assert [text for (text,) in seen] == earlier
            assert len(await database.read(texts)) == len(earlier) + 50
            with pytest.raises(KnodeError) as error:
                await view.read(lambda: view.connection.execute("DELETE FROM note"))
            assert error.value.code is Code.DISK_READ_ONLY
    await database.write(insert("after"))
    assert real_world().disk.size(path) > 50 * 1000
    await database.aclose()
    assert os.listdir(tmp_path) == [path.name]


async def test_the_log_is_bounded_while_a_view_is_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "CHECKPOINT_PAGES", 4)
    monkeypatch.setattr(database_module, "VIEW_LOG_PAGES", 20)
    path = tmp_path / "node.db"
    database = await Database.open(real_world(), path, [FIRST])
    written = 0

    async def write() -> None:
        nonlocal written
        for _ in range(100):
            await database.write(insert("x" * 1000))
            written += 1

    async with trio.open_nursery() as nursery, database.view() as view:
        nursery.start_soon(write)
        while not database.waited_for_views:
            await trio.lowlevel.checkpoint()
        stopped_at = written
        assert 5 < stopped_at < 20
        assert real_world().disk.size(tmp_path / "node.db-wal") < 24 * 4200
        assert len(await database.read(texts)) == stopped_at
        nursery.start_soon(database.sync)
        await trio.testing.wait_all_tasks_blocked()
        assert written == stopped_at
        assert await view.read(lambda: texts(view.connection)) == []
    assert (written, database.waited_for_views) == (100, 1)
    await database.aclose()


async def test_closing_and_other_views_wait_for_a_view(tmp_path: Path) -> None:
    database = await Database.open(real_world(), tmp_path / "node.db", [FIRST])
    ended: list[str] = []

    async def look() -> None:
        async with database.view() as view:
            ended.append(f"second view sees {await view.read(lambda: texts(view.connection))}")

    async def close() -> None:
        await database.aclose()
        ended.append("closed")

    async with trio.open_nursery() as nursery, database.view():
        nursery.start_soon(look)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(close)
        await database.write(insert("one"))
        await trio.testing.wait_all_tasks_blocked()
        assert ended == []
    assert ended == ["second view sees ['one']", "closed"]
    with pytest.raises(trio.ClosedResourceError):
        async with database.view():
            pass


async def test_a_bit_of_a_tables_definition_that_flips_is_damage_and_a_wrong_statement_is_a_fault(
    tmp_path: Path,
) -> None:
    path = tmp_path / "node.db"
    database = await Database.open(real_world(), path, [FIRST, SECOND])
    with pytest.raises(apsw.SQLError):
        await database.read(lambda connection: connection.execute("SELECT nothing FROM note"))
    await database.aclose()
    data = path.read_bytes()
    assert data.count(b"text TEXT") == 1
    path.write_bytes(data.replace(b"text TEXT", b"tezt TEXT"))
    database = await Database.open(real_world(), path, [FIRST, SECOND])
    with pytest.raises(KnodeError, match="not as they were made") as error:
        await database.read(texts)
    assert error.value.code is Code.HOME_DAMAGED
    await database.aclose()
