"""While a simulation runs, the real world is out of bounds: whoever reaches for it is named.

Two nets. Clocks, randomness, trio's threads and questions about files are Python functions: they are
replaced, in their own module and wherever knode has imported them by name. Opened files, sockets,
threads and processes go through the interpreter's audit hook, which sees them whatever way they were
reached. Python offers no way to take a hook out again, so it stays, deaf.

What none of them sees: an unseeded `random.Random()`, and what C extensions do by themselves.
"""

from __future__ import annotations

import _thread
import contextlib
import datetime
import os
import random
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import trio

PACKAGE = Path(__file__).parents[1]

_CLOCKS = (
    *("time", "time_ns", "monotonic", "monotonic_ns", "clock_gettime", "clock_gettime_ns", "sleep"),
    *("process_time", "process_time_ns", "thread_time", "thread_time_ns"),
    *("localtime", "gmtime", "ctime", "asctime", "strftime"),
)
_DICE = tuple(name for name in random.__all__ if name.islower())  # the functions; its classes are seeded
_QUESTIONS = ("stat", "lstat", "access", "statvfs")
"""What `os` tells about a file without opening it; the audit hook does not hear these."""
_FUNCTIONS: list[tuple[Any, str]] = [
    *((time, name) for name in _CLOCKS),
    *((random, name) for name in _DICE),
    (random, "_urandom"),  # what `secrets` and `random.SystemRandom` take it from
    (os, "urandom"),  # and `uuid.uuid4`
    *((os, name) for name in ("getrandom",) if hasattr(os, "getrandom")),
    (threading.Thread, "start"),
    (_thread, "start_new_thread"),
    (trio.to_thread, "run_sync"),
    (trio.lowlevel, "start_thread_soon"),
]
_EVENTS = frozenset(
    {"subprocess.Popen", "os.system", "os.fork", "os.posix_spawn", "os.exec"}
    | {"os.listdir", "os.scandir", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate"}
    | {"os.link", "os.symlink", "os.chmod", "os.chown", "os.utime", "sqlite3.connect"}
)
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class TouchedRealWorld(Exception):
    """Something reached past the simulated world; the message says what, and on which line."""


@contextlib.contextmanager
def guard() -> Iterator[None]:
    """Let every touch of the real world by this thread raise, and fail even when that was swallowed.

    Allowed are `time.perf_counter`, which trio asks, and looking at what is part of Python's installation
    or of knode. Afterwards everything is as it was.

    Raises:
        TouchedRealWorld: with the first touch.
    """
    watch = _Watch()
    with contextlib.ExitStack() as undo:
        for holder, name in _FUNCTIONS:
            label = f"{getattr(holder, '__name__', holder)}.{name}"
            _replace(undo, holder, name, watch.refusing(label, getattr(holder, name)))
        for name in _QUESTIONS:
            unless = _is_on_the_way_to_ours if name == "lstat" else _is_about_ours
            _replace(undo, os, name, watch.refusing(f"os.{name}", getattr(os, name), unless))
        _replace(undo, datetime, "datetime", _guarded_datetime(watch))
        _replace(undo, datetime, "date", _guarded_date(watch))
        _Hook.listen(undo, watch)
        try:
            yield
        except BaseException as error:
            if watch.touches:
                raise TouchedRealWorld(watch.touches[0]) from error
            raise
    if watch.touches:
        raise TouchedRealWorld(watch.touches[0])


class _Watch:
    """What one guarded run has touched."""

    def __init__(self) -> None:
        self.touches: list[str] = []
        self._thread = threading.get_ident()

    @property
    def is_ours(self) -> bool:
        """Whether the simulation's thread asks; others do as they like."""
        return threading.get_ident() == self._thread

    def touch(self, what: str) -> NoReturn:
        """Note a touch, and refuse it."""
        self.touches.append(f"{what} at {_line_of_caller()}")
        raise TouchedRealWorld(self.touches[-1])

    def refusing(
        self, label: str, real: Callable[..., Any], unless: Callable[..., bool] = lambda *arguments: False
    ) -> Callable[..., Any]:
        """Return what stands in for `real`; a call with arguments that pass `unless` is let through."""

        def refuse(*arguments: Any, **named: Any) -> Any:
            if self.is_ours and not unless(*arguments):
                self.touch(label)
            return real(*arguments, **named)

        return refuse

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Take an event of the audit hook."""
        if event == "open":
            path, _, flags = arguments
            if self.is_ours and not _is_allowed(path, flags) and not _is_importing():
                self.touch(f"opening {path!r}")
        elif (event in _EVENTS or event.startswith("socket.")) and self.is_ours and not _is_importing():
            self.touch(event)


def _guarded_datetime(watch: _Watch) -> type[datetime.datetime]:
    """Return a `datetime` that does not know what time it is."""
    real = datetime.datetime

    class GuardedDateTime(real):  # type: ignore[valid-type, misc]
        now = classmethod(watch.refusing("datetime.now", real.now))
        utcnow = classmethod(watch.refusing("datetime.utcnow", real.now))
        today = classmethod(watch.refusing("datetime.today", real.today))

    return GuardedDateTime


def _guarded_date(watch: _Watch) -> type[datetime.date]:
    """Return a `date` that does not know what day it is."""
    real = datetime.date

    class GuardedDate(real):  # type: ignore[valid-type, misc]
        today = classmethod(watch.refusing("date.today", real.today))

    return GuardedDate


class _Hook:
    """The one audit hook of this process, added when it is first needed."""

    watch: ClassVar[_Watch | None] = None
    added: ClassVar[bool] = False

    @classmethod
    def listen(cls, undo: contextlib.ExitStack, watch: _Watch) -> None:
        """Let `watch` hear the events until undone."""
        assert cls.watch is None, "one simulation at a time"
        if not cls.added:
            cls.added = True
            sys.addaudithook(cls._hear)
        cls.watch = watch
        undo.callback(setattr, cls, "watch", None)

    @classmethod
    def _hear(cls, event: str, arguments: tuple[Any, ...]) -> None:
        if cls.watch is not None:
            cls.watch.hear(event, arguments)


def _replace(undo: contextlib.ExitStack, holder: Any, name: str, guarded: Any) -> None:
    """Put `guarded` in the place of what `holder` calls `name`, and of what knode's modules made of it."""
    real = getattr(holder, name)
    places = [(holder, name)]
    for module_name, module in list(sys.modules.items()):
        if module_name.split(".")[0] == "knode" and module_name != __name__:
            places += [(module, key) for key, value in vars(module).items() if value is real]
    for place, key in places:
        undo.callback(setattr, place, key, real)
        setattr(place, key, guarded)


@cache
def _readable() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    folders = {paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")} | {str(PACKAGE)}
    return tuple(sorted(os.path.join(folder, "") for folder in folders))


def _is_allowed(path: Any, flags: int) -> bool:
    """Tell whether this may be opened: an open descriptor, or a file of Python or knode, to read."""
    if isinstance(path, int):
        return True
    return not flags & _WRITES and os.fsdecode(path).startswith(_readable())


def _is_about_ours(*arguments: Any) -> bool:
    return bool(arguments) and _is_allowed(arguments[0], os.O_RDONLY)


def _is_on_the_way_to_ours(*arguments: Any) -> bool:
    """Tell whether it is ours or a folder above it, which `os.path.realpath` asks whether it is a link."""
    if _is_about_ours(*arguments):
        return True
    folder = os.path.join(os.fsdecode(arguments[0]), "") if arguments else ""
    return bool(folder) and any(readable.startswith(folder) for readable in _readable())


def _is_importing() -> bool:
    """Tell whether it is Python's import that asks: it looks into folders and writes its cache."""
    frame = sys._getframe(3)
    return frame.f_code.co_filename.startswith("<frozen importlib")


def _line_of_caller() -> str:
    """Return file and line of the innermost caller that belongs neither to Python nor to a library."""
    frame: Any = sys._getframe(1)
    libraries = tuple(folder for folder in _readable() if folder != os.path.join(PACKAGE, ""))
    while frame.f_back is not None:
        name = frame.f_code.co_filename
        if name != __file__ and not name.startswith((*libraries, "<frozen")):
            break
        frame = frame.f_back
    path = Path(frame.f_code.co_filename)
    shown = path.relative_to(PACKAGE.parent) if path.is_relative_to(PACKAGE) else path.name
    return f"{shown}:{frame.f_lineno}"
