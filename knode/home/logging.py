"""The node's log: structured events, one JSON object a line, without secrets.

Every line has `time` (UTC), `level` and `event`; then whatever was bound to the logger or to the
running trio task with `structlog.contextvars` (trace, task and agent ids), then what the call gave.
Log from trio's thread alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TextIO

from knode.home.broadcast import Broadcast
from knode.home.configuration import LogSettings
from knode.home.layout import Home
from knode.home.log_file import LogFile
from knode.world import Clock, World

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

Event = MutableMapping[str, Any]
SECRET_WORDS = frozenset({"secret", "seed", "ticket", "recovery", "passphrase", "token"})
HIDDEN = "[hidden]"
TEXT_LIMIT_CHARACTERS = 16 * 1024
LINE_LIMIT_CHARACTERS = 64 * 1024
DEPTH_LIMIT = 6


@dataclass(frozen=True, slots=True)
class OpenLog:
    """A logger, those who follow its lines, and how to end both."""

    logger: FilteringBoundLogger
    lines: Broadcast
    close: Callable[[], None]


def open_log(world: World, home: Home, settings: LogSettings, *, terminal: TextIO | None = None) -> OpenLog:
    """Return a log that goes to the home's log file, and to `terminal` in a form for people.

    The file is opened with the first line; one that cannot be written, now or later, loses lines and
    says how many as soon as it can.
    """
    file = LogFile(home.log_file, max_bytes=settings.max_bytes, keep=settings.keep)
    broadcast = Broadcast()

    def write(event: Event) -> None:
        line = to_line(event)
        broadcast.publish(line)
        if file.append(line) and file.lost:
            count = file.take_lost()
            file.append(to_line(_event(world.clock, "warning", "log lines lost", count=count)))
        if terminal is not None:
            _show(terminal, event)

    def close() -> None:
        broadcast.close()
        file.close()

    return OpenLog(_logger(world.clock, settings.level, write), broadcast, close)


def log_to(world: World, sink: Callable[[str], None], *, level: str = "info") -> OpenLog:
    """Return a log whose JSON lines go to `sink` alone: for the simulator and for tests."""
    broadcast = Broadcast()

    def write(event: Event) -> None:
        line = to_line(event)
        broadcast.publish(line)
        sink(line)

    return OpenLog(_logger(world.clock, level, write), broadcast, broadcast.close)


def redact(value: object, depth: int = 0) -> object:
    """Return `value` with every secret hidden and every long text cut.

    A secret is what stands under a key one of whose words, between underscores, is in SECRET_WORDS.
    """
    if depth > DEPTH_LIMIT:
        return "[too deep]"
    if isinstance(value, Mapping):
        return {
            str(key): HIDDEN if is_secret(str(key)) else redact(content, depth + 1)
            for key, content in value.items()
        }
    if isinstance(value, list | tuple | set | frozenset):
        return [redact(content, depth + 1) for content in value]
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return f"[{len(value)} bytes]"
    text = str(value)
    return text if len(text) <= TEXT_LIMIT_CHARACTERS else text[:TEXT_LIMIT_CHARACTERS] + "…"


def is_secret(key: str) -> bool:
    """Tell whether the value under `key` must not be written."""
    return not SECRET_WORDS.isdisjoint(key.lower().replace("-", "_").split("_"))


def to_line(event: Event) -> str:
    """Return an event as one line of JSON, without secrets, of at most LINE_LIMIT_CHARACTERS."""
    line = json.dumps(redact(event), ensure_ascii=False, default=str)
    if len(line) > LINE_LIMIT_CHARACTERS:
        short = {key: event[key] for key in ("time", "level", "event")}
        line = json.dumps({**short, "event": str(event["event"])[:1024], "cut_characters": len(line)})
    # A lone surrogate is no UTF-8; escaped it is JSON still.
    return line.encode("utf-8", "backslashreplace").decode()


def to_text(event: Event) -> str:
    """Return an event as a line for people: time of day, level, event, and the rest as key=value.

    Characters that a terminal would act on are escaped: values may come from other nodes.
    """
    shown: Any = redact(event)
    rest = " ".join(
        f"{key}={value}" for key, value in shown.items() if key not in ("time", "level", "event", "exception")
    )
    line = _printable(f"{shown['time'][11:19]} {shown['level']:<7} {shown['event']}  {rest}".rstrip())
    trace = str(shown.get("exception", "")).splitlines()
    return "\n".join([line, *map(_printable, trace)])


def _printable(text: str) -> str:
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )


def _logger(clock: Clock, level: str, write: Callable[[Event], None]) -> FilteringBoundLogger:
    # structlog takes a tenth of a second to import, and the command line needs no log.
    import structlog

    def stamp(_: Any, method: str, event: Event) -> Event:
        name = "error" if method in ("exception", "critical") else method
        return {**_event(clock, name, event.pop("event")), **event}

    def finish(_: Any, __: str, event: Event) -> tuple[tuple[Event], dict[str, Any]]:
        return (event,), {}

    logger: FilteringBoundLogger = structlog.wrap_logger(
        _Sink(write),
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.format_exc_info,
            stamp,
            finish,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        context_class=dict,
    )
    return logger


class _Sink:
    """What structlog calls at the end, by the level's name."""

    def __init__(self, write: Callable[[Event], None]) -> None:
        self.debug = self.info = self.warning = self.error = self.critical = self.exception = write


def _event(clock: Clock, level: str, event: object, **rest: object) -> Event:
    time = datetime.fromtimestamp(clock.wall() / 1000, UTC).isoformat(timespec="milliseconds")
    return {"time": time.replace("+00:00", "Z"), "level": level, "event": event, **rest}


def _show(terminal: TextIO, event: Event) -> None:
    try:
        terminal.write(to_text(event) + "\n")
        terminal.flush()
    except (OSError, ValueError):
        # The terminal is gone; the file has the line.
        return
