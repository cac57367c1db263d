"""A power cut, or the death of the process, at every point at which the ledger touches its disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from ledger_commands import BEN, FIRST, PATH, SECOND, Cell, InPlace, cell, new_task

from knode.consensus.messages import Entry, Kind
from knode.klp.codec import encode
from knode.simulation.disk import SimulatedDisk
from knode.simulation.world import SimulatedRandomness
from knode.tasks import store as store_module
from knode.tasks.commands import Command
from knode.tasks.store import LedgerStore
from knode.world import World
from knode.world.real import real_world

DUMP, SENT = Path("/state/dump"), Path("/state/sent")
LIMIT = 2**24


def history(c: Cell) -> list[list[Command]]:
    """Batches in which everything happens that can."""
    batches: list[list[Command]] = [[c.begin(0, FIRST)]]
    for n in range(0, 15, 3):
        c.now += 1000
        large = new_task(b"x" * 9_000 * (n % 5))
        batches += [
            [c.submit(n, to=BEN), c.submit(n + 1, large), c.submit(n + 2)],
            [c.complete(n, operations=(b"o" * 3000,), follow_ups=(new_task(),)), c.assign(n + 1)],
            [c.fail(n + 1) if n % 2 else c.release(n + 1), c.cancel(n + 2), c.expire(n)],
        ]
    batches.append([c.begin(1, SECOND), c.forget(), c.submit(1, new_task(b"conflict"))])
    return batches


@dataclass
class Image:
    """A disk as it is found, and what must be on it."""

    disk: SimulatedDisk
    durable: int
    """Index that was synced."""
    known: int
    """Index whose application was reported."""
    is_cut: bool
    """By a power cut; else the process died."""


def world_on(disk: SimulatedDisk) -> World:
    real = real_world()
    return World(real.clock, real.randomness, disk, InPlace())


async def states() -> tuple[list[list[Entry]], dict[int, bytes]]:
    """The history as entries, and the ledger's dump after each batch of it."""
    async with cell() as c:
        batches, dumps = [], {}
        for commands in history(c):
            first = c.store.applied + 1
            batches.append([Entry(1, first + n, Kind.COMMAND, encode(x)) for n, x in enumerate(commands)])
            await c.store.apply(batches[-1])
            await c.store.dump(DUMP)
            dumps[c.store.applied] = c.world.disk.read(DUMP, limit_bytes=LIMIT)
        return batches, dumps


@pytest.mark.parametrize(("seed", "pages"), [(0, 30), (1, 4000)], ids=["own checkpoints", "only by sync"])
async def test_applied_index_and_state_agree_wherever_it_was_cut(
    seed: int, pages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "CHECKPOINT_PAGES", pages)
    batches, dumps = await states()
    sent_index = sorted(dumps)[-3]
    chance = SimulatedRandomness(seed, "disk")
    disk = SimulatedDisk()
    disk.make_folder(PATH.parent)
    disk.write(SENT, dumps[sent_index])
    images: list[Image] = []
    durable = known = 0

    def strike(event: str) -> None:
        images.append(Image(disk.crash(chance), durable, known, True))
        images.append(Image(disk.after_kill(), durable, known, False))

    store = await LedgerStore.open(world_on(disk), PATH)
    disk.watch(strike)
    for number, batch in enumerate(batches):
        if batch[0].index <= store.applied:
            continue
        await store.apply(batch)
        known = store.applied
        if number % 5 == 4:
            durable = await store.sync()
        if number == len(batches) // 2:
            # This voter was behind, and gets the state that it lacks.
            assert store.applied < sent_index
            durable = known = await store.restore(SENT)
    await store.aclose()
    disk.watch(lambda event: None)
    assert len(images) > 150
    for number, image in enumerate(images):
        again = await LedgerStore.open(world_on(image.disk), PATH)
        found = again.applied
        assert found >= (image.durable if image.is_cut else image.known)
        if found:
            await again.dump(DUMP)
            assert image.disk.read(DUMP, limit_bytes=LIMIT) == dumps[found]
        if number % 7 == 0:
            # The log is there from `found` on: what is applied again leads to the same.
            for batch in batches:
                if batch[0].index > again.applied:
                    await again.apply(batch)
            await again.dump(DUMP)
            assert image.disk.read(DUMP, limit_bytes=LIMIT) == dumps[batches[-1][-1].index]
        await again.aclose()
        image.disk.close()
    disk.close()
