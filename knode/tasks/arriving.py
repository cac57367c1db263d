"""How much of the files of tasks a node takes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from knode.errors import Code, KnodeError
from knode.tasks.values import MAX_FILES

TASKS_WORTH = 16
"""All tasks together may have this many times the bytes of files that one may have."""
OWNER_SHARE = 2
"""One node's tasks may take up to the half of either, so that no single one shuts out the others."""


@dataclass(eq=False)
class Share:
    """What one task has of a node's room for files. It belongs to the node that named it first."""

    owner: bytes
    names: set[str] = field(default_factory=set)
    reserved_bytes: int = 0

    def reserve(self, name: str, size: int, everyone: Iterable[Share], task_bytes: int) -> None:
        """Take room for a file.

        Args:
            name: unique in the task.
            size: in bytes.
            everyone: the shares of all tasks here, this one too.
            task_bytes: what one task may have.

        Raises:
            KnodeError: TOO_LARGE over the limit for one task, RATE_LIMITED over that for all or for the
                tasks of its owner, INVALID_ARGUMENT for a name that is taken.
        """
        if name in self.names:
            raise KnodeError(
                Code.INVALID_ARGUMENT, f"two files of one task are called {name!r}", "rename one"
            )
        if len(self.names) >= MAX_FILES or self.reserved_bytes + size > task_bytes:
            raise KnodeError(
                Code.TOO_LARGE,
                f"this node takes {MAX_FILES} files of {task_bytes // 2**20} MiB together with a task",
                "send less, or raise tasks.artifact_bytes there",
            )
        shares = list(everyone)
        all_bytes = sum(share.reserved_bytes for share in shares)
        owners_bytes = sum(share.reserved_bytes for share in shares if share.owner == self.owner)
        most = TASKS_WORTH * task_bytes
        if all_bytes + size > most or owners_bytes + size > most // OWNER_SHARE:
            raise KnodeError(Code.RATE_LIMITED, "the files of other tasks fill this node", "try again later")
        self.names.add(name)
        self.reserved_bytes += size

    def give_back(self, name: str, size: int) -> None:
        """Give the room of a file back."""
        self.names.remove(name)
        self.reserved_bytes -= size
