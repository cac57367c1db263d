"""Standard error of a program in a sandbox: reports of progress, and its last words."""

from __future__ import annotations

from collections import deque

from knode.agents.sandbox.sandbox import STDERR_TAIL_BYTES

PROGRESS_PREFIX = b"knode:progress "
MAX_PROGRESS_CHARACTERS = 200

Report = tuple[float | None, str]
"""A fraction from 0 to 1, or None, and a text."""


class StandardError:
    """What a program writes there: lines of progress are taken out, the end of the rest is kept."""

    def __init__(self) -> None:
        self._line = bytearray()
        self._kept: deque[bytes] = deque()
        self._kept_bytes = 0

    def add(self, chunk: bytes) -> list[Report]:
        """Take a piece and return the progress that its full lines report."""
        reports = []
        *lines, rest = chunk.split(b"\n")
        for line in lines:
            self._line += line
            report = parse_progress(bytes(self._line))
            if report is None:
                self._keep(bytes(self._line) + b"\n")
            else:
                reports.append(report)
            self._line.clear()
        self._line += rest
        del self._line[:-STDERR_TAIL_BYTES]
        return reports

    def tail(self) -> bytes:
        """Return the last 8 KiB."""
        return (b"".join(self._kept) + self._line)[-STDERR_TAIL_BYTES:]

    def _keep(self, line: bytes) -> None:
        self._kept.append(line)
        self._kept_bytes += len(line)
        while self._kept_bytes - len(self._kept[0]) >= STDERR_TAIL_BYTES:
            self._kept_bytes -= len(self._kept.popleft())


def parse_progress(line: bytes) -> Report | None:
    """Return fraction and text of a line `knode:progress 0.5 some text`; None when it is another line.

    What is not a fraction from 0 to 1 belongs to the text.
    """
    if not line.startswith(PROGRESS_PREFIX):
        return None
    words = line.removeprefix(PROGRESS_PREFIX).decode("utf-8", "replace").strip()
    first, _, rest = words.partition(" ")
    fraction: float | None
    try:
        fraction = float(first)
    except ValueError:
        fraction = None
    if fraction is None or not 0 <= fraction <= 1:
        fraction, rest = None, words
    printable = "".join(character for character in rest if character.isprintable())
    return fraction, printable[:MAX_PROGRESS_CHARACTERS]
