"""The guard: every way to the real world is seen, named with its line, and free again afterwards."""

from __future__ import annotations

import _thread
import contextlib
import datetime
import os
import random
import secrets
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from knode.simulation.guard import TouchedRealWorld, guard
from knode.simulation.run import Run
from knode.simulation.scenario import load
from knode.world import real

TOUCHES: dict[str, Callable[[], Any]] = {
    "time.time": lambda: time.time(),
    "time.time_ns": lambda: time.time_ns(),
    "time.monotonic": lambda: time.monotonic(),
    "time.monotonic_ns": lambda: time.monotonic_ns(),
    "time.sleep": lambda: time.sleep(0),
    "time.localtime": lambda: time.localtime(),
    "time.strftime": lambda: time.strftime("%Y"),
    "time.process_time": lambda: time.process_time(),
    "datetime.now": lambda: datetime.datetime.now(datetime.UTC),
    "datetime.utcnow": lambda: datetime.datetime.utcnow(),
    "datetime.today": lambda: datetime.datetime.today(),
    "date.today": lambda: datetime.date.today(),
    "os.urandom": lambda: os.urandom(1),
    "random._urandom": lambda: secrets.token_bytes(1),
    "random.random": lambda: random.random(),
    "random.choice": lambda: random.choice([1]),
    "random.triangular": lambda: random.triangular(),
    "os.urandom ": lambda: uuid.uuid4(),
    "Thread.start": lambda: threading.Thread(target=len, args=("",)).start(),
    "_thread.start_new_thread": lambda: _thread.start_new_thread(len, ("",)),
    "socket.__new__": lambda: socket.socket(),
    "socket.getaddrinfo": lambda: socket.getaddrinfo("127.0.0.1", 1),
    "socket.gethostname": lambda: socket.gethostname(),
    "opening": lambda: open(__file__ + ".new", "w"),  # noqa: SIM115
    "opening ": lambda: Path("/etc/hostname").read_text(),
    "opening  ": lambda: os.open("/dev/null", os.O_WRONLY),
    "os.stat": lambda: Path("/etc/hostname").exists(),
    "os.lstat": lambda: os.lstat("/etc/hostname"),
    "os.access": lambda: os.access("/etc/hostname", os.R_OK),
    "os.statvfs": lambda: os.statvfs("/"),
    "os.mkdir": lambda: Path("/nowhere/at/all").mkdir(),
    "os.listdir": lambda: os.listdir("/"),
    "subprocess.Popen": lambda: subprocess.run(["true"], check=True),
}


@pytest.mark.parametrize("what", TOUCHES)
def test_a_touch_is_refused_and_named_with_its_line(what: str) -> None:
    with pytest.raises(TouchedRealWorld) as caught, guard():
        TOUCHES[what]()
    message = str(caught.value)
    assert message.startswith(what.strip()), message
    line = TOUCHES[what].__code__.co_firstlineno
    assert message.endswith(f"test_simulation_guard.py:{line}"), message


def test_a_touch_by_a_name_that_knode_had_imported_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real, "now", time.time, raising=False)
    with pytest.raises(TouchedRealWorld, match=r"time\.time at"), guard():
        real.now()  # type: ignore[attr-defined]
    assert real.now is time.time  # type: ignore[attr-defined]


async def test_a_thread_of_trio_is_refused() -> None:
    with pytest.raises(TouchedRealWorld, match="to_thread"), guard():
        await trio.to_thread.run_sync(len, "")


def test_a_touch_that_was_swallowed_fails_the_run_all_the_same() -> None:
    with pytest.raises(TouchedRealWorld, match=r"os\.urandom"), guard(), contextlib.suppress(Exception):
        os.urandom(1)


def test_what_belongs_to_python_or_knode_may_be_read_and_other_threads_do_as_they_like() -> None:
    done: list[float] = []
    begin, end = threading.Event(), threading.Event()

    def other() -> None:
        begin.wait()
        done.append(time.time())
        Path("/dev/null").write_bytes(b"")
        end.set()

    thread = threading.Thread(target=other)
    thread.start()
    with guard():
        assert Path(os.__file__).read_bytes()
        assert (Path(real.__file__).parent / "__init__.py").read_bytes()
        assert time.perf_counter() > 0
        begin.set()
        assert end.wait(10)
    thread.join()
    assert done


def test_afterwards_everything_is_as_it_was() -> None:
    def everything() -> list[Any]:
        modules = [time, random, os, datetime, threading, trio.to_thread]
        modules += [module for name, module in sorted(sys.modules.items()) if name.startswith("knode")]
        return [sorted((key, id(value)) for key, value in vars(module).items()) for module in modules]

    before, start = everything(), threading.Thread.start
    with pytest.raises(ZeroDivisionError), guard():
        _ = 1 / 0
    assert everything() == before
    assert threading.Thread.start is start
    assert time.time() > 0
    assert open(os.devnull, "w").close() is None


def test_a_node_that_asks_for_the_real_time_fails_its_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from knode.mesh.peers import Peers

    follow = Peers._follow_roster

    def hurried(self: Peers) -> None:
        time.time()
        follow(self)

    monkeypatch.setattr(Peers, "_follow_roster", hurried)
    with pytest.raises(TouchedRealWorld, match=r"time\.time at test_simulation_guard\.py:\d+"):
        Run(load("calm"), 1, 2).run()
