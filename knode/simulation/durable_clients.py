"""Those who submit durable tasks, look at them and cancel them, and remember all that they were told."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, TypeAlias

import trio

from knode.errors import NO_MEMBER, UNANSWERED, Code, KnodeError
from knode.node import Node
from knode.simulation.cell import Cell
from knode.simulation.host import Host
from knode.simulation.linearizability import Operation
from knode.simulation.scenario import DurableClients
from knode.simulation.schedule import running_on
from knode.simulation.world import SimulatedRandomness
from knode.tasks.durable import Request
from knode.tasks.lifecycle import State
from knode.tasks.messages import TaskView
from knode.tasks.outbox import Waiting

AGENT = "kExecutor:command"
LOOKS_A_TASK = 16
"""A task is looked at no more often: what is to be decided about its history grows fast."""
UNSAID = UNANSWERED | {Code.INTERNAL, Code.DISK_FULL, Code.DISK_READ_ONLY, Code.RATE_LIMITED}
"""Errors that leave open whether it was done: also a full disk, when it was to be kept after no quorum had
answered."""

REVOKED = NO_MEMBER | {Code.NOT_ALLOWED}
"""What who was revoked is told, whatever it asks for."""

Action: TypeAlias = tuple[str, State | None]
"""What was asked, and the state that was answered; None: there is no such task."""
Standing: TypeAlias = State | None
"""What the model of a task knows: None before it is submitted, QUEUED while it lives, then how it ended."""

LIVE: Final = State.QUEUED


def step(state: Standing, action: Action) -> Iterator[Standing]:
    """The model of one task: submitted once, it lives, and ends by itself, for ever.

    Args:
        state: before.
        action: with its answer.
    """
    kind, seen = action
    if kind == "submit":
        before = LIVE if state is None else state
        yield from _seen(before, seen)
    elif kind == "look":
        if state is None or seen is None:
            if state is seen:
                yield state
        else:
            yield from _seen(state, seen)
    elif state is not None and seen is not None:  # cancel
        yield from _seen(state, seen)


def _seen(state: State, seen: State | None) -> Iterator[State]:
    """A living task may end at any moment; one that has ended stays as it is."""
    if seen is None or not seen.final:
        if not state.final:
            yield LIVE
    elif not state.final or state is seen:
        yield seen


@dataclass(slots=True)
class Asked:
    """A task that a client asked for, and all that anybody was told of it."""

    key: str
    host: Host
    text: str
    is_failing: bool
    """Its command fails."""
    id: bytes | None = None
    """None: nobody was told yet."""
    is_acknowledged: bool = False
    pending_ids: list[bytes] = field(default_factory=list)
    """Under which it was kept in the outbox; the cell may know its key already, by another id."""
    is_cancelled: bool = False
    """Whether somebody tried to."""
    looks: int = 0
    operations: list[Operation[Action]] = field(default_factory=list)


@dataclass(slots=True)
class Book:
    """What the clients of durable tasks did and were told."""

    asked: list[Asked] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    """By code: submits that were refused for good."""
    unsaid: Counter[str] = field(default_factory=Counter)
    """By code: whatever was asked without a clear answer."""
    wrong: list[str] = field(default_factory=list)
    """What no client may be told, a sentence each."""
    faults: list[str] = field(default_factory=list)

    @property
    def acknowledged(self) -> int:
        """How many tasks somebody was told that they are committed."""
        return sum(each.is_acknowledged for each in self.asked)


class DurableUsers:
    """The clients of a run's durable tasks."""

    def __init__(
        self, cell: Cell, clients: DurableClients, book: Book, randomness: SimulatedRandomness
    ) -> None:
        self._cell = cell
        self._clients = clients
        self._book = book
        self._randomness = randomness

    async def run(self) -> None:
        """Ask for one thing after the other, until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                await trio.sleep(self._randomness.uniform(*self._clients.every_s))
                nursery.start_soon(self._submit)
                if self._book.asked:
                    nursery.start_soon(self._look)
                    if self._randomness.happens(self._clients.cancelled):
                        nursery.start_soon(self._cancel)

    async def _submit(self) -> None:
        found = self._choose_node()
        if found is None:
            return
        host, node = found
        known = [each for each in self._book.asked if each.host is host]
        if known and self._randomness.happens(self._clients.repeated):
            await self._ask(node, known[self._randomness.choose(len(known))])
            return
        number = len(self._book.asked) + 1
        is_failing = self._randomness.happens(self._clients.failing)
        asked = Asked(f"key {number}", host, f"note {number}", is_failing)
        self._book.asked.append(asked)
        await self._ask(node, asked)

    async def _ask(self, node: Node, asked: Asked) -> None:
        argv = ["fail", "1"] if asked.is_failing else ["note", asked.text]
        request = Request(
            agent=AGENT,
            input=json.dumps({"argv": argv}).encode(),
            key=asked.key,
            deadline_s=self._clients.deadline_s,
        )
        called_at = trio.current_time()
        answer: TaskView | Waiting | None = None
        try:
            with running_on(asked.host.name):
                answer = await node.durable.submit(request)
        except KnodeError as error:
            if error.code in UNSAID:
                self._book.unsaid[error.code] += 1
            else:
                self._book.refused[error.code] += 1
                if asked.is_acknowledged and error.code not in REVOKED:
                    self._book.wrong.append(f"{asked.key!r} was acknowledged, then refused: {error}")
                return  # it changed nothing
        except (trio.ClosedResourceError, trio.BrokenResourceError):
            self._book.unsaid["the node died"] += 1
        except Exception as error:
            self._book.faults.append(f"{asked.host.name} broke on a submit: {error!r}")
        if not asked.host.runs(node):
            answer = None
        match answer:
            case TaskView():
                self._note_id(asked, answer.id)
                asked.is_acknowledged = True
                self._note(asked, "submit", answer.state, called_at)
            case Waiting():
                if answer.id not in asked.pending_ids:
                    asked.pending_ids.append(answer.id)
                self._note(asked, "submit", None, called_at, is_answered=False)
            case None:
                self._note(asked, "submit", None, called_at, is_answered=False)

    async def _look(self) -> None:
        found, asked = self._choose_node(), self._choose_asked()
        if found is None or asked is None or asked.looks >= LOOKS_A_TASK:
            return
        asked.looks += 1
        host, node = found
        called_at = trio.current_time()
        assert asked.id is not None
        try:
            with running_on(host.name):
                shown = await node.durable.show(asked.id.hex())
        except (KnodeError, trio.ClosedResourceError, trio.BrokenResourceError) as error:
            self._book.unsaid[error.code if isinstance(error, KnodeError) else "the node died"] += 1
            return
        except Exception as error:
            self._book.faults.append(f"{host.name} broke when asked for a task: {error!r}")
            return
        if shown.is_confirmed:
            self._note(asked, "look", shown.tasks[0].state if shown.tasks else None, called_at)

    async def _cancel(self) -> None:
        found, asked = self._choose_node(), self._choose_asked()
        if found is None or asked is None or asked.is_cancelled:
            return
        asked.is_cancelled = True
        host, node = found
        called_at = trio.current_time()
        assert asked.id is not None
        try:
            with running_on(host.name):
                answer = await node.durable.cancel(asked.id)
        except KnodeError as error:
            if error.code in UNSAID:
                self._book.unsaid[error.code] += 1
                self._note(asked, "cancel", State.CANCELLED, called_at, is_answered=False)
        except (trio.ClosedResourceError, trio.BrokenResourceError):
            self._note(asked, "cancel", State.CANCELLED, called_at, is_answered=False)
        except Exception as error:
            self._book.faults.append(f"{host.name} broke when asked to cancel: {error!r}")
        else:
            if isinstance(answer, TaskView):
                self._note(asked, "cancel", answer.state, called_at)
            else:
                self._note(asked, "cancel", State.CANCELLED, called_at, is_answered=False)

    def _note(
        self, asked: Asked, kind: str, seen: State | None, called_at: float, *, is_answered: bool = True
    ) -> None:
        returned_at = trio.current_time() if is_answered else None
        asked.operations.append(Operation((kind, seen), called_at, returned_at))

    def _note_id(self, asked: Asked, id: bytes) -> None:
        if asked.id is not None and asked.id != id:
            self._book.wrong.append(f"{asked.key!r} is task {asked.id.hex()} and task {id.hex()}")
        asked.id = id

    def _choose_node(self) -> tuple[Host, Node] | None:
        up = [(host, node) for host, node in self._cell.nodes() if node.membership.in_cell]
        return up[self._randomness.choose(len(up))] if up else None

    def _choose_asked(self) -> Asked | None:
        known = [each for each in self._book.asked[-32:] if each.id is not None]
        return known[self._randomness.choose(len(known))] if known else None
