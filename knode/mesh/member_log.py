"""The log, as far as members cause its lines: a rogue one must not push all else out of the log's files."""

from __future__ import annotations

from typing import Any

from knode.mesh.roster import MAX_STATEMENTS
from knode.transport.strangers import LineLimit
from knode.world import Clock, Log

LINES_A_MINUTE = 120
"""About one member."""


class MemberLog:
    """Writes lines about peers, LINES_A_MINUTE about each; the next says how many were left out."""

    def __init__(self, clock: Clock, log: Log) -> None:
        self._clock = clock
        self._log = log
        self._limit = LineLimit(each=LINES_A_MINUTE, sources=MAX_STATEMENTS)

    def debug(self, event: str, *, peer: str, **fields: Any) -> None:
        """See `Log.debug`. Not limited: whoever switches it on wants to see all."""
        self._log.debug(event, peer=peer, **fields)

    def info(self, event: str, *, peer: str, **fields: Any) -> None:
        """See `Log.info`."""
        if (more := self._more(peer)) is not None:
            self._log.info(event, peer=peer, **fields, **more)

    def warning(self, event: str, *, peer: str, **fields: Any) -> None:
        """See `Log.warning`."""
        if (more := self._more(peer)) is not None:
            self._log.warning(event, peer=peer, **fields, **more)

    def error(self, event: str, *, peer: str, **fields: Any) -> None:
        """See `Log.error`."""
        if (more := self._more(peer)) is not None:
            self._log.error(event, peer=peer, **fields, **more)

    def _more(self, peer: str) -> dict[str, int] | None:
        left_out = self._limit.admit(peer, self._clock.monotonic())
        if left_out is None:
            return None
        return {"left_out": left_out} if left_out else {}
