from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from knode.errors import Code, KnodeError
from knode.home.folder import FORMAT, complete_home, create_home, open_home, prepare_home
from knode.home.layout import SOCKET_PATH_BYTES, Home, locate_home
from knode.simulation.disk import SimulatedDisk
from knode.world.real import RealDisk, real_world


def home_at(path: Path) -> Home:
    return Home(path, None)


def test_a_created_home_is_private_and_opens_with_its_name(tmp_path: Path) -> None:
    home = home_at(tmp_path / "deep" / "home")
    created = create_home(real_world(), home, name="attic")
    assert open_home(real_world(), home) == created
    assert (created.format, created.node) == (FORMAT, "attic")
    for folder in home.folders:
        assert folder.stat().st_mode & 0o777 == 0o700
    assert home.format_file.stat().st_mode & 0o777 == 0o600
    assert not home.unfinished_file.exists()


def test_a_home_is_not_created_twice(tmp_path: Path) -> None:
    home = home_at(tmp_path / "home")
    create_home(real_world(), home, name="first")
    with pytest.raises(KnodeError, match="already holds a node") as error:
        create_home(real_world(), home, name="second")
    assert error.value.code is Code.HOME_EXISTS
    assert open_home(real_world(), home).node == "first"


def test_a_half_made_home_is_no_node_and_the_next_attempt_starts_clean(tmp_path: Path) -> None:
    home = home_at(tmp_path / "home")
    prepare_home(real_world(), home)
    home.node_key.write_text("half a key")
    home.config_user.write_text("{}")
    with pytest.raises(KnodeError) as error:
        open_home(real_world(), home)
    assert error.value.code is Code.HOME_MISSING
    prepare_home(real_world(), home)
    assert not home.node_key.exists()
    assert home.config_user.read_text() == "{}"
    complete_home(real_world(), home, name="attic")
    assert open_home(real_world(), home).node == "attic"


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(KnodeError, match=r"letter\.txt") as error:
        create_home(real_world(), home_at(tmp_path), name="attic")
    assert error.value.code is Code.HOME_EXISTS
    assert sorted(path.name for path in tmp_path.iterdir()) == ["letter.txt", "state"]


def test_configuration_may_be_there_before_the_home(tmp_path: Path) -> None:
    home = home_at(tmp_path)
    home.config.mkdir()
    home.config_system.write_text('{"node": {"port": 5000}}')
    create_home(real_world(), home, name="attic")
    assert "5000" in home.config_system.read_text()


@pytest.mark.parametrize("name", ["", "Attic", "a b", "-a", "a-", "x" * 64, "ä", "a\n"])
def test_a_bad_name_is_refused_before_anything_is_made(tmp_path: Path, name: str) -> None:
    with pytest.raises(KnodeError) as error:
        create_home(real_world(), home_at(tmp_path / "home"), name=name)
    assert error.value.code is Code.INVALID_ARGUMENT
    assert not (tmp_path / "home").exists()


def test_a_missing_home_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(KnodeError) as error:
        open_home(real_world(), home_at(tmp_path / "none"))
    assert error.value.code is Code.HOME_MISSING
    assert "knode init" in error.value.next_step
    assert "knode join" in error.value.next_step
    assert not (tmp_path / "none").exists()


def test_a_home_of_a_newer_format_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    home = home_at(tmp_path)
    text = json.dumps({"format": FORMAT + 1, "cell": {"shape": "unknown to us"}})
    home.format_file.write_text(text)
    with pytest.raises(KnodeError) as error:
        open_home(real_world(), home)
    assert error.value.code is Code.HOME_TOO_NEW
    assert [path.name for path in tmp_path.iterdir()] == ["home.json"]
    assert home.format_file.read_text() == text


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b'{"format": 1}', b'{"format": "1"}', b"\xff\xfe", b"x" * 99999]
)
def test_a_damaged_format_file_is_named(tmp_path: Path, data: bytes) -> None:
    home = home_at(tmp_path)
    home.format_file.write_bytes(data)
    with pytest.raises(KnodeError, match=r"home\.json") as error:
        open_home(real_world(), home)
    assert error.value.code is Code.HOME_DAMAGED


def test_a_home_that_lost_its_format_file_is_damaged_not_missing(tmp_path: Path) -> None:
    home = home_at(tmp_path / "home")
    prepare_home(real_world(), home)
    home.node_key.write_text("a key")
    complete_home(real_world(), home, name="attic")
    home.format_file.unlink()
    with pytest.raises(KnodeError) as error:
        open_home(real_world(), home)
    assert error.value.code is Code.HOME_DAMAGED
    with pytest.raises(KnodeError) as error:
        create_home(real_world(), home, name="attic")
    assert error.value.code is Code.HOME_EXISTS
    assert home.node_key.read_text() == "a key"


def test_the_home_is_found_by_option_then_environment_then_default(tmp_path: Path) -> None:
    environment = {"KNODE_HOME": str(tmp_path / "b"), "HOME": str(tmp_path)}
    assert locate_home(str(tmp_path / "a"), environment).path == tmp_path / "a"
    assert locate_home(None, environment).path == tmp_path / "b"
    assert locate_home(None, {"HOME": str(tmp_path)}).path == tmp_path / ".local/share/knode"
    assert locate_home("~/x", environment).path == tmp_path / "x"
    assert locate_home("relative", {}).path == Path.cwd() / "relative"


def test_a_socket_path_that_is_too_long_moves_to_a_short_stable_one(tmp_path: Path) -> None:
    long = Path("/home") / ("x" * 120)
    runtime = Path("/run/user/1000")
    assert Home(Path("/home/x"), runtime).socket == Path("/home/x/run/knode.sock")
    assert Home(long, runtime).socket.parent == runtime
    assert Home(long, runtime).socket == Home(long, runtime).socket
    assert Home(long, runtime).socket != Home(long / "y", runtime).socket
    for folder in (None, Path("/run") / ("y" * 120)):
        socket = Home(long, folder).socket
        assert len(str(socket).encode()) <= SOCKET_PATH_BYTES
        assert str(socket).startswith("/tmp/knode-")


class PowerCut(Exception):
    pass


class FailingDisk(RealDisk):
    """A real disk on which the process dies before change number `left`."""

    def __init__(self, left: int) -> None:
        self.left = left

    def _count(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise PowerCut

    def write(self, path: Path, data: bytes, *, mode: int = 0o600) -> None:
        self._count()
        super().write(path, data, mode=mode)

    def make_folder(self, path: Path, *, mode: int = 0o700) -> None:
        self._count()
        super().make_folder(path, mode=mode)

    def remove(self, path: Path) -> None:
        self._count()
        super().remove(path)


@pytest.mark.parametrize("again", [0, 1, 3])
def test_a_home_whose_making_was_cut_anywhere_is_whole_or_made_anew(tmp_path: Path, again: int) -> None:
    world = real_world()
    for cut in range(100):
        home = home_at(tmp_path / str(cut))
        for left in [cut, *[again] * (again > 0)]:
            with contextlib.suppress(PowerCut, KnodeError):
                create_home(replace(world, disk=FailingDisk(left)), home, name="attic")
        try:
            content = open_home(world, home)
        except KnodeError:
            content = create_home(world, home, name="attic")
        assert open_home(world, home) == content
        if not home.unfinished_file.exists() and cut > len(home.folders) + 3:
            break
    else:
        pytest.fail("the making never came to its end")


def test_a_mark_that_was_cut_while_it_was_written_is_no_other_file(tmp_path: Path) -> None:
    (tmp_path / ".unfinished.4711.new").write_text("this ho")
    assert create_home(real_world(), home_at(tmp_path), name="attic").node == "attic"


def test_a_full_disk_leaves_no_home_and_the_next_attempt_makes_it() -> None:
    disk = SimulatedDisk()
    world = replace(real_world(), disk=disk)
    home = home_at(Path("/home/knode"))
    for room in (0, 80):
        disk.free(room)
        with pytest.raises(KnodeError) as error:
            create_home(world, home, name="attic")
        assert error.value.code is Code.DISK_FULL
        with pytest.raises(KnodeError) as error:
            open_home(world, home)
        assert error.value.code is Code.HOME_MISSING
    disk.free()
    assert create_home(world, home, name="attic") == open_home(world, home)
    disk.close()
