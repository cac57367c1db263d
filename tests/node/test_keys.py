"""A change of keys is whole or not begun, wherever the node is stopped in it."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Awaitable, Callable

from memory_cell import Cell, Host, Inline, Seeded
from trio.testing import MockClock

from knode.home.configuration import load_configuration
from knode.identity.keystore import load_key
from knode.node import Machine, Node
from knode.node.keys import next_key_file, settle_keys
from knode.simulation.disk import SimulatedDisk
from knode.world import World


async def opened(host: Host, disk: SimulatedDisk) -> Node:
    """The host's node on another disk, opened as the daemon does."""
    world = World(host.clock, Seeded("after"), disk, Inline())
    await settle_keys(world, host.home)
    settings = load_configuration(world, host.home, {}, {}).values
    machine = Machine(2, lambda: 0, None, ("there is none",))
    return await Node.open(world, host.home, settings, {}, machine, host.log.logger)


async def left_behind(
    host: Host, change: Callable[[Node], Awaitable[object]], step: int, *, power_cut: bool
) -> SimulatedDisk | None:
    """Return the disk of a node that ends ahead of this step of `change`; None when it has fewer steps."""
    disk = SimulatedDisk.restored(host.disk.snapshot())
    left: list[SimulatedDisk] = []
    steps = itertools.count()

    def strike(event: object) -> None:
        if next(steps) == step:
            fate = Seeded(f"step {step}")
            left.append(disk.crash(fate) if power_cut else SimulatedDisk.restored(disk.snapshot()))

    node = await opened(host, disk)
    disk.watch(strike)
    await change(node)
    disk.watch(lambda event: None)
    await node.aclose()
    return left[0] if left else None


async def every_way_to_end(
    host: Host, change: Callable[[Node], Awaitable[object]]
) -> AsyncIterator[SimulatedDisk]:
    """Give the disks that are left when the node is killed, or its power cut, at each step of `change`."""
    for power_cut in (False, True):
        for step in itertools.count():
            left = await left_behind(host, change, step, power_cut=power_cut)
            if left is None:
                assert step >= 8
                break
            yield left


async def stopped(cell: Cell) -> Host:
    host = await cell.add("desk")
    await cell.stop(host)
    return host


async def test_a_node_that_is_stopped_while_it_rotates_comes_up_with_the_key_that_its_roster_names(
    autojump_clock: MockClock, cell: Cell
) -> None:
    host = await stopped(cell)
    first = load_key(host.world, host.home.node_key).public
    seen = set()
    async for disk in every_way_to_end(host, lambda node: node.rotate()):
        node = await opened(host, disk)
        assert node.membership.own.key == node.key.public
        assert node.membership.own.id == first
        assert not disk.exists(next_key_file(host.home.node_key))
        seen.add(node.key.public == first)
        await node.rotate()  # and what was left behind is in nobody's way
        await node.aclose()
    assert seen == {True, False}


async def test_a_node_that_is_stopped_while_it_recovers_the_cell_comes_up_with_the_owner_s_key_or_as_before(
    autojump_clock: MockClock, cell: Cell
) -> None:
    host = await stopped(cell)
    assert host.recovery is not None
    recovery = host.recovery
    before = load_key(host.world, host.home.owner_key).public

    async def recover(node: Node) -> None:
        await node.recover(recovery, lost=[], undo_since=None)

    seen = set()
    async for disk in every_way_to_end(host, recover):
        node = await opened(host, disk)
        owner = load_key(node.world, host.home.owner_key).public
        assert owner == node.membership.roster.owner
        assert not disk.exists(next_key_file(host.home.owner_key))
        seen.add(owner == before)
        await recover(node)
        await node.aclose()
    assert seen == {True, False}
