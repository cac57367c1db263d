"""What the replicas of a cell agreed on, as seen from outside: every entry that any of them applied.

The first replica that applies an entry says what stands there; all others, and the same one after a restart,
must find the same entry there and come to the same outcome. So a violation is seen at the moment at which it
happens, also when later messages would cover it up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from knode.consensus.messages import Entry, Kind
from knode.consensus.ready import Role
from knode.errors import KnodeError
from knode.node import Node
from knode.simulation.host import Host
from knode.tasks.commands import Complete, Fence, decode_command
from knode.tasks.lifecycle import State
from knode.tasks.records import Outcome


@dataclass(frozen=True, slots=True)
class Agreed:
    """An entry with its outcome, as it was applied first."""

    entry: Entry
    outcome: Any
    by: str


@dataclass(slots=True)
class Observer:
    """Watches the replicas of a cell."""

    wrong: list[str] = field(default_factory=list)
    """What must not be, a sentence each."""
    stale: list[str] = field(default_factory=list)
    """Completions that took effect under another fence than the current one."""
    applied: int = 0
    """How many entries were agreed on."""
    _agreed: dict[tuple[bytes, int], Agreed] = field(default_factory=dict)
    """By incarnation and index."""
    _leaders: dict[tuple[bytes, int], str] = field(default_factory=dict)
    """By incarnation and term."""
    _attempts: dict[bytes, int] = field(default_factory=dict)
    """By task: the attempt that may end it, kept here from the outcomes alone."""

    def attach(self, host: Host, node: Node) -> None:
        """Watch a node that has just been started."""
        node.replica.on_applied.append(partial(self._take, host, node))

    def look(self, name: str, node: Node) -> None:
        """Take note of who leads now."""
        raft, standing = node.replica.raft, node.replica.standing
        if raft is None or standing is None or raft.role is not Role.LEADER:
            return
        known = self._leaders.setdefault((standing.incarnation.hash, raft.term), name)
        if known != name:
            self.wrong.append(f"{known} and {name} lead in term {raft.term}")

    def _take(self, host: Host, node: Node, entries: Sequence[Entry], outcomes: Sequence[Any]) -> None:
        if not host.runs(node):
            return  # its process is gone, and only its tasks still end, on a disk that nobody will read
        name = host.name
        self.look(name, node)
        incarnation = node.replica.standing.incarnation.hash if node.replica.standing is not None else b""
        for entry, outcome in zip(entries, outcomes, strict=True):
            place = incarnation, entry.index
            known = self._agreed.get(place)
            if known is None:
                self._agreed[place] = Agreed(entry, outcome, name)
                self.applied += 1
                self._follow(entry, outcome)
            elif known.entry != entry:
                self.wrong.append(f"{known.by} and {name} applied different entries at {entry.index}")
            elif known.outcome != outcome:
                self.wrong.append(f"{known.by} and {name} came to different outcomes at {entry.index}")

    def _follow(self, entry: Entry, outcome: Any) -> None:
        if entry.kind is not Kind.COMMAND or not isinstance(outcome, Outcome) or outcome.code is not None:
            return
        try:
            command = decode_command(entry.data)
        except KnodeError:
            return
        if isinstance(command, Complete):
            self._check_fence(command.fence, outcome)
        if outcome.task and outcome.state is State.ASSIGNED:
            self._attempts[outcome.task] = outcome.attempt

    def _check_fence(self, fence: Fence, outcome: Outcome) -> None:
        if self._attempts.get(fence.task) != fence.attempt:
            self.stale.append(f"attempt {fence.attempt} ended task {fence.task.hex()}, which was not current")
