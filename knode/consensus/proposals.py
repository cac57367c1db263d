"""Who waits for what to be committed and applied here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import trio

from knode.consensus.messages import Entry, Index
from knode.consensus.ready import Position
from knode.errors import Code, KnodeError

T = TypeVar("T")


class Promise(Generic[T]):
    """A value that will be there, or an error."""

    def __init__(self) -> None:
        self._settled = trio.Event()
        self._value: T | None = None
        self._error: KnodeError | None = None

    def keep(self, value: T) -> None:
        """Give the value; what comes second changes nothing."""
        if not self._settled.is_set():
            self._value = value
            self._settled.set()

    def fail(self, error: KnodeError) -> None:
        """Give an error instead."""
        if not self._settled.is_set():
            self._error = error
            self._settled.set()

    async def value(self) -> T:
        """Wait for the value; raise the error that came instead."""
        await self._settled.wait()
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]


class Proposals:
    """Proposals by their place in the log, until it is known what became of each."""

    def __init__(self) -> None:
        self._waiting: dict[Index, dict[int, Promise[Any]]] = {}
        """By index, then by term: a leader that was deposed may propose there again, in a later term."""
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, position: Position) -> Promise[Any]:
        """Wait for what stands at `position`."""
        promise = self._waiting.setdefault(position.index, {})[position.term] = Promise[Any]()
        self._count += 1
        return promise

    def forget(self, position: Position) -> None:
        """Wait no longer."""
        if self._waiting.get(position.index, {}).pop(position.term, None) is not None:
            self._count -= 1
            if not self._waiting[position.index]:
                del self._waiting[position.index]

    def settle(self, entries: Sequence[Entry], outcomes: Sequence[Any]) -> None:
        """Tell what became of the proposals at the indexes of entries that are applied."""
        if not self._waiting:
            return
        for entry, outcome in zip(entries, outcomes, strict=True):
            for term, promise in self._take(entry.index):
                if term == entry.term:
                    promise.keep(outcome)
                else:
                    promise.fail(_lost())

    def skip(self, index: Index) -> None:
        """Tell those up to `index` that nobody here saw what became of them: a snapshot took its place."""
        for at in [at for at in self._waiting if at <= index]:
            for _, promise in self._take(at):
                promise.fail(unknown("this node missed its commit"))

    def end(self, why: str) -> None:
        """Tell all that nobody here will see what becomes of them."""
        for at in list(self._waiting):
            for _, promise in self._take(at):
                promise.fail(unknown(why))

    def _take(self, index: Index) -> list[tuple[int, Promise[Any]]]:
        found = list(self._waiting.pop(index, {}).items())
        self._count -= len(found)
        return found


def unknown(why: str) -> KnodeError:
    """Return the error of a proposal that may or may not be committed."""
    return KnodeError(Code.UNKNOWN, f"{why}: it may or may not be done", "look for its effects, then decide")


def _lost() -> KnodeError:
    return KnodeError(
        Code.UNAVAILABLE, "another leader was elected before it was committed; it was not done", "try again"
    )
