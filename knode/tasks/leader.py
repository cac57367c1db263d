"""Asking whoever leads the cell, through changes of leader, and answering as the one who does.

Every question bears being asked twice: a task is submitted under its id, a completion under its fence. So a
question whose answer was lost is asked again, of whoever leads then.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import msgspec
import trio

from knode.consensus.voters import VOTING_ROLES
from knode.errors import UNANSWERED, Code, KnodeError
from knode.identity import PublicKey
from knode.klp.codec import Decoder, encode
from knode.klp.messages import Context
from knode.mesh.liveness import PeerState
from knode.mesh.membership import Membership
from knode.mesh.methods import Call, Methods
from knode.mesh.peers import Peers
from knode.mesh.roster import Member
from knode.tasks.commands import Fence
from knode.tasks.messages import (
    AskAttempt,
    AskFates,
    AttemptReport,
    CancelTask,
    CompleteAttempt,
    Effects,
    Explanation,
    FailAttempt,
    Fates,
    ListEffects,
    ListTasks,
    Settled,
    ShowTask,
    SubmitTask,
    TaskView,
    Views,
    WaitForTasks,
)
from knode.world import Monotonic, World

ASKING_AT_ONCE = 48
"""Questions of this node that another may be answering; it takes 64 of one peer."""
FIND_S = 1.0
"""How long it looks for a leader before it asks itself whether others still take it for a member."""
FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 1.0

B = TypeVar("B", bound=msgspec.Struct)
A = TypeVar("A", bound=msgspec.Struct)

REPORT_TOPIC = "task.progress"
_report: Decoder[AttemptReport] = Decoder(AttemptReport)


class Question(Generic[B, A]):
    """Something that any member may ask of the leader, and how it is answered."""

    def __init__(self, name: str, body: type[B], answer: type[A]) -> None:
        self.name = name
        self.body = body
        self.decoder: Decoder[A] = Decoder(answer)


class Replica(Protocol):
    """What knows who leads: `knode.consensus.replica.Replica`."""

    def leader(self) -> Member | None:
        """Return who leads now, as far as is known here."""
        ...

    async def find_leader(self, *, deadline: Monotonic) -> Member:
        """Return who leads, asking others when it is not known here; UNAVAILABLE."""
        ...

    async def until_leader_changes(self) -> None:
        """Return once another may lead, or after a moment."""
        ...


SUBMIT = Question("task.submit", SubmitTask, TaskView)
CANCEL = Question("task.cancel", CancelTask, TaskView)
SHOW = Question("task.show", ShowTask, TaskView)
LIST = Question("task.list", ListTasks, Views)
WAIT = Question("task.wait", WaitForTasks, Views)
EXPLAIN = Question("task.explain", ShowTask, Explanation)
EFFECTS = Question("task.effects", ListEffects, Effects)
COMPLETE = Question("task.complete", CompleteAttempt, Settled)
FAIL = Question("task.fail", FailAttempt, Settled)
FATES = Question("task.fates", AskFates, Fates)
CURRENT = Question("task.current", AskAttempt, Settled)


@dataclass(frozen=True, slots=True)
class Asked:
    """Who asks the leader, and until when an answer is of use."""

    member: Member
    deadline: Monotonic


class Leader:
    """The leader of the cell, whoever it is."""

    def __init__(
        self, world: World, membership: Membership, peers: Peers, methods: Methods, replica: Replica
    ) -> None:
        self._world = world
        self._membership = membership
        self._peers = peers
        self._methods = methods
        self._replica = replica
        self._handlers: dict[str, Callable[[Asked, Any], Awaitable[Any]]] = {}
        self._places = trio.CapacityLimiter(ASKING_AT_ONCE)
        self.on_report: Callable[[Member, AttemptReport], None] = lambda member, report: None
        """Called with what a member says of an attempt of its, while this node leads or not."""
        peers.on_event(REPORT_TOPIC, self._take_report)

    def answer(self, question: Question[B, A], handle: Callable[[Asked, B], Awaitable[A]]) -> None:
        """Answer a question of every member, this node included, while this node leads."""

        async def answer(call: Call, body: B) -> A:
            member = self._membership.roster.admit(call.caller.raw)
            return await handle(Asked(member, call.deadline), body)

        self._handlers[question.name] = handle
        self._methods.add(question.name, question.body, answer)

    async def ask(self, question: Question[B, A], body: B, *, deadline: Monotonic) -> A:
        """Ask whoever leads, again and again until there is an answer.

        Raises:
            KnodeError: UNAVAILABLE: nobody took the question. UNKNOWN: somebody may have, and what it asks
                for may still be done. KEY_REVOKED, UNKNOWN_PEER: this node is no member, as it or who it
                can reach knows. Else what the leader answered.

        Cancelling leaves open whether it is done.
        """
        _ = self._membership.own  # who is no member (any more) asks for nothing
        pause_s = FIRST_PAUSE_S
        was_asked = False
        while True:
            try:
                until = Monotonic(min(deadline, self._world.clock.monotonic() + FIND_S))
                leader = await self._replica.find_leader(deadline=until)
                return await self._ask(leader, question, body, deadline)
            except KnodeError as error:
                if error.code not in UNANSWERED:
                    raise
                if (refusal := self._shut_out()) is not None:
                    raise refusal from error
                was_asked = was_asked or error.code is not Code.UNAVAILABLE
                left_s = deadline - self._world.clock.monotonic()
                if left_s <= 0:
                    raise _unanswered(error, was_asked=was_asked) from error
            with trio.move_on_after(min(left_s, pause_s * self._world.randomness.uniform(0.75, 1.25))):
                await self._until_another_leads(leader_before=self._replica.leader())
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def may_lead(self, key: PublicKey) -> bool:
        """Tell whether whoever has this key may give this node attempts.

        It leads; or, while nobody is known here to lead, its role is one that may.
        """
        leader = self._replica.leader()
        if leader is not None:
            return leader.key == key
        member = self._membership.roster.members.get(key.raw)
        return member is not None and member.role in VOTING_ROLES

    async def complete(self, request: CompleteAttempt, *, deadline: Monotonic) -> Settled:
        """Tell that an attempt is done; raises as `ask`."""
        return await self.ask(COMPLETE, request, deadline=deadline)

    async def fail(self, request: FailAttempt, *, deadline: Monotonic) -> Settled:
        """Tell that an attempt failed; raises as `ask`."""
        return await self.ask(FAIL, request, deadline=deadline)

    async def is_current(self, fence: Fence, *, deadline: Monotonic) -> bool:
        """Ask whether the ledger still waits for this attempt; raises as `ask`."""
        return (await self.ask(CURRENT, AskAttempt(fence), deadline=deadline)).is_current

    def report(self, report: AttemptReport) -> None:
        """Tell how far an attempt is, if the leader is known and here; reports may get lost."""
        leader = self._replica.leader()
        if leader is None:
            return
        if leader.key == self._membership.key.public:
            self.on_report(leader, report)
        else:
            self._peers.peer(leader.key).send_event(REPORT_TOPIC, encode(report), Context())

    async def _ask(self, leader: Member, question: Question[B, A], body: B, deadline: Monotonic) -> A:
        """Ask this leader once; UNKNOWN when another takes its place meanwhile."""
        if leader.key == self._membership.key.public:
            with trio.move_on_at(deadline):
                answer: A = await self._handlers[question.name](Asked(leader, deadline), body)
                return answer
            raise KnodeError(Code.TIMEOUT, "the leader, this node, did not answer in time")
        answered: list[bytes] = []
        failed: list[KnodeError] = []

        async def ask() -> None:
            try:
                peer = self._peers.peer(leader.key)
                answered.append(await peer.request(question.name, body, deadline=deadline))
            except KnodeError as error:
                failed.append(error)
            nursery.cancel_scope.cancel()

        with trio.move_on_at(deadline):
            async with self._places, trio.open_nursery() as nursery:
                nursery.start_soon(ask)
                await self._until_another_leads(leader)
                nursery.cancel_scope.cancel()
        if answered:
            return question.decoder.decode(answered[0])
        raise failed[0] if failed else KnodeError(Code.UNKNOWN, "the leader was lost while it worked")

    def _shut_out(self) -> KnodeError | None:
        """Return why other members do not take this node for one, when nobody else is here."""
        members = self._peers.members()
        if any(peer.state is PeerState.ALIVE for peer in members):
            return None
        return next((peer.refusal for peer in members if peer.shuts_out), None)

    async def _until_another_leads(self, leader_before: Member | None) -> None:
        """Return when somebody else is known to lead."""
        while (leader := self._replica.leader()) is None or leader == leader_before:
            await self._replica.until_leader_changes()

    def _take_report(self, key: PublicKey, body: bytes) -> None:
        member = self._membership.roster.members.get(key.raw)
        if member is not None:
            self.on_report(member, _report.decode(body))


def _unanswered(last: KnodeError, *, was_asked: bool) -> KnodeError:
    if was_asked:
        return KnodeError(Code.UNKNOWN, f"nobody can say whether it was done: {last.message}")
    return KnodeError(Code.UNAVAILABLE, last.message, last.next_step or "'knode status' shows who is here")
