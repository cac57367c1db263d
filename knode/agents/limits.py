"""What an attempt may use, at most. Every limit has a default and a maximum."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

import msgspec

MEBIBYTE = 1024 * 1024
MAX_RESULT_BYTES = 192 * 1024
"""The largest result of a task: it travels in one message."""
MAX_JSON_DEPTH = 32
"""Of arrays and objects in each other. What a decoder bears differs from one Python to the next."""

Memory = Annotated[int, msgspec.Meta(ge=16 * MEBIBYTE, le=16 * 1024 * MEBIBYTE)]
Seconds = Annotated[int, msgspec.Meta(ge=1, le=3600)]
Processes = Annotated[int, msgspec.Meta(ge=1, le=256)]
OpenFiles = Annotated[int, msgspec.Meta(ge=16, le=4096)]
FileBytes = Annotated[int, msgspec.Meta(ge=0, le=4096 * MEBIBYTE)]
Files = Annotated[int, msgspec.Meta(ge=0, le=10_000)]
OutputBytes = Annotated[int, msgspec.Meta(ge=1, le=MAX_RESULT_BYTES)]


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The limits of one attempt. They hold for all its processes together, unless a line says else.

    How hard each one is depends on the sandbox and the kernel: see docs/guides/agents.md.
    """

    memory_bytes: Memory = 512 * MEBIBYTE
    """Memory, together; also the address space of each single process."""
    cpu_seconds: Seconds = 60
    """Processor time."""
    wall_seconds: Seconds = 120
    """Time from start to end."""
    processes: Processes = 32
    """Processes and threads at once."""
    open_files: OpenFiles = 256
    """Open files of each process."""
    file_bytes: FileBytes = 256 * MEBIBYTE
    """Bytes that the attempt may leave on the disk; also the size of each single file."""
    files: Files = 1000
    """Files and folders that the attempt may make."""
    output_bytes: OutputBytes = MAX_RESULT_BYTES
    """Bytes on standard output."""


def is_too_deep(value: Any) -> bool:
    """Tell whether arrays and objects of a decoded JSON value lie in each other beyond MAX_JSON_DEPTH."""
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [part for each in level for part in _parts(each)]
    return any(isinstance(each, dict | list) for each in level)


def _parts(value: Any) -> Iterable[Any]:
    match value:
        case dict():
            return value.values()
        case list():
            return value
    return ()
