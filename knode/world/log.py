"""The log as its writers see it: an event name and fields, never a formatted sentence."""

from __future__ import annotations

from typing import Any, Protocol


class Log(Protocol):
    """Structured logging. Fields must hold no secrets."""

    def debug(self, event: str, **fields: Any) -> Any:
        """Say what only a developer wants to know."""
        ...

    def info(self, event: str, **fields: Any) -> Any:
        """Say what happened."""
        ...

    def warning(self, event: str, **fields: Any) -> Any:
        """Say what someone should look at."""
        ...

    def error(self, event: str, **fields: Any) -> Any:
        """Say what went wrong in knode itself."""
        ...


class SilentLog:
    """A log that nobody reads: for measuring tools and for tests."""

    def debug(self, event: str, **fields: Any) -> None:
        """Drop it."""

    info = warning = error = debug
