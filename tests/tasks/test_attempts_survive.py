"""Attempts over every crash: the process killed, or the power cut, whenever something is being written."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import trio
from memory_cell import Seeded
from station import Ledger, assign, fence, new_disk, station
from trio.testing import MockClock

from knode.simulation.disk import SimulatedDisk
from knode.tasks.commands import Fence

LINES = {1: "sleep 3\nsay 1", 2: "say 2", 3: "sleep 1\nsay 3", 4: "die 1", 5: "sleep 2\nsay 5"}


@dataclass
class Cut:
    """A moment at which something was about to be written."""

    acknowledged: set[Fence]
    """What the node had accepted by then."""
    ledger: Ledger
    disk: SimulatedDisk


async def cut_everywhere(how: str) -> list[Cut]:
    """Run five attempts, two of them told late, and return what every crash would have left."""
    disk, ledger = new_disk(), Ledger()
    acknowledged: set[Fence] = set()
    cuts: list[Cut] = []

    def cut(event: str) -> None:
        left = (
            SimulatedDisk.restored(disk.snapshot()) if how == "killed" else disk.crash(Seeded(str(len(cuts))))
        )
        then = copy.deepcopy(ledger)
        then.is_here = True
        cuts.append(Cut(set(acknowledged), then, left))

    async with station(disk, ledger) as at:
        disk.watch(cut)
        for task, line in LINES.items():
            acknowledged.add(await at.assign(line, fence(task)))
            await trio.sleep(0.3)
        ledger.is_here = False
        await trio.sleep(3)
        ledger.is_here = True
        await at.until_idle()
        disk.watch(lambda event: None)
    return cuts


def is_whole(ledger: Ledger) -> bool:
    """Whether every task that was assigned by then has ended, each once."""
    ends = [end.fence for end in ledger.ended]
    return not ledger.current and len(ends) == len(set(ends))


async def test_a_killed_node_ends_all_that_it_accepted_without_being_asked_again(
    autojump_clock: MockClock,
) -> None:
    cuts = await cut_everywhere("killed")
    assert len(cuts) > 40
    for crashed in cuts:
        ledger = crashed.ledger
        # What was not acknowledged the leader would assign again; here it is let go.
        ledger.current &= crashed.acknowledged
        async with station(crashed.disk, ledger) as at:
            kept = set(await at.kept())
            assert ledger.current <= kept
            await at.until_idle()
            assert await at.kept() == []
        assert is_whole(ledger)
        crashed.disk.close()


async def test_after_a_power_cut_what_was_lost_is_assigned_again_and_ends_once(
    autojump_clock: MockClock,
) -> None:
    cuts = await cut_everywhere("power")
    lost = 0
    for crashed in cuts:
        ledger = crashed.ledger
        async with station(crashed.disk, ledger) as at:
            kept = set(await at.kept())
            lost += len((ledger.current & crashed.acknowledged) - kept)
            for current in sorted(ledger.current, key=lambda each: each.task):
                await at.attempts.assign(assign(LINES[current.task[-1]], current))
            await at.until_idle()
            assert await at.kept() == []
        assert is_whole(ledger)
        crashed.disk.close()
    assert lost > 0  # else nothing was tested
