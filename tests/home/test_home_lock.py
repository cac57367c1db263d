from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from real_processes import Process

from knode.errors import Code, KnodeError
from knode.home.folder import create_home
from knode.home.layout import Home
from knode.home.lock import hold_home, make_socket_folder
from knode.world.real import real_world

HOLDER = """
import sys, pathlib
from knode.home.layout import Home
from knode.home.lock import hold_home
with hold_home(Home(pathlib.Path(sys.argv[1]), None)):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_held_home_is_refused_with_the_holder_and_free_after_its_death(tmp_path: Path) -> None:
    home = Home(tmp_path / "home", None)
    create_home(real_world(), home, name="attic")
    command = [sys.executable, "-c", HOLDER, str(home.path)]
    with Process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(KnodeError, match=f"process {holder.pid}") as error, hold_home(home):
            pass
        assert error.value.code is Code.LOCKED
        assert f"'kill {holder.pid}'" in error.value.next_step  # the way out when its socket is gone
        holder.kill()
        holder.wait()
    with hold_home(home):
        assert home.lock_file.read_text() == f"{os.getpid()}\n"


def test_the_lock_is_free_after_an_error_inside(tmp_path: Path) -> None:
    home = Home(tmp_path / "home", None)
    create_home(real_world(), home, name="attic")
    with pytest.raises(ZeroDivisionError), hold_home(home):
        raise ZeroDivisionError
    with hold_home(home):
        pass


def test_a_socket_folder_that_others_may_write_is_refused(tmp_path: Path) -> None:
    home = Home(tmp_path / ("x" * 120), tmp_path / "runtime")
    make_socket_folder(home)
    assert home.socket.parent.stat().st_mode & 0o777 == 0o700
    home.socket.parent.chmod(0o777)
    with pytest.raises(KnodeError) as error:
        make_socket_folder(home)
    assert error.value.code is Code.NOT_ALLOWED


def test_a_socket_folder_behind_a_symbolic_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "runtime").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(KnodeError) as error:
        make_socket_folder(Home(tmp_path / ("x" * 120), tmp_path / "runtime"))
    assert error.value.code is Code.NOT_ALLOWED
