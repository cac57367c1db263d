"""What the daemon answers on its socket: each name, and the node's method for it.

No logic: a method decodes, calls one method of a room, and shapes the answer as docs/cli.md has it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import trio

from knode.agents.registry import AgentEntry, State
from knode.control.parameters import (
    Nothing,
    OfAgent,
    OfLog,
    OfMemberRole,
    OfNode,
    OfPartition,
    OfPath,
    OfPings,
    OfRecovery,
    OfRevocation,
    OfRole,
    OfRotation,
    OfTicket,
)
from knode.control.process import process_document
from knode.control.recovery_methods import RecoveryMethods
from knode.control.server import Handler, Notify
from knode.control.task_methods import TaskMethods
from knode.control.typed import typed
from knode.errors import Code, KnodeError
from knode.home.broadcast import Broadcast
from knode.mesh.roster import Member
from knode.mesh.ticket import parse_ticket
from knode.node.health import examine
from knode.node.node import Node
from knode.node.setup import parse_recovery_key
from knode.node.status import member_document, peer_details, peer_document, status
from knode.node.voting import iso, votes_document
from knode.transport.partition import Partition

T = TypeVar("T")
LOG_TAIL_BYTES = 1024 * 1024
MEETING_S = 2.0
"""How long a join waits to see the other members, so that its answer does not call the living failed."""


class ControlMethods:
    """The methods of one daemon."""

    def __init__(
        self,
        node: Node,
        lines: Broadcast,
        stop: Callable[[], None],
        restart: Callable[[], None],
        partition: Partition | None = None,
    ) -> None:
        self._node = node
        self._lines = lines
        self._stop = stop
        self._restart = restart
        self._partition = partition
        self._registry_turn = trio.Lock()

    def table(self) -> Mapping[str, Handler]:
        """Return every method by its name."""
        table = {
            "status": typed(Nothing, self._status),
            "doctor": typed(Nothing, self._examine),
            "stop": typed(Nothing, self._stop_daemon),
            "invite": typed(OfRole, self._invite),
            "invite.wait": typed(OfTicket, self._await_invited),
            "join": typed(OfTicket, self._join),
            "peer.list": typed(Nothing, self._list_peers),
            "peer.show": typed(OfNode, self._show_peer),
            "peer.ping": typed(OfPings, self._ping_peer),
            "member.list": typed(Nothing, self._list_members),
            "member.role": typed(OfMemberRole, self._change_role),
            "member.revoke": typed(OfRevocation, self._revoke),
            "member.rotate": typed(OfRotation, self._rotate),
            "member.recover": typed(OfRecovery, self._recover),
            "agent.list": typed(Nothing, self._list_agents),
            "agent.show": typed(OfAgent, self._show_agent),
            "agent.install": typed(OfPath, self._install_agent),
            "agent.start": typed(OfAgent, self._start_agent),
            "agent.stop": typed(OfAgent, self._stop_agent),
            "logs.tail": typed(OfLog, self._tail),
            **TaskMethods(self._node).table(),
        }
        table |= RecoveryMethods(self._node).table()
        if self._partition is not None:
            table["testnet.partition"] = typed(OfPartition, self._cut_off)
        return table

    # The node and its cell.

    async def _status(self, _: Nothing, notify: Notify) -> Any:
        return status(self._node) | {"process": process_document()}

    async def _examine(self, _: Nothing, notify: Notify) -> Any:
        return msgspec.to_builtins(await examine(self._node))

    async def _stop_daemon(self, _: Nothing, notify: Notify) -> Any:
        self._stop()
        return {"stopping": True}

    async def _invite(self, of: OfRole, notify: Notify) -> Any:
        ticket, expires = await self._node.invite(of.role)
        return {
            "ticket": ticket.text(),
            "role": of.role,
            "expires_at": iso(expires),
            "addresses": list(ticket.addresses),
        }

    async def _await_invited(self, of: OfTicket, notify: Notify) -> Any:
        public_key = parse_ticket(of.ticket).key.public.raw
        membership = self._node.membership
        while True:
            changed = membership.next_change()
            invitation = membership.invitations.find(public_key)
            if invitation.used_by is not None:
                member = membership.roster.admit(invitation.used_by)
                return {"id": member.node_id, "name": member.name, "words": list(invitation.words)}
            left_s = (invitation.expires - self._node.world.clock.wall()) / 1000
            if left_s <= 0:
                raise KnodeError(
                    Code.TICKET_EXPIRED, "nobody joined in time", "make a new one: 'knode invite'"
                )
            with trio.move_on_after(left_s):
                await changed.wait()

    async def _join(self, of: OfTicket, notify: Notify) -> Any:
        welcome = await self._node.join(parse_ticket(of.ticket), of.name)
        with trio.move_on_after(MEETING_S):
            for peer in self._node.peers.members():
                while peer.conversation is None:
                    await peer.changed.wait()
        roster = self._node.membership.roster
        return {
            "node_id": welcome.member.node_id,
            "name": welcome.member.name,
            "cell_id": roster.cell_id.hex(),
            "role": welcome.member.role,
            "words": list(welcome.words),
            "members": await self._list_members(Nothing(), notify),
        }

    async def _list_peers(self, _: Nothing, notify: Notify) -> Any:
        return [peer_document(self._node, m) for m in self._others()]

    async def _show_peer(self, of: OfNode, notify: Notify) -> Any:
        return peer_details(self._node, self._other(of.node))

    async def _ping_peer(self, of: OfPings, notify: Notify) -> Any:
        member = self._other(of.node)
        peer = self._node.peers.peer(member.key)
        times: list[float] = []
        for number in range(of.count):
            rtt_s = await self._node.pinging.ping(peer)
            notify({"number": number + 1, "rtt_ms": None if rtt_s is None else round(rtt_s * 1000, 3)})
            if rtt_s is not None:
                times.append(round(rtt_s * 1000, 3))
        document = peer_document(self._node, member)
        picked = {key: document[key] for key in ("id", "name", "link", "relayed", "address", "why")}
        return picked | {"rtt_ms": times, "lost": of.count - len(times)}

    async def _list_members(self, _: Nothing, notify: Notify) -> Any:
        membership = self._node.membership
        words = membership.invitations.words()
        return [
            {
                "id": m.node_id,
                "name": m.name,
                "role": m.role,
                "state": member_document(self._node, m)["state"],
                "joined_at": iso(m.joined),
                "votes": votes_document(self._node, m),
                "words": list(words[m.id.raw]) if m.id.raw in words else None,
            }
            for m in membership.roster.members.values()
        ]

    async def _change_role(self, of: OfMemberRole, notify: Notify) -> Any:
        member = await self._node.membership.set_role(self._member(of.node), of.role)
        return {"id": member.node_id, "name": member.name, "role": member.role}

    async def _revoke(self, of: OfRevocation, notify: Notify) -> Any:
        member = self._member(of.node)
        await self._node.revoke(member, undo_since=_moment(of.undo_since))
        return {"id": member.node_id, "name": member.name, "revoked": True}

    async def _rotate(self, of: OfRotation, notify: Notify) -> Any:
        own = self._node.membership.own
        key = await self._node.rotate(though_away=of.force)
        self._restart()
        return {"id": own.node_id, "name": own.name, "key": key.node_id}

    async def _recover(self, of: OfRecovery, notify: Notify) -> Any:
        lost = [self._member(node) for node in dict.fromkeys(of.revoke)]
        recovery = parse_recovery_key(of.recovery_key)
        await self._node.recover(recovery, lost=lost, undo_since=_moment(of.undo_since))
        own = self._node.membership.own
        return {
            "id": own.node_id,
            "name": own.name,
            "revoked": [{"id": member.node_id, "name": member.name} for member in lost],
            "members": await self._list_members(Nothing(), notify),
        }

    # Agents.

    async def _list_agents(self, _: Nothing, notify: Notify) -> Any:
        return [self._agent(entry) for entry in self._node.registry.list()]

    async def _show_agent(self, of: OfAgent, notify: Notify) -> Any:
        entry = self._node.registry.show(of.agent)
        manifest = msgspec.to_builtins(entry.manifest)
        return self._agent(entry) | {"capabilities": manifest["capabilities"], "limits": manifest["limits"]}

    async def _install_agent(self, of: OfPath, notify: Notify) -> Any:
        registry = self._node.registry
        manifest = await self._change_registry(lambda: registry.install(Path(of.path)))
        self._node.log.info("agent installed", agent=manifest.id, version=manifest.version)
        return self._agent(registry.show(manifest.id))

    async def _start_agent(self, of: OfAgent, notify: Notify) -> Any:
        await self._change_registry(lambda: self._node.registry.start(of.agent))
        return self._agent(self._node.registry.show(of.agent))

    async def _stop_agent(self, of: OfAgent, notify: Notify) -> Any:
        await self._change_registry(lambda: self._node.registry.stop(of.agent))
        return self._agent(self._node.registry.show(of.agent))

    async def _change_registry(self, change: Callable[[], T]) -> T:
        """Change which agents run here, one change at a time, and tell everybody."""
        async with self._registry_turn:
            result = await self._node.world.blocking.run(change)
        self._node.offers.announce()
        return result

    def _agent(self, entry: AgentEntry) -> dict[str, Any]:
        nodes: list[str] = []
        if self._node.membership.in_cell:
            members = self._node.membership.roster.members.values()
            nodes = [m.name for m in members if entry.manifest.id in self._node.offers.of(m.key)]
        state, problem = entry.state, entry.problem
        if state is State.RUNNING and not self._node.runner.can_run(entry.manifest.id):
            state, problem = State.REFUSED, "no sandbox holds here: 'knode status' says why"
        return {
            "id": entry.manifest.id,
            "version": entry.manifest.version,
            "runtime": entry.runtime,
            "state": state,
            "publisher": entry.publisher.node_id,
            "description": entry.manifest.description,
            "problem": problem or None,
            "nodes": nodes,
        }

    # Faults.

    async def _cut_off(self, of: OfPartition, notify: Notify) -> Any:
        assert self._partition is not None, "else the table does not have it"
        self._partition.set(of.cut_off_from)
        self._node.log.warning("partition", cut_off_from=list(of.cut_off_from))
        return {"cut_off_from": sorted(self._partition.cut_off_from)}

    # The log.

    async def _tail(self, of: OfLog, notify: Notify) -> Any:
        disk, file = self._node.world.disk, self._node.home.log_file
        with self._lines.subscribe() as coming:
            # What is written from now on comes by the subscription, and must not be read as well.
            size = disk.size(file) if disk.exists(file) else 0
            for line in await self._node.world.blocking.run(lambda: self._last_lines(of.lines, size)):
                notify({"line": line})
            if of.follow:
                async for line in coming:
                    notify({"line": line})
        return None

    def _last_lines(self, count: int, size: int) -> list[str]:
        """Return the last lines of the first `size` bytes of the log file, as far as LOG_TAIL_BYTES reach."""
        begin = max(0, size - LOG_TAIL_BYTES)
        if count == 0 or size == 0:
            return []
        data = self._node.world.disk.read_at(self._node.home.log_file, begin, size - begin)
        lines = data.decode("utf-8", "replace").splitlines()
        return lines[1 if begin else 0 :][-count:]

    # Members by what people call them.

    def _member(self, selector: str) -> Member:
        return self._node.membership.roster.find(selector)

    def _others(self) -> list[Member]:
        own = self._node.key.public
        return [m for m in self._node.membership.roster.members.values() if m.key != own]

    def _other(self, selector: str) -> Member:
        member = self._member(selector)
        if member.key == self._node.key.public:
            raise KnodeError(
                Code.INVALID_ARGUMENT, f"{member.name} is this node itself", "'knode status' shows it"
            )
        return member


def _moment(text: str | None) -> int | None:
    """Return a time as text in milliseconds of wall time; one without an offset is this machine's."""
    if text is None:
        return None
    try:
        return round(datetime.fromisoformat(text).timestamp() * 1000)
    except (ValueError, OverflowError, OSError) as error:
        raise KnodeError(
            Code.INVALID_ARGUMENT, f"{text[:80]!r} is no time", "give it as 2026-11-22T14:30 or 2026-11-22"
        ) from error
