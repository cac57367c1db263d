"""What the daemon answers, asked of a real node in memory and in virtual time."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from memory_cell import COMMAND, TEXT, Cell, Host
from trio.testing import MockClock

from knode.control.methods import ControlMethods
from knode.errors import Code, KnodeError
from knode.identity import KeyPair
from knode.mesh.statements import sign_rotation

NEEDS = {
    "status": {},
    "doctor": {},
    "stop": {},
    "invite": {},
    "invite.wait": {"ticket": "t"},
    "join": {"ticket": "t"},
    "peer.list": {},
    "peer.show": {"node": "n"},
    "peer.ping": {"node": "n"},
    "member.list": {},
    "member.role": {"node": "n", "role": "voter"},
    "member.revoke": {"node": "n"},
    "member.rotate": {},
    "member.recover": {"recovery_key": "k"},
    "member.survey": {},
    "member.survive": {},
    "member.ledger": {"ledger": "l"},
    "member.keep": {"ledger": "l"},
    "agent.list": {},
    "agent.show": {"agent": "a"},
    "agent.install": {"path": "/p"},
    "agent.start": {"agent": "a"},
    "agent.stop": {"agent": "a"},
    "task.submit": {"agent": "a"},
    "task.list": {},
    "task.show": {"task": "t"},
    "task.watch": {"task": "t"},
    "task.cancel": {"task": "t"},
    "task.explain": {"task": "t"},
    "task.effects": {},
    "logs.tail": {},
}


class Daemon:
    """The methods of one host's node."""

    def __init__(self, host: Host) -> None:
        self.stopped = False
        self.restarted = False
        self.steps: list[dict[str, Any]] = []
        self._table = ControlMethods(host.node, host.log.lines, self._stop, self._restart).table()

    def _stop(self) -> None:
        self.stopped = True

    def _restart(self) -> None:
        self.restarted = True

    @property
    def methods(self) -> set[str]:
        return set(self._table)

    async def call(self, method: str, **params: Any) -> Any:
        self.steps = []
        return await self._table[method](params, self.steps.append)

    async def refused(self, code: Code, method: str, **params: Any) -> str:
        with pytest.raises(KnodeError) as caught:
            await self.call(method, **params)
        assert caught.value.code is code, caught.value
        assert caught.value.next_step, caught.value
        return caught.value.message


async def test_every_method_refuses_what_it_does_not_take(autojump_clock: MockClock, cell: Cell) -> None:
    daemon = Daemon(await cell.add("desk"))
    assert daemon.methods == set(NEEDS)
    for method, needs in NEEDS.items():
        assert "nonsense" in await daemon.refused(Code.INVALID_ARGUMENT, method, **needs, nonsense=1)
        for name in needs:
            less = {key: value for key, value in needs.items() if key != name}
            assert name in await daemon.refused(Code.INVALID_ARGUMENT, method, **less)
            await daemon.refused(Code.INVALID_ARGUMENT, method, **{**needs, name: 7})
    assert not daemon.stopped


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("invite", {"role": "king"}),
        ("member.role", {"node": "desk", "role": "king"}),
        ("peer.ping", {"node": "attic", "count": 0}),
        ("peer.ping", {"node": "attic", "count": 101}),
        ("logs.tail", {"lines": -1}),
        ("logs.tail", {"lines": 1001}),
        ("agent.install", {"path": "relative"}),
        ("agent.install", {"path": "/nul\0"}),
        ("task.submit", {"agent": TEXT, "direct": True, "artifacts": ["relative"]}),
        ("task.submit", {"agent": TEXT, "direct": True, "artifacts": ["/nul\0"]}),
        ("task.submit", {"agent": TEXT, "direct": True, "artifacts": "/file"}),
        ("task.submit", {"agent": TEXT, "direct": True, "deadline_s": "soon"}),
        ("task.submit", {"agent": "k" * 65, "direct": True}),
        ("member.rotate", {"force": "yes"}),
        ("member.revoke", {"node": "desk", "undo_since": "yesterday"}),
        ("member.recover", {"recovery_key": "five words and no more"}),
        ("member.recover", {"recovery_key": "knode-recovery-" + "g" * 64}),
    ],
)
async def test_values_out_of_bounds_are_refused(
    autojump_clock: MockClock, cell: Cell, method: str, params: dict[str, Any]
) -> None:
    daemon = Daemon(await cell.add("desk"))
    await daemon.refused(Code.INVALID_ARGUMENT, method, **params)
    assert await daemon.call("task.list") == []


async def test_status_tells_the_whole_picture(autojump_clock: MockClock, cell: Cell) -> None:
    desk, attic = await cell.add("desk"), await cell.add("attic")
    await desk.settle("say x", on="attic")
    await Daemon(desk).call("task.submit", agent=COMMAND, input="die 3", wait=True)
    await cell.until(lambda: not len(desk.node.attempts))
    status = await Daemon(desk).call("status")
    assert (status["node_id"], status["name"], status["role"]) == (desk.node.key.node_id, "desk", "admin")
    assert status["leader"] == desk.node.key.node_id
    assert status["tasks"] == {"failed": 1, "succeeded": 1}
    [no_failover] = status["warnings"]
    assert "no failover yet" in no_failover
    assert (status["refusals"], status["failures"], status["dropped"]) == ({}, {}, 0)
    assert status["durable"] == {
        "kept_attempts": 0,
        "kept_attempt_bytes": 0,
        "held_files": 0,
        "held_file_bytes": 0,
        "refused_ends": {},
        "dropped_messages": {},
        "faults": 0,
    }
    assert set(status["process"]) == {"resident_bytes", "descriptors", "threads", "tasks"}
    assert all(count > 0 for count in status["process"].values())
    assert {TEXT, COMMAND} <= set(status["agents"])
    members = {member["name"]: member for member in status["members"]}
    assert set(members["desk"]) == {"node_id", "name", "role", "state", "link", "relayed", "rtt_ms"}
    assert (members["desk"]["state"], members["attic"]["state"]) == ("alive", "alive")
    assert members["attic"]["node_id"] == attic.node.key.node_id
    await cell.stop(attic)
    gone = await Daemon(desk).call("status")
    assert {member["name"]: member["state"] for member in gone["members"]}["attic"] == "left"
    await cell.start(attic)
    await cell.until_whole()
    await cell.crash(attic)
    await cell.until(lambda: desk.node.peers.peer(members_key(desk, "attic")).state == "failed")
    warnings = (await Daemon(desk).call("status"))["warnings"]
    assert any("attic" in warning for warning in warnings)


def members_key(host: Host, name: str) -> Any:
    return host.node.membership.roster.find(name).key


async def test_an_invitation_is_waited_for_and_both_sides_tell_the_same_words(
    autojump_clock: MockClock, cell: Cell
) -> None:
    desk = await cell.add("desk")
    daemon, attic = Daemon(desk), cell._make("attic", {})
    cell.hosts["attic"] = attic
    await cell.start(attic)
    await Daemon(attic).refused(Code.UNAVAILABLE, "task.submit", agent=TEXT, direct=True)
    assert (await Daemon(attic).call("status"))["cell_id"] is None
    invitation = await daemon.call("invite", role="worker")
    arrived: list[Any] = []

    async def wait() -> None:
        arrived.append(await daemon.call("invite.wait", ticket=invitation["ticket"]))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.sleep(60)
        assert arrived == []
        joined = await Daemon(attic).call("join", ticket=invitation["ticket"])
    assert arrived == [{"id": joined["node_id"], "name": "attic", "words": joined["words"]}]
    assert len(joined["words"]) == 4
    assert {member["name"]: member["state"] for member in joined["members"]} == dict.fromkeys(
        ("desk", "attic"), "alive"
    )
    words = {member["name"]: member["words"] for member in await daemon.call("member.list")}
    assert words == {"desk": None, "attic": joined["words"]}
    await Daemon(attic).refused(Code.HOME_EXISTS, "join", ticket=invitation["ticket"])


async def test_waiting_for_an_invitation_ends_with_the_ticket(autojump_clock: MockClock, cell: Cell) -> None:
    daemon = Daemon(await cell.add("desk"))
    ticket = (await daemon.call("invite"))["ticket"]
    begun = trio.current_time()
    await daemon.refused(Code.TICKET_EXPIRED, "invite.wait", ticket=ticket)
    assert trio.current_time() - begun == pytest.approx(600, abs=1)
    await daemon.refused(Code.INVALID_ARGUMENT, "invite.wait", ticket="garbage")


async def test_who_has_joined_sees_at_once_who_is_here(autojump_clock: MockClock, cell: Cell) -> None:
    desk, shed = await cell.add("desk"), await cell.add("shed")
    cellar = await cell.add("cellar")
    await cell.stop(cellar)
    attic = cell._make("attic", {})
    cell.hosts["attic"] = attic
    await cell.start(attic)
    ticket = (await Daemon(desk).call("invite"))["ticket"]
    begun = trio.current_time()
    joined = await Daemon(attic).call("join", ticket=ticket)
    states = {member["name"]: member["state"] for member in joined["members"]}
    assert states == {"attic": "alive", "cellar": "failed", "desk": "alive", "shed": "alive"}
    assert trio.current_time() - begun < 3
    assert shed.node.membership.roster.members.keys() == desk.node.membership.roster.members.keys()


async def test_two_joins_at_once_are_one(autojump_clock: MockClock, cell: Cell) -> None:
    desk, attic = await cell.add("desk"), cell._make("attic", {})
    cell.hosts["attic"] = attic
    await cell.start(attic)
    tickets = [(await Daemon(desk).call("invite"))["ticket"] for _ in range(2)]
    outcomes: list[str] = []

    async def join(ticket: str) -> None:
        try:
            outcomes.append((await Daemon(attic).call("join", ticket=ticket))["name"])
        except KnodeError as error:
            outcomes.append(error.code)

    async with trio.open_nursery() as nursery:
        for ticket in tickets:
            nursery.start_soon(join, ticket)
    assert sorted(outcomes) == [Code.HOME_EXISTS, "attic"]
    assert [member["name"] for member in await Daemon(desk).call("member.list")] == ["attic", "desk"]


async def test_members_are_called_by_name_id_or_start_of_an_id(autojump_clock: MockClock, cell: Cell) -> None:
    desk, attic = await cell.add("desk"), await cell.add("attic")
    daemon, node_id = Daemon(desk), attic.node.key.node_id
    for selector in ("attic", node_id, node_id[:20], attic.node.key.public.did):
        assert (await daemon.call("peer.show", node=selector))["id"] == node_id
    await daemon.refused(Code.INVALID_ARGUMENT, "peer.show", node="12D3KooW")
    await daemon.refused(Code.NOT_FOUND, "peer.show", node="nobody")
    await daemon.refused(Code.NOT_FOUND, "peer.show", node="")
    await daemon.refused(Code.INVALID_ARGUMENT, "peer.ping", node="desk")
    shown = await daemon.call("peer.show", node="attic")
    assert {"id", "name", "role", "state", "link", "rtt_ms", "address", "agents", "load"} <= set(shown)
    assert shown["link"] == "memory"
    assert shown["load"] == {"running": 0, "queued": 0, "capacity": 2, "cpu": 0}


async def test_a_peer_is_shown_with_every_way_to_it_and_who_told_of_it(
    autojump_clock: MockClock, cell: Cell
) -> None:
    desk, attic = await cell.add("desk"), await cell.add("attic")
    daemon = Daemon(desk)
    desk.node.peers.discovered(attic.node.key.node_id, ("elsewhere:4747",))
    await trio.sleep(10)
    shown = await daemon.call("peer.show", node="attic")
    assert shown["did"] == attic.node.key.public.did
    assert [(way["address"], way["source"]) for way in shown["ways"]] == [
        (attic.node.addresses[0], "told"),
        ("elsewhere:4747", "heard"),
    ]
    assert shown["connected_s"] >= 10
    assert 0 <= shown["silent_s"] <= 3
    assert shown["traffic"]["bytes_received"] > 0
    assert (shown["links"], shown["refusal"]) == (1, None)
    assert shown["dialled_here"] is not (await Daemon(attic).call("peer.show", node="desk"))["dialled_here"]
    key = attic.node.key.public
    await cell.stop(attic)
    await cell.until(lambda: desk.node.peers.peer(key).conversation is None)
    await trio.sleep(60)
    lost = await daemon.call("peer.show", node="attic")
    assert lost["silent_s"] >= 60
    assert (lost["connected_s"], lost["traffic"], lost["dialled_here"], lost["links"]) == (
        None,
        None,
        None,
        0,
    )
    assert all(way["problem"] for way in lost["ways"])


async def test_a_node_that_refuses_this_one_is_shown_with_its_words(
    autojump_clock: MockClock, cell: Cell
) -> None:
    desk, attic = await cell.add("desk"), await cell.add("attic")
    await cell.stop(attic)  # else it would hear of it
    await desk.node.membership.revoke(desk.node.membership.roster.find("attic"))
    await cell.start(attic)
    await cell.until(lambda: attic.node.peers.peer(desk.node.key.public).refusal is not None)
    shown = await Daemon(attic).call("peer.show", node="desk")
    assert shown["refusal"]["code"] == "KEY_REVOKED"


async def test_pings_are_told_as_they_come_and_lost_ones_counted(
    autojump_clock: MockClock, cell: Cell
) -> None:
    desk, _ = await cell.add("desk"), await cell.add("attic")
    daemon = Daemon(desk)
    result = await daemon.call("peer.ping", node="attic", count=3)
    assert [step["number"] for step in daemon.steps] == [1, 2, 3]
    assert result["rtt_ms"] == [step["rtt_ms"] for step in daemon.steps]
    assert (len(result["rtt_ms"]), result["lost"]) == (3, 0)
    cell.network.cut("desk", "attic")
    result = await daemon.call("peer.ping", node="attic", count=2)
    assert (result["rtt_ms"], result["lost"]) == ([], 2)


async def test_a_role_is_changed_and_a_member_revoked(autojump_clock: MockClock, cell: Cell) -> None:
    desk, attic = await cell.add("desk"), await cell.add("attic")
    daemon = Daemon(desk)
    assert (await daemon.call("member.role", node="attic", role="voter"))["role"] == "voter"
    await daemon.refused(Code.NOT_ALLOWED, "task.submit", agent=TEXT, direct=True, on="attic")
    await Daemon(attic).refused(Code.NOT_ALLOWED, "member.revoke", node="desk")
    assert (await daemon.call("member.revoke", node="attic"))["revoked"] is True
    assert [member["name"] for member in await daemon.call("member.list")] == ["desk"]
    await daemon.refused(Code.NOT_FOUND, "peer.show", node="attic")


async def test_agents_are_stopped_and_started_for_everybody(autojump_clock: MockClock, cell: Cell) -> None:
    desk, attic = await cell.add("desk"), await cell.add("attic")
    assert (await Daemon(desk).call("agent.show", agent=TEXT))["nodes"] == ["attic", "desk"]
    assert (await Daemon(attic).call("agent.stop", agent=TEXT))["state"] == "stopped"
    await cell.until(lambda: TEXT not in desk.node.offers.of(attic.node.key.public))
    assert (await Daemon(desk).call("agent.show", agent=TEXT))["nodes"] == ["desk"]
    await Daemon(attic).call("agent.start", agent=TEXT)
    await cell.until(lambda: TEXT in desk.node.offers.of(attic.node.key.public))
    for method in ("agent.show", "agent.start", "agent.stop"):
        await Daemon(desk).refused(Code.NO_AGENT, method, agent="kExecutor:nope")
    ids = [agent["id"] for agent in await Daemon(desk).call("agent.list")]
    assert ids == sorted(ids)


async def test_agents_are_installed_one_at_a_time(
    autojump_clock: MockClock, cell: Cell, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = await cell.add("desk")
    daemon = Daemon(desk)
    await trio.sleep(5)  # so that nothing else of the start is at work
    at_once, most = 0, 0

    async def install(number: int) -> None:
        await daemon.refused(Code.NOT_FOUND, "agent.install", path=f"/absent/{number}")

    run = desk.node.world.blocking.run

    async def slow(work: Any) -> Any:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        await trio.sleep(1)
        try:
            return await run(work)
        finally:
            at_once -= 1

    monkeypatch.setattr(desk.node.world.blocking, "run", slow)
    async with trio.open_nursery() as nursery:
        for number in range(3):
            nursery.start_soon(install, number)
    assert most == 1


async def test_a_task_is_followed_to_its_end(autojump_clock: MockClock, cell: Cell) -> None:
    desk, _ = await cell.add("desk"), await cell.add("attic")
    daemon = Daemon(desk)
    line = "report 0.5 half\nsleep 5\nsay done"
    done = await daemon.call("task.submit", agent=COMMAND, input=line, direct=True, wait=True, on="attic")
    assert daemon.steps == [{"fraction": 0.5, "text": "half", "node": "attic"}]
    assert set(done) >= {"id", "agent", "state", "attempt", "node", "key", "result", "error"}
    assert (done["state"], done["result"], done["node"]) == ("succeeded", "done", "attic")
    assert await daemon.call("task.show", task=done["id"][:10]) == done
    assert await daemon.call("task.watch", task=done["id"]) == done
    assert await daemon.call("task.list") == [done]
    await daemon.refused(Code.INVALID_ARGUMENT, "task.cancel", task=done["id"])
    for method in ("task.show", "task.watch", "task.cancel"):
        await daemon.refused(Code.NOT_FOUND, method, task="nothing")


async def test_without_wait_the_answer_comes_at_once(autojump_clock: MockClock, cell: Cell) -> None:
    daemon = Daemon(await cell.add("desk"))
    begun = await daemon.call("task.submit", agent=COMMAND, input="sleep 5", direct=True)
    assert begun["state"] == "assigned"
    assert (await daemon.call("task.cancel", task=begun["id"]))["state"] == "cancelled"


async def test_a_durable_task_goes_on_when_who_waited_has_gone(autojump_clock: MockClock, cell: Cell) -> None:
    daemon = Daemon(await cell.add("desk"))
    with trio.move_on_after(5) as waiting:
        await daemon.call("task.submit", agent=COMMAND, input="sleep 50\nsay done", wait=True, key="k")
    assert waiting.cancelled_caught
    [task] = await daemon.call("task.list")
    assert (task["state"], task["attempt"], task["node"], task["key"]) == ("assigned", 1, "desk", "k")
    again = await daemon.call("task.submit", agent=COMMAND, input="sleep 50\nsay done", wait=True, key="k")
    assert (again["id"], again["state"], again["result"]) == (task["id"], "succeeded", "done")
    assert again == await daemon.call("task.watch", task=task["id"][:8])
    assert await daemon.call("task.list") == [again]
    for method in ("task.show", "task.watch", "task.cancel", "task.explain", "task.effects"):
        await daemon.refused(Code.NOT_FOUND, method, task="0" * 32)


async def test_direct_and_durable_tasks_stand_together_in_the_order_of_their_submission(
    autojump_clock: MockClock, cell: Cell
) -> None:
    daemon = Daemon(await cell.add("desk"))
    ids = []
    for is_direct in (True, False, True, False):
        ids.append((await daemon.call("task.submit", agent=COMMAND, direct=is_direct, wait=True))["id"])
        await trio.sleep(1)
    listed = await daemon.call("task.list")
    assert [task["id"] for task in listed] == ids[::-1]
    assert [task["direct"] for task in listed] == [False, True, False, True]
    keys = {"id", "agent", "state", "attempt", "node", "key", "result", "error", "direct", "submitted"}
    assert all(keys <= set(task) for task in listed)
    for task in listed:
        assert (await daemon.call("task.show", task=task["id"]))["id"] == task["id"]
    await daemon.refused(Code.INVALID_ARGUMENT, "task.explain", task=ids[0])
    explained = await daemon.call("task.explain", task=ids[1])
    assert (explained["task"]["id"], explained["waits_for"]) == (ids[1], None)
    assert [(one["node"], one["why"]) for one in explained["considered"]] == [("desk", None)]
    for wrong in ({"key": "k"}, {"outbox": False}):
        await daemon.refused(Code.INVALID_ARGUMENT, "task.submit", agent=COMMAND, direct=True, **wrong)


async def test_who_waited_and_went_away_has_the_task_cancelled(autojump_clock: MockClock, cell: Cell) -> None:
    desk, attic = await cell.add("desk"), await cell.add("attic")
    daemon = Daemon(desk)
    with trio.move_on_after(5) as waiting:
        await daemon.call("task.submit", agent=COMMAND, input="sleep 50", direct=True, wait=True, on="attic")
    assert waiting.cancelled_caught
    assert [task["state"] for task in await daemon.call("task.list")] == ["cancelled"]
    await cell.until(lambda: attic.sandbox.cancelled != [])
    watched = await daemon.call("task.submit", agent=COMMAND, input="sleep 50", direct=True, on="attic")
    with trio.move_on_after(5):
        await daemon.call("task.watch", task=watched["id"])
    assert (await daemon.call("task.show", task=watched["id"]))["state"] == "assigned"


async def test_stop_is_passed_on(autojump_clock: MockClock, cell: Cell) -> None:
    daemon = Daemon(await cell.add("desk"))
    assert await daemon.call("stop") == {"stopping": True}
    assert daemon.stopped


async def test_new_log_lines_come_live(autojump_clock: MockClock, cell: Cell) -> None:
    desk = await cell.add("desk")
    await cell.until(lambda: desk.node.replica.is_leader)
    daemon = Daemon(desk)
    with trio.move_on_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: daemon.call("logs.tail", lines=0, follow=True))
            await trio.sleep(1)
            desk.log.logger.info("one")
            desk.log.logger.info("two")
    assert [step["line"] for step in daemon.steps] == desk.lines[-2:]


def recovery_line(host: Host) -> str:
    assert host.recovery is not None
    return f"knode-recovery-{host.recovery.seed.hex()}"


async def test_a_node_rotates_its_key_and_keeps_its_id(autojump_clock: MockClock, cell: Cell) -> None:
    desk, attic = await cell.add("desk"), await cell.add("attic")
    before, daemon = attic.node.key.node_id, Daemon(attic)
    changed = await daemon.call("member.rotate")
    assert daemon.restarted
    assert not daemon.stopped
    assert (changed["id"], changed["name"]) == (before, "attic")
    assert changed["key"] != before
    await cell.stop(attic)
    await cell.start(attic)
    await cell.until_whole()
    assert attic.node.key.node_id == changed["key"]
    assert (await Daemon(attic).call("status"))["node_id"] == before
    assert [peer["id"] for peer in await Daemon(desk).call("peer.list")] == [before]
    assert (await Daemon(desk).call("peer.show", node=before))["state"] == "alive"
    task = await desk.settle("say it works", on=before)
    assert task.document()["result"] == "it works"
    assert (await Daemon(desk).call("member.list"))[0]["words"] is not None  # of the join with its first key


async def test_a_key_is_rotated_while_all_are_here_or_by_force(autojump_clock: MockClock, cell: Cell) -> None:
    desk, attic, barn = [await cell.add(name) for name in ("desk", "attic", "barn")]
    await cell.stop(barn)
    daemon = Daemon(attic)
    assert "barn" in await daemon.refused(Code.UNAVAILABLE, "member.rotate")
    assert not daemon.restarted
    assert (await daemon.call("status"))["role"] == "worker"
    await daemon.call("member.rotate", force=True)
    await cell.stop(attic)
    await cell.start(attic)
    await cell.start(barn)
    await cell.until_whole()
    assert barn.node.membership.roster.find("attic").key == attic.node.key.public
    await Daemon(desk).call("member.rotate")


async def test_the_agents_that_a_node_published_run_with_its_new_key(
    autojump_clock: MockClock, cell: Cell
) -> None:
    desk = await cell.add("desk")
    publisher = desk.node.key.public
    await Daemon(desk).call("member.rotate")
    await cell.stop(desk)
    await cell.start(desk)
    assert desk.node.key.public != publisher
    assert desk.node.membership.roster.holders[publisher.raw] == desk.node.membership.own
    assert desk.node._is_publisher_trusted(publisher)


async def test_a_cell_is_recovered_on_another_node(autojump_clock: MockClock, cell: Cell) -> None:
    desk, attic, barn = [await cell.add(name) for name in ("desk", "attic", "barn")]
    daemon, line = Daemon(attic), recovery_line(desk)
    wrong = line[:-1] + ("0" if line[-1] != "0" else "1")
    assert "not the recovery key" in await daemon.refused(
        Code.NOT_ALLOWED, "member.recover", recovery_key=wrong
    )
    await daemon.refused(Code.NOT_FOUND, "member.recover", recovery_key=line, revoke=["shed"])
    await daemon.refused(Code.NOT_ALLOWED, "member.recover", recovery_key=line, revoke=["attic"])
    await daemon.refused(
        Code.INVALID_ARGUMENT, "member.recover", recovery_key=line, undo_since="2001-01-01T00:00Z"
    )
    assert not attic.node.world.disk.exists(attic.home.owner_key)
    typed = f"  {line[:40].upper()} {line[40:]}\n"
    recovered = await daemon.call("member.recover", recovery_key=typed, revoke=["desk"])
    assert recovered["name"] == "attic"
    assert [member["name"] for member in recovered["revoked"]] == ["desk"]
    assert [member["name"] for member in recovered["members"]] == ["attic", "barn"]
    await cell.until(lambda: "desk" not in [m.name for m in barn.node.membership.roster.members.values()])
    await daemon.call("invite", role="admin")
    await daemon.call("member.role", node="barn", role="admin")
    # Opened anew, the node still owns the cell.
    await cell.stop(attic)
    await cell.start(attic)
    await Daemon(attic).call("member.revoke", node="barn")
    assert line not in "".join(attic.lines)
    own = desk.node.key.public.raw
    await cell.until(lambda: own not in desk.node.membership.roster.members)
    warnings = (await Daemon(desk).call("status"))["warnings"]
    assert any("this node was revoked" in warning for warning in warnings)


async def test_a_contested_member_is_shown_until_it_is_revoked(autojump_clock: MockClock, cell: Cell) -> None:
    desk, attic = await cell.add("desk"), await cell.add("attic")
    own = attic.node.membership.own
    theft = sign_rotation(
        attic.node.key,
        KeyPair(bytes(32)),
        era=attic.node.membership.roster.era,
        member=own.id.raw,
        kept=(),
        issued=1,
    )
    await Daemon(attic).call("member.rotate")
    await cell.until(lambda: own.key.raw in desk.node.membership.roster.replaced)
    await desk.node.membership.add([theft])
    await cell.until(lambda: bool(desk.node.membership.roster.contested))
    [warning] = [w for w in (await Daemon(desk).call("status"))["warnings"] if "attic" in w]
    assert "knode member revoke attic" in warning
    await Daemon(desk).call("member.revoke", node="attic")
    assert not any("attic" in warning for warning in (await Daemon(desk).call("status"))["warnings"])
