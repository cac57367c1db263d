"""What every disk promises, asked of the real one and of the simulated one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knode.errors import Code, KnodeError
from knode.simulation.disk import SimulatedDisk
from knode.world import Disk
from knode.world.real import RealDisk


@pytest.fixture(params=[RealDisk, SimulatedDisk])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    disk: Disk = request.param()
    disk.make_folder(tmp_path)
    yield disk
    if isinstance(disk, SimulatedDisk):
        disk.close()


def refused(code: Code) -> pytest.RaisesExc[KnodeError]:
    return pytest.RaisesExc(KnodeError, check=lambda error: error.code is code)


def test_a_written_file_is_read_whole_and_replaced_whole(disk: Disk, tmp_path: Path) -> None:
    path = tmp_path / "file"
    disk.write(path, b"first, and long")
    disk.write(path, b"second")
    assert disk.read(path, limit_bytes=6) == b"second"
    assert disk.size(path) == 6
    assert disk.list_folder(tmp_path) == ["file"]


def test_a_file_over_the_limit_is_refused(disk: Disk, tmp_path: Path) -> None:
    disk.write(tmp_path / "file", b"1234")
    with refused(Code.TOO_LARGE):
        disk.read(tmp_path / "file", limit_bytes=3)


def test_what_is_not_there_is_named(disk: Disk, tmp_path: Path) -> None:
    for ask in (
        lambda: disk.read(tmp_path / "none", limit_bytes=1),
        lambda: disk.size(tmp_path / "none"),
        lambda: disk.is_plain(tmp_path / "none"),
        lambda: disk.write(tmp_path / "none" / "file", b""),
        lambda: disk.create(tmp_path / "none" / "file"),
        lambda: disk.append(tmp_path / "none", 0),
        lambda: disk.sync_folder(tmp_path / "none"),
    ):
        with pytest.raises(KnodeError, match="none") as error:
            ask()
        assert error.value.code is Code.NOT_FOUND
    assert not disk.exists(tmp_path / "none")
    assert disk.list_folder(tmp_path / "none") == []
    disk.remove(tmp_path / "none")


def test_a_file_is_plain_and_a_folder_is_not(disk: Disk, tmp_path: Path) -> None:
    disk.write(tmp_path / "file", b"x")
    disk.make_folder(tmp_path / "folder")
    assert disk.is_plain(tmp_path / "file")
    assert not disk.is_plain(tmp_path / "folder")


def test_links_pipes_and_what_may_not_be_read_are_not_plain(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "dangling").symlink_to("none")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "secret").write_text("x")
    (tmp_path / "secret").chmod(0o200)
    (tmp_path / "one").write_text("x")
    (tmp_path / "two").hardlink_to(tmp_path / "one")
    plain = {path.name for path in tmp_path.iterdir() if RealDisk().is_plain(path)}
    assert plain == {"file"}


def test_a_created_file_grows_at_its_end_and_replaces_the_one_before(disk: Disk, tmp_path: Path) -> None:
    path = tmp_path / "file"
    disk.write(path, b"something older and longer")
    with disk.create(path) as file:
        file.write(b"one ")
        file.write(b"two")
        file.sync()
    file.close()
    assert disk.read(path, limit_bytes=100) == b"one two"


def test_a_file_is_cut_and_written_on(disk: Disk, tmp_path: Path) -> None:
    path = tmp_path / "file"
    disk.write(path, b"kept, and cut")
    with disk.append(path, 4) as file:
        assert disk.read(path, limit_bytes=100) == b"kept"
        file.write(b" and")
        file.write(b" more")
        file.sync()
    with disk.append(path, disk.size(path)) as file:
        file.write(b".")
    disk.sync_folder(tmp_path)
    assert disk.read(path, limit_bytes=100) == b"kept and more."


def test_a_file_that_is_shorter_than_what_is_to_be_kept_is_refused(disk: Disk, tmp_path: Path) -> None:
    disk.write(tmp_path / "file", b"1234")
    with refused(Code.INVALID_ARGUMENT):
        disk.append(tmp_path / "file", 5)
    assert disk.read(tmp_path / "file", limit_bytes=100) == b"1234"


def test_folders_are_made_listed_and_removed_with_all_that_is_in_them(disk: Disk, tmp_path: Path) -> None:
    disk.make_folder(tmp_path / "a" / "b")
    disk.make_folder(tmp_path / "a" / "b")
    disk.write(tmp_path / "a" / "file", b"")
    disk.write(tmp_path / "a" / "b" / "deep", b"")
    disk.write(tmp_path / "ab", b"a name that only begins alike")
    assert disk.list_folder(tmp_path / "a") == ["b", "file"]
    assert disk.exists(tmp_path / "a" / "b")
    disk.remove(tmp_path / "a")
    assert disk.list_folder(tmp_path) == ["ab"]
    assert not disk.exists(tmp_path / "a" / "b" / "deep")


def test_real_files_and_folders_are_private(tmp_path: Path) -> None:
    disk = RealDisk()
    disk.make_folder(tmp_path / "a" / "b")
    disk.write(tmp_path / "a" / "file", b"")
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("a", "a/b", "a/file")]
    assert modes == [0o700, 0o700, 0o600]


def test_a_full_real_disk_is_named_and_the_old_file_stays(tmp_path: Path) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    with RealDisk().create(Path("/dev/full")) as file, refused(Code.DISK_FULL):
        file.write(b"x")


NAMES = st.sampled_from(["a", "b", "a/c", "a/d", "e/f"])
OPERATIONS = st.one_of(
    st.tuples(st.just("write"), NAMES, st.binary(max_size=8)),
    st.tuples(st.just("create"), NAMES, st.binary(max_size=8)),
    st.tuples(st.just("append"), NAMES, st.binary(max_size=8)),
    st.tuples(st.sampled_from(["read", "size", "exists", "list", "remove", "folder"]), NAMES, st.just(b"")),
)


def outcome(disk: Disk, root: Path, operation: str, name: str, data: bytes) -> object:
    path = root / name
    try:
        match operation:
            case "write":
                disk.write(path, data)
            case "create":
                with disk.create(path) as file:
                    file.write(data)
            case "append":
                with disk.append(path, len(data) // 2) as file:
                    file.write(data)
            case "read":
                return disk.read(path, limit_bytes=4)
            case "size":
                return disk.size(path)
            case "exists":
                return disk.exists(path)
            case "list":
                return disk.list_folder(path.parent)
            case "remove":
                disk.remove(path)
            case "folder":
                disk.make_folder(path.parent)
    except KnodeError as error:
        return error.code
    return None


@settings(max_examples=100, deadline=None)
@given(st.lists(OPERATIONS, max_size=20))
def test_the_simulated_disk_answers_as_the_real_one(
    tmp_path_factory: pytest.TempPathFactory, operations: list[tuple[str, str, bytes]]
) -> None:
    root = tmp_path_factory.mktemp("disk")
    real, simulated = RealDisk(), SimulatedDisk()
    simulated.make_folder(root)
    # A file stands for a folder nowhere: "a" is only ever a folder here, "b" only a file.
    for operation, name, data in operations:
        if name == "a" and operation in ("write", "create", "append", "read", "size"):
            continue
        expected = outcome(real, root, operation, name, data)
        assert outcome(simulated, root, operation, name, data) == expected
    simulated.close()
