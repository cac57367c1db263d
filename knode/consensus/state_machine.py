"""What a replicated log is for: the state machine that its commands change."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from knode.consensus.messages import Entry, Index


class StateMachine(Protocol):
    """Applies committed entries, each once, in order; its state is a function of them alone."""

    @property
    def applied(self) -> Index:
        """Index of the last entry that its state contains; survives the process together with the state."""
        ...

    async def apply(self, entries: Sequence[Entry]) -> list[Any]:
        """Apply entries that follow `applied`, in one transaction; return the outcome of each.

        The outcome of an entry that is no command, or an empty one, is None.

        Raises:
            KnodeError: DISK_FULL and the like: nothing was applied; HOME_TOO_NEW for a command that
            this version does
                not know.
        """
        ...

    async def sync(self) -> Index:
        """Make all that is applied durable, and return its index: only the log up to it may be
        forgotten. May wait for a dump to end."""
        ...

    async def dump(self, path: Path) -> Index:
        """Write the whole state to a new file, synced; return the index that it stands for. One state
        at one moment, while entries are applied."""
        ...

    async def clear(self) -> None:
        """Forget everything, durably and at once, as if nothing had ever been applied.

        Raises:
            KnodeError: DISK_FULL and the like; then nothing has changed.
        """
        ...

    async def restore(self, path: Path) -> Index:
        """Replace the whole state by that of a file that `dump` wrote, durably and at once; return its
        index.

        Raises:
            KnodeError: BAD_FRAME for a file that is no dump, HOME_TOO_NEW; then nothing has changed.
        """
        ...
