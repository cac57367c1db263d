"""What tests say to a ledger, in few words, and a store to say it to."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from hashlib import sha256
from pathlib import Path

from knode.consensus.messages import Entry, Kind
from knode.klp.codec import encode
from knode.simulation.disk import SimulatedDisk
from knode.tasks.commands import (
    Assign,
    Assignment,
    Begin,
    Bundle,
    Cancel,
    Command,
    Complete,
    Considered,
    Expire,
    Fail,
    Fence,
    FollowUp,
    Forget,
    NewTask,
    RaiseLevel,
    Release,
    Submit,
)
from knode.tasks.records import Outcome
from knode.tasks.store import LedgerStore
from knode.world import World
from knode.world.real import real_world

DAY_MS = 86_400_000
START = 1_767_225_600_000
PATH = Path("/state/ledger.db")
ANNA, BEN, CARL = (sha256(name).digest() for name in (b"anna", b"ben", b"carl"))
FIRST, SECOND = sha256(b"first").digest(), sha256(b"second").digest()


def id_of(number: int) -> bytes:
    return sha256(b"task %d" % number).digest()[:16]


def new_task(text: bytes = b"{}", **changes: object) -> NewTask:
    values: dict[str, object] = {
        "agent": "kExecutor:text",
        "input": text,
        "files": (),
        "on": b"",
        "deadline_ms": 0,
        "attempts": 3,
    }
    return NewTask(**{**values, **changes})  # type: ignore[arg-type]


def given_to(member: bytes) -> Assignment:
    return Assignment(member, (Considered(member, 1000, ""), Considered(CARL, None, "it is suspect")))


class Cell:
    """One ledger, told one command after the other."""

    def __init__(self, store: LedgerStore, world: World) -> None:
        self.store = store
        self.world = world
        self.now = START

    async def do(self, *commands: Command) -> list[Outcome]:
        """Apply commands in one batch."""
        first = self.store.applied + 1
        entries = [
            Entry(1, first + place, Kind.COMMAND, encode(command)) for place, command in enumerate(commands)
        ]
        outcomes = await self.store.apply(entries)
        assert all(outcome is not None for outcome in outcomes)
        return [outcome for outcome in outcomes if outcome is not None]

    async def one(self, command: Command) -> Outcome:
        (outcome,) = await self.do(command)
        return outcome

    def submit(
        self,
        number: int,
        task: NewTask | None = None,
        *,
        key: str | None = None,
        by: bytes = ANNA,
        not_after: int | None = None,
        to: bytes | None = None,
        holders: tuple[bytes, ...] = (),
    ) -> Submit:
        id = id_of(number)
        return Submit(
            self.now,
            id,
            by,
            key or id.hex(),
            self.now + DAY_MS if not_after is None else not_after,
            task or new_task(),
            holders,
            None if to is None else given_to(to),
        )

    def assign(self, number: int, to: bytes = BEN) -> Assign:
        return Assign(self.now, id_of(number), given_to(to))

    def fence(self, number: int, attempt: int = 1, incarnation: bytes | None = None) -> Fence:
        return Fence(incarnation or self.store.incarnation, id_of(number), attempt)

    def release(self, number: int, attempt: int = 1, *, charged: bool = True) -> Release:
        return Release(self.now, self.fence(number, attempt), charged, "its node is gone")

    def complete(
        self,
        number: int,
        attempt: int = 1,
        *,
        by: bytes = BEN,
        result: bytes = b"done",
        operations: tuple[bytes, ...] = (),
        follow_ups: tuple[NewTask, ...] = (),
        incarnation: bytes | None = None,
    ) -> Complete:
        bundle = Bundle(result, operations, tuple(map(FollowUp, follow_ups)))
        return Complete(self.now, self.fence(number, attempt, incarnation), by, bundle)

    def fail(self, number: int, attempt: int = 1, *, by: bytes = BEN, retryable: bool = True) -> Fail:
        return Fail(self.now, self.fence(number, attempt), by, "AGENT_FAILED", "it broke", retryable)

    def cancel(self, number: int) -> Cancel:
        return Cancel(self.now, id_of(number), ANNA)

    def expire(self, *numbers: int) -> Expire:
        return Expire(self.now, tuple(map(id_of, numbers)))

    def forget(self) -> Forget:
        return Forget(self.now)

    def begin(self, number: int, incarnation: bytes) -> Begin:
        return Begin(self.now, number, incarnation)

    def raise_level(self, level: int) -> RaiseLevel:
        return RaiseLevel(self.now, level)


class InPlace:
    """Blocking work, done where it is asked for: no thread, no time."""

    async def run(self, work):  # type: ignore[no-untyped-def]
        return work()


@asynccontextmanager
async def cell(disk: SimulatedDisk | None = None) -> AsyncIterator[Cell]:
    """A ledger on a simulated disk."""
    own = disk or SimulatedDisk()
    own.make_folder(PATH.parent)
    real = real_world()
    world = World(real.clock, real.randomness, own, InPlace())
    store = await LedgerStore.open(world, PATH)
    try:
        yield Cell(store, world)
    finally:
        await store.aclose()
        if disk is None:
            own.close()
