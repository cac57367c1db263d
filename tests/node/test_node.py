from __future__ import annotations

import json
import os

import pytest
import trio
from memory_cell import Cell, Host
from trio.testing import MockClock

from knode.control import daemon
from knode.control.methods import ControlMethods
from knode.errors import Code, KnodeError
from knode.home.configuration import load_configuration
from knode.klp.keepalive import Keepalive, Load, read_keepalive
from knode.mesh.statements import Role
from knode.node import Machine, Node
from knode.node.database import open_database
from knode.node.status import status


async def open_again(cell: Cell, host: Host) -> Node:
    settings = load_configuration(host.world, host.home, {}, host.settings).values
    carriers = {"memory": cell.network.carrier(host.name)}
    machine = Machine(2, lambda: 0, None, ("there is none",))
    return await Node.open(host.world, host.home, settings, carriers, machine, host.log.logger)


def addresses_known(at: Host, of: Host) -> tuple[str, ...]:
    return at.node.membership.contacts[of.node.key.public.raw].body.addresses


async def test_a_node_comes_back_as_itself_and_finds_its_peers(autojump_clock: MockClock, cell: Cell) -> None:
    desk, attic = await cell.add("desk"), await cell.add("attic")
    ids = {host.name: host.node.key.node_id for host in (desk, attic)}
    for way in (cell.stop, cell.crash):
        await way(attic)
        await cell.start(attic)
        await cell.until_whole()
        assert {host.name: host.node.key.node_id for host in (desk, attic)} == ids
        task = await attic.settle("say back", on="desk")
        assert task.output == b"back"


async def test_a_node_that_found_its_cell_alone_and_restarts_is_still_an_admin(
    autojump_clock: MockClock, cell: Cell
) -> None:
    desk = await cell.add("desk")
    await cell.stop(desk)
    await cell.start(desk)
    assert desk.node.membership.own.role is Role.ADMIN
    assert (await desk.node.invite(Role.WORKER))[0].addresses == desk.node.addresses


async def test_going_down_takes_no_longer_than_the_good_byes(autojump_clock: MockClock, cell: Cell) -> None:
    desk, attic, shed = [await cell.add(name) for name in ("desk", "attic", "shed")]
    for number in range(5):
        await desk.submit("sleep 100", on=("attic", "desk")[number % 2])
    cell.network.cut("desk", "shed")
    begun = trio.current_time()
    await cell.stop(desk)
    assert trio.current_time() - begun < 3.5
    assert attic.node.peers.peer(shed.node.key.public).state == "alive"
    events = [json.loads(line)["event"] for line in attic.lines]
    assert events[-1] != "session ended"
    assert desk.attempts == []


async def test_a_port_in_use_is_named_and_leaves_the_home_free(autojump_clock: MockClock, cell: Cell) -> None:
    desk = await cell.add("desk", node_port="4000")
    await cell.stop(desk)
    other = await cell.network.carrier("desk").listen("", 4000)
    node = await open_again(cell, desk)
    with pytest.raises(KnodeError) as caught:
        await node.run()
    assert caught.value.code is Code.PORT_IN_USE
    await other.aclose()
    await cell.start(desk)


async def test_cancelling_a_node_at_any_point_of_its_start_leaves_its_home_free(
    autojump_clock: MockClock, cell: Cell
) -> None:
    desk, _ = await cell.add("desk"), await cell.add("attic")
    await cell.stop(desk)
    for steps in range(1, 40):
        with trio.CancelScope() as scope:

            async def cancel_later(scope: trio.CancelScope = scope, steps: int = steps) -> None:
                for _ in range(steps):
                    await trio.lowlevel.checkpoint()
                scope.cancel()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(cancel_later)
                node = await open_again(cell, desk)
                await node.run()
        assert scope.cancelled_caught
    await cell.start(desk)
    await cell.until_whole()


async def test_an_address_that_changes_is_told_whatever_the_clock_says(
    autojump_clock: MockClock, cell: Cell
) -> None:
    desk, attic = await cell.add("desk"), await cell.add("attic", node_port="4100")
    assert addresses_known(desk, attic) == ("attic:4100",)
    await cell.stop(attic)
    attic.clock.skew_s = -86_400
    attic.settings["node.port"] = "4200"
    await cell.start(attic)
    await cell.until(lambda: addresses_known(desk, attic) == ("attic:4200",))
    attic.node._listeners.append(await cell.network.carrier("attic").listen("", 4300))
    await cell.until(lambda: addresses_known(desk, attic) == ("attic:4200", "attic:4300"))


async def test_a_disk_that_keeps_no_address_does_not_stop_the_node(
    autojump_clock: MockClock, cell: Cell
) -> None:
    desk, attic = await cell.add("desk"), await cell.add("attic")
    attic.disk.fill()
    attic.node._listeners.append(await cell.network.carrier("attic").listen("", 4300))
    await cell.until(lambda: any("addresses not kept" in line for line in attic.lines))
    assert (await desk.settle("say x", on="attic")).output == b"x"
    attic.disk.free()
    await cell.until(lambda: len(addresses_known(desk, attic)) == 2)


async def test_a_machine_without_a_sandbox_warns_and_offers_only_what_it_can_run(
    autojump_clock: MockClock, cell: Cell
) -> None:
    desk = await cell.add("desk")
    await cell.stop(desk)
    node = await open_again(cell, desk)
    async with trio.open_nursery() as nursery:
        await nursery.start(node.run)
        assert any("no sandbox holds here" in warning for warning in status(node)["warnings"])
        assert node.offers.of(node.key.public) == {"kExecutor:text"}
        listed = await ControlMethods(node, desk.log.lines, lambda: None, lambda: None).table()["agent.list"](
            {}, lambda _: None
        )
        states = {agent["id"]: (agent["state"], agent["problem"] is None) for agent in listed}
        assert states["kExecutor:text"] == ("running", True)
        assert states["kExecutor:command"] == ("refused", False)
        nursery.cancel_scope.cancel()


def test_a_machine_busier_than_its_cores_tells_a_load_that_fits_the_protocol(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for average in (0.0, 0.5, 1000.0):
        monkeypatch.setattr(os, "getloadavg", lambda average=average: (average, 0.0, 0.0))
        load = Load(0, 0, 1, daemon._busy_percent())
        assert read_keepalive(Keepalive(1, 0, 0, load).frame()).load == load


async def test_a_revoked_node_is_told_who_refuses_it_and_why(autojump_clock: MockClock, cell: Cell) -> None:
    desk, attic = await cell.add("desk"), await cell.add("attic")
    await desk.node.membership.revoke(attic.node.membership.own)
    await cell.until(lambda: any("was revoked" in warning for warning in status(attic.node)["warnings"]))
    assert status(desk.node)["warnings"] == []
    assert [member["name"] for member in status(desk.node)["members"]] == ["desk"]


async def test_the_founder_leads_and_status_says_so_also_where_it_is_only_told(
    autojump_clock: MockClock, cell: Cell
) -> None:
    desk = await cell.add("desk")
    attic = await cell.add("attic", role=Role.OBSERVER)
    await cell.until(lambda: desk.node.replica.is_leader)
    leader = desk.node.key.node_id
    await cell.until(lambda: status(attic.node)["leader"] == leader)
    assert status(desk.node)["leader"] == leader
    await cell.stop(desk)
    await cell.until(lambda: status(attic.node)["leader"] is None)
    await cell.start(desk)
    await cell.until(lambda: status(attic.node)["leader"] == leader)


async def test_a_home_of_an_older_version_gets_its_log_from_its_founder(
    autojump_clock: MockClock, cell: Cell
) -> None:
    desk = await cell.add("desk")
    await cell.stop(desk)
    desk.disk.remove(desk.home.raft)
    desk.disk.remove(desk.home.ledger)
    database = await open_database(desk.world, desk.home)
    await database.write(lambda connection: connection.execute("DELETE FROM standing").fetchall())
    await database.aclose()
    await cell.start(desk)
    await cell.until(lambda: desk.node.replica.is_leader)


async def test_a_node_whose_disk_is_full_starts_and_takes_part_once_there_is_room(
    autojump_clock: MockClock, cell: Cell
) -> None:
    desk = await cell.add("desk")
    await cell.stop(desk)
    desk.disk.fill()
    await cell.start(desk)
    assert status(desk.node)["leader"] is None
    assert "no space" in status(desk.node)["warnings"][0]
    desk.disk.free()
    await cell.until(lambda: desk.node.replica.is_leader)
    assert "no space" not in str(status(desk.node)["warnings"])


async def test_while_a_node_goes_down_no_room_offers_a_nursery_that_takes_nothing_more(
    autojump_clock: MockClock, cell: Cell
) -> None:
    desk, attic = await cell.add("desk"), await cell.add("attic")
    node = desk.node
    await cell.until(lambda: node.dispatcher.leads)
    for _ in range(3):
        await desk.submit("sleep 100")
    owners = {node.peers, node.peers._serving, node.attempts, node.dispatcher, node.tasks}
    closed = set()

    class EachStep(trio.abc.Instrument):
        def before_task_step(self, task: trio.lowlevel.Task) -> None:
            for owner in owners:
                if owner._nursery is not None and owner._nursery._closed:
                    closed.add(type(owner).__name__)

    trio.lowlevel.add_instrument(steps := EachStep())
    await cell.stop(desk)
    trio.lowlevel.remove_instrument(steps)
    assert all(owner._nursery is None for owner in owners)
    assert closed == set()
    assert attic.running is not None
