"""Whole nodes with durable tasks lose voters: what status says, and what the owner does about it."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from memory_cell import COMMAND, Cell, Host, settled
from trio.testing import MockClock

from knode.cli import render
from knode.consensus.electorate import Votes
from knode.control.methods import ControlMethods
from knode.errors import Code, KnodeError
from knode.identity.names import node_id_of
from knode.mesh.roster import Roster
from knode.node.setup import RECOVERY_PREFIX
from knode.node.status import status
from knode.tasks.durable import Request
from knode.tasks.lifecycle import State


async def call(host: Host, method: str, **params: Any) -> Any:
    table = ControlMethods(host.node, host.log.lines, lambda: None, lambda: None).table()
    return await table[method](params, lambda _: None)


async def submit(host: Host, line: str, **rest: Any) -> bytes:
    view = await host.node.durable.submit(Request(COMMAND, line.encode(), **rest))
    return view.id


def warnings(host: Host) -> str:
    return "\n".join(status(host.node)["warnings"])


def votes(host: Host) -> list[Votes]:
    node = host.node
    return [node.electorate.votes(member) for member in node.membership.roster.members.values()]


async def of_three(cell: Cell) -> list[Host]:
    hosts = [await cell.add(name) for name in ("desk", "attic", "barn")]
    await cell.until(lambda: all(votes(host) == [Votes.VOTER] * 3 for host in hosts))
    await cell.until(lambda: all(host.node.replica.leader() is not None for host in hosts))
    return hosts


async def test_status_and_the_list_of_members_say_who_votes(autojump_clock: MockClock, cell: Cell) -> None:
    desk, attic = await cell.add("desk"), await cell.add("attic")
    await cell.until(lambda: votes(attic) == [Votes.LEARNER, Votes.VOTER])
    assert "no failover yet" in warnings(desk)
    listed = {m["name"]: m["votes"] for m in await call(attic, "member.list")}
    assert listed == {"desk": "voter", "attic": "learner"}
    barn = await cell.add("barn")
    await cell.until(lambda: votes(barn) == [Votes.VOTER] * 3)
    assert warnings(desk) == ""


async def test_the_survivor_does_the_tasks_of_a_cell_that_lost_its_majority(
    autojump_clock: MockClock, cell: Cell
) -> None:
    desk, attic, barn = await of_three(cell)
    before = await submit(desk, "say before")
    await settled(desk, before)
    running = await submit(desk, "sleep 30\nsay at last", on="attic")
    await cell.until(lambda: attic.sandbox.running != [])
    fence = desk.node.ledger.incarnation
    for host in (attic, barn):
        await cell.crash(host)
    await cell.until(lambda: "most voters are away (attic, barn) since" in warnings(desk))
    assert "knode member recover --lost-majority" in warnings(desk)
    waiting = await submit(desk, "say meanwhile", on="desk")
    survey = await call(desk, "member.survey")
    assert (survey["survivor"], survey["missing"], survey["owner"]) == ("desk", ["attic", "barn"], True)
    ledger = await call(desk, "member.survive")
    assert (ledger["number"], ledger["begun_on"]) == (1, "desk")
    assert (await settled(desk, waiting)).state is State.SUCCEEDED
    assert (await settled(desk, before)).result == b"before"
    assert desk.node.ledger.incarnation == bytes.fromhex(ledger["ledger"]) != fence
    for host in (attic, barn):
        await cell.start(host)
    ended = await settled(desk, running)
    assert (ended.state, ended.result) == (State.SUCCEEDED, b"at last")
    assert ended.attempt > 1, "the first one's fence is of the incarnation that is over"
    await cell.until(lambda: all(votes(host) == [Votes.VOTER] * 3 for host in cell.hosts.values()))
    assert (await settled(barn, before)).result == b"before"
    await cell.until(lambda: warnings(desk) == "")


async def test_anyone_with_the_recovery_key_recovers_and_nobody_else(
    autojump_clock: MockClock, cell: Cell
) -> None:
    desk, attic, barn = await of_three(cell)
    assert desk.recovery is not None
    key = RECOVERY_PREFIX + desk.recovery.seed.hex()
    for host in (desk, barn):
        await cell.crash(host)
    await cell.until(lambda: "most voters are away" in warnings(attic))
    for params in ({}, {"recovery_key": RECOVERY_PREFIX + "00" * 32}):
        with pytest.raises(KnodeError) as caught:
            await call(attic, "member.survive", **params)
        assert caught.value.code is Code.NOT_ALLOWED
        assert caught.value.next_step
    await call(attic, "member.survive", recovery_key=key)
    task = await submit(attic, "say x", on="attic")
    assert (await settled(attic, task)).state is State.SUCCEEDED


async def test_two_recoveries_stop_the_cell_until_the_owner_keeps_one(
    autojump_clock: MockClock, cell: Cell
) -> None:
    desk, attic, barn = await of_three(cell)
    assert desk.recovery is not None
    key = RECOVERY_PREFIX + desk.recovery.seed.hex()
    for host in (attic, barn):
        await cell.crash(host)
    await cell.until(lambda: "most voters are away" in warnings(desk))
    await call(desk, "member.survive")
    await settled(desk, await submit(desk, "say here", on="desk"))
    await cell.crash(desk)
    await cell.start(attic)
    await cell.until(lambda: "most voters are away" in warnings(attic))
    there = await call(attic, "member.survive", recovery_key=key)
    kept = await submit(attic, "say there", on="attic")
    await settled(attic, kept)
    await cell.start(desk)
    await cell.until(lambda: "two ledgers stand against each other" in warnings(desk))
    assert there["ledger"][:12] in warnings(desk)
    with pytest.raises(KnodeError) as caught:
        await desk.node.durable.submit(Request(COMMAND, b"say no"), keep=False)
    assert caught.value.code is Code.UNAVAILABLE
    await call(desk, "member.keep", ledger=there["ledger"][:12])
    assert (await settled(desk, kept)).result == b"there"
    await cell.start(barn)
    await cell.until(lambda: all(votes(host) == [Votes.VOTER] * 3 for host in cell.hosts.values()))


async def test_a_voter_is_not_revoked_when_the_rest_could_not_go_on(
    autojump_clock: MockClock, cell: Cell
) -> None:
    desk, attic, barn = await of_three(cell)
    await cell.crash(barn)
    await cell.until(lambda: desk.node.peers.peer(barn_key(desk)).state == "failed")
    with pytest.raises(KnodeError) as caught:
        await call(desk, "member.revoke", node="attic")
    assert "knode member recover --lost-majority --revoke attic" in caught.value.next_step
    await call(desk, "member.revoke", node="barn")
    await cell.until(lambda: votes(desk).count(Votes.VOTER) == 1)
    assert attic.node.membership.in_cell


def barn_key(host: Host) -> Any:
    return host.node.membership.roster.find("barn").key


@pytest.mark.parametrize("what", ["log", "ledger", "damaged ledger"])
async def test_a_node_whose_ledger_or_log_is_gone_gets_both_from_the_others(
    autojump_clock: MockClock, cell: Cell, what: str
) -> None:
    hosts = await of_three(cell)
    tasks = [await submit(hosts[0], f"say {number}") for number in range(5)]
    for task in tasks:
        await settled(hosts[0], task)
    broken = next(host for host in hosts if not host.node.replica.is_leader)
    await cell.crash(broken)
    match what:
        case "log":
            broken.disk.remove(broken.home.raft)
        case "ledger":
            broken.disk.remove(broken.home.ledger)
        case _:
            broken.disk.write(broken.home.ledger, b"no database" * 1000)
    await cell.start(broken)
    await cell.until(lambda: votes(broken) == [Votes.VOTER] * 3)
    await cell.until(lambda: broken.node.ledger.applied == hosts[0].node.ledger.applied)
    assert (await settled(broken, tasks[4])).result == b"4"


async def test_a_cell_of_one_does_not_start_with_a_damaged_log_or_ledger(
    autojump_clock: MockClock, cell: Cell
) -> None:
    desk = await cell.add("desk")
    await cell.until(lambda: desk.node.replica.is_leader)
    await cell.stop(desk)
    damaged = b"no database" * 1000
    desk.disk.write(desk.home.ledger, damaged)
    with pytest.raises(KnodeError) as caught:
        await cell.start(desk)
    assert caught.value.code is Code.HOME_DAMAGED
    assert desk.disk.read(desk.home.ledger, limit_bytes=2**20) == damaged
    desk.error = None


async def test_the_owner_s_machine_was_the_only_voter_and_is_lost(
    autojump_clock: MockClock, cell: Cell
) -> None:
    desk, attic = await cell.add("desk"), await cell.add("attic")
    await cell.until(lambda: votes(attic) == [Votes.LEARNER, Votes.VOTER])
    task = await submit(desk, "say kept", on="attic")
    await settled(attic, task)
    assert desk.recovery is not None
    key = RECOVERY_PREFIX + desk.recovery.seed.hex()
    await cell.crash(desk)
    await call(attic, "member.recover", recovery_key=key, revoke=["desk"])
    # In the new era nothing says the name any more.
    [gone] = attic.node.membership.roster.revoked
    await cell.until(lambda: f"most voters are away ({node_id_of(gone)[:16]})" in warnings(attic))
    await call(attic, "member.survive")
    after = await submit(attic, "say after", on="attic")
    assert (await settled(attic, after)).result == b"after"
    assert (await settled(attic, task)).result == b"kept"
    assert warnings(attic) == ""


async def test_members_come_and_go_while_tasks_run_and_each_ends_once(
    autojump_clock: MockClock, cell: Cell
) -> None:
    hosts = [await cell.add(name) for name in ("desk", "attic", "barn", "shed")]
    desk = hosts[0]
    await cell.until(lambda: all(votes(host) == [Votes.VOTER] * 4 for host in hosts))
    await cell.until(lambda: any(host.node.replica.is_leader for host in hosts))
    tasks: list[bytes] = []

    async def work() -> None:
        for number in range(60):
            tasks.append(await submit(desk, f"sleep 0.2\nsay {number}"))
            await trio.sleep(0.1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(work)
        await trio.sleep(1)
        await cell.add("hut")
        leader = next((h for h in hosts[1:] if h.node.replica.is_leader), hosts[1])
        await call(desk, "member.revoke", node=leader.name)
        await cell.until(lambda: votes(desk).count(Votes.VOTER) == 4)
        follower = next(h for h in hosts[1:] if h is not leader and not h.node.replica.is_leader)
        await call(desk, "member.revoke", node=follower.name)
        await cell.until(lambda: votes(desk).count(Votes.VOTER) == 3)
    ended = [await settled(desk, task) for task in tasks]
    assert [(e.state, e.result) for e in ended] == [
        (State.SUCCEEDED, str(number).encode()) for number in range(60)
    ]


async def test_a_cell_without_any_ledger_gets_one_when_its_owner_says_where(
    autojump_clock: MockClock, cell: Cell, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of before there were ledgers, whose founder had gone."""
    monkeypatch.setattr(Roster, "is_founder", lambda roster, member: False)
    hosts = [await cell.add(name) for name in ("desk", "attic", "barn")]
    desk, attic, _ = hosts
    await cell.until(lambda: all("has the cell's ledger" in warnings(host) for host in hosts))
    survey = await call(desk, "member.survey", revoke=[])
    assert (survey["founds"], survey["missing"], survey["last_index"]) == (True, [], 0)
    assert "begins on desk, with nothing" in render.survey(survey)
    await call(desk, "member.survive", revoke=[])
    await cell.until(lambda: all(votes(host) == [Votes.VOTER] * 3 for host in hosts))
    view = await settled(attic, await submit(attic, "say done"))
    assert view.result == b"done"
    assert not any("has the cell's ledger" in warnings(host) for host in hosts)
