"""What the leader does with the tasks of the ledger: who runs which attempt, and for how long.

Theory of operation. The ledger alone says what is queued and what is assigned, so a new leader takes over
from `LedgerStore.live`. All else here is soft: which worker has accepted its attempt, when each member was
last here, who was chosen for proposals on their way. Whatever is done twice, by two leaders or after a loss,
is harmless: assigning repeats a fence, and the ledger refuses stale commands.

One task decides (`_decide`), woken by changes of the ledger, by members that come, by time. Every proposal
and every message to a worker is a task of its own; there are at most as many as places for attempts.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import trio

from knode.consensus.messages import MAX_COMMAND_BYTES
from knode.consensus.replica import Replica
from knode.errors import UNANSWERED, Code, KnodeError
from knode.klp.codec import encode
from knode.mesh.conversation import Conversation
from knode.mesh.liveness import PeerState
from knode.mesh.membership import Membership
from knode.mesh.peer import Peer
from knode.mesh.peers import Peers
from knode.mesh.roster import Member
from knode.tasks.candidates import Candidates
from knode.tasks.commands import (
    Assign,
    Assignment,
    Command,
    Expire,
    Fence,
    Forget,
    NewTask,
    Release,
)
from knode.tasks.forgetting import FORGOTTEN_AT_ONCE, KEPT_OPERATIONS_MS, KEPT_TASKS, is_crowded
from knode.tasks.lifecycle import State
from knode.tasks.messages import AssignAttempt, AttemptReport, Report, StopAttempt
from knode.tasks.pace import Pace
from knode.tasks.queue import Need, Queue
from knode.tasks.records import Change, LedgerTask, Outcome
from knode.tasks.routing import RUNNING_ROLES, Route, Work, demand_ever, route
from knode.tasks.store import LedgerStore
from knode.tasks.workers import Workers
from knode.world import Log, Monotonic, World

LEASE_S = 5.0
LOOK_EVERY_S = 0.5
"""How often it looks whether members are here while they have attempts."""
COMMIT_S = 5.0
FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 2.0
REFUSED_FOR_S = 5.0
"""How long a worker may take another for the leader, or an attempt for over, before that counts."""
EXPIRED_AT_ONCE = 1024
FORGET_EVERY_S = 600.0
FORGET_SOON_S = 10.0
"""When too much is kept."""
STOPS = 3
SPARE_DEADLINES = 1024
"""Of tasks that have ended, and of the rest twice as many: kept before they are cleared away."""
PUT_OFF_MS = 500
"""How long a task waits after a proposal for it has failed."""

_ASK_AGAIN_AT_FIRST = frozenset({Code.NOT_ALLOWED, Code.STALE_FENCE})


@dataclass(eq=False)
class _Assigned:
    """An attempt that the ledger has assigned."""

    fence: Fence
    member: bytes
    scope: trio.CancelScope
    boot: bytes | None = None
    """Which process of its worker has accepted it."""
    is_released: bool = False
    """Whether its release is proposed."""
    refusal: str | None = None
    """Why its worker does not take it: it is released, and again until that is committed."""
    reports: int = 0
    report: Report | None = None


class Dispatcher:
    """Gives the tasks of the ledger to members, while this node leads."""

    def __init__(
        self,
        world: World,
        membership: Membership,
        peers: Peers,
        replica: Replica,
        store: LedgerStore,
        candidates: Candidates,
        workers: Workers,
        log: Log,
    ) -> None:
        self._world = world
        self._membership = membership
        self._replica = replica
        self._store = store
        self._candidates = candidates
        self._workers = workers
        self._log = log
        self._queue = Queue()
        self._assigned: dict[bytes, _Assigned] = {}
        self._deadlines: list[tuple[int, bytes]] = []
        self._reserved: Counter[bytes] = Counter()
        """Attempts of each member: assigned, or proposed to be."""
        self._paces: defaultdict[bytes, Pace] = defaultdict(Pace)
        self._here_at: dict[bytes, float] = {}
        self._forgot_at = 0.0
        self._is_forgetting = False
        self._woken = trio.Event()
        self._wakes_at = 0.0
        """Until when the task that decides sleeps, unless it is woken."""
        self._nursery: trio.Nursery | None = None
        store.on_change.append(self._follow)
        replica.on_leader.append(self._wake)
        peers.on_conversation.append(self._greet)
        membership.changed.append(lambda _: self._wake())

    @property
    def leads(self) -> bool:
        """Whether this node leads, and has taken over."""
        return self._nursery is not None and self._replica.is_leader

    async def run(self) -> None:
        """Dispatch whenever this node leads, until cancelled."""
        while True:
            woken = self._woken = trio.Event()
            if self._replica.is_leader:
                await self._lead()
            else:
                await woken.wait()

    async def _lead(self) -> None:
        self._take_over()
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                for task in self._store.live.values():
                    self._place(task)
                await self._decide()
            finally:
                # Not after the nursery: once its last task has ended it takes no other, and what is
                # applied before this task goes on would be refused.
                self._nursery = None
            nursery.cancel_scope.cancel()

    def _take_over(self) -> None:
        now = self._world.clock.monotonic()
        self._queue, self._assigned, self._deadlines = Queue(), {}, []
        self._reserved.clear()
        self._paces.clear()
        self._here_at = {member.id.raw: now for member in self._membership.roster.members.values()}
        self._forgot_at = now

    # What others of this node ask.

    def now(self) -> int:
        """Return the time that a command carries."""
        return self._store.time()

    async def propose(self, command: Command) -> Outcome:
        """Have a command committed, and return what it did.

        Raises:
            KnodeError: TOO_LARGE; else as `Replica.propose`.
        """
        data = encode(command)
        if len(data) > MAX_COMMAND_BYTES:
            raise KnodeError(
                Code.TOO_LARGE,
                f"with its files' names it has {len(data)} bytes; at most {MAX_COMMAND_BYTES} fit",
                "pass less as input, or fewer files",
            )
        deadline = Monotonic(self._world.clock.monotonic() + COMMIT_S)
        outcome: Outcome = await self._replica.propose(data, deadline=deadline)
        return outcome

    def check(self, work: Work) -> None:
        """Check that somebody could run this, now or later.

        Raises:
            KnodeError: NO_ELIGIBLE_NODE; NOT_FOUND when the node that must run it is no member.
        """
        candidates = self._candidates.everyone()
        asked = candidates.get(work.on)
        # Of a node that was away since this one started nobody knows which agents it has.
        if asked is None or asked.state is PeerState.ALIVE or asked.agents or asked.role not in RUNNING_ROLES:
            demand_ever(candidates, work)

    def assign(self, work: Work) -> Assignment | None:
        """Choose who runs a task now, and keep the place until `unassign`; None when nobody has one free."""
        assignment = self.route(work).assignment
        if assignment is not None:
            self._reserved[assignment.member] += 1
        return assignment

    def unassign(self, assignment: Assignment | None) -> None:
        """Free the place again: the ledger holds it now, or never will."""
        if assignment is not None:
            self._free(assignment.member)
            if len(self._queue):
                self._wake()

    def route(self, work: Work) -> Route:
        """Return who would run a task now, with the score of every member or why it cannot."""
        now = self._world.clock.monotonic()
        candidates = {
            id: replace(candidate, capacity=self._paces[id].room(candidate.capacity, now))
            for id, candidate in self._candidates.everyone().items()
        }
        return route(candidates, work, self._reserved)

    def report_of(self, task: bytes) -> tuple[int, Report | None]:
        """Return how many reports a task's attempt has made, and the latest."""
        assigned = self._assigned.get(task)
        return (0, None) if assigned is None else (assigned.reports, assigned.report)

    def take_report(self, member: Member, report: AttemptReport) -> bool:
        """Take how far an attempt is; return whether it is one of that member's."""
        assigned = self._assigned.get(report.fence.task)
        if assigned is None or (assigned.fence, assigned.member) != (report.fence, member.id.raw):
            return False
        assigned.reports += 1
        assigned.report = report.report
        return True

    # Following the ledger.

    def _follow(self, changes: Sequence[Change]) -> None:
        if self._nursery is None:
            return
        for change in changes:
            task = change.after
            assigned = self._assigned.get(change.id)
            if assigned is not None and not _is_at(task, assigned.fence):
                self._let_go(change.id, assigned, task)
            if task is None or task.state.final:
                self._queue.remove(change.id)
            else:
                self._place(task, change.asked)
        if len(self._queue) or self._world.clock.monotonic() + self._pause_s() < self._wakes_at:
            self._wake()

    def _place(self, task: LedgerTask, asked: NewTask | None = None) -> None:
        """Take up a task that has not ended."""
        assert self._nursery is not None
        self._note_deadline(task)
        if task.state is State.QUEUED:
            self._queue.add(task)
            return
        self._queue.remove(task.id)
        if task.id not in self._assigned:
            assigned = self._assigned[task.id] = _Assigned(task.fence, task.member, trio.CancelScope())
            self._reserved[task.member] += 1
            self._paces[task.member].begin(task.id, self._world.clock.monotonic())
            self._nursery.start_soon(self._hand_over, task, assigned, asked)

    def _note_deadline(self, task: LedgerTask) -> None:
        live = self._store.live
        heapq.heappush(self._deadlines, (task.deadline, task.id))
        if len(self._deadlines) > 2 * len(live) + SPARE_DEADLINES:
            self._deadlines = sorted((task.deadline, task.id) for task in live.values())

    def _let_go(self, id: bytes, assigned: _Assigned, task: LedgerTask | None) -> None:
        assert self._nursery is not None
        del self._assigned[id]
        self._free(assigned.member)
        is_done = task is not None and task.state in (State.SUCCEEDED, State.FAILED)
        self._paces[assigned.member].end(id, self._world.clock.monotonic(), is_done=is_done)
        assigned.scope.cancel()
        if task is None or task.state in (State.CANCELLED, State.EXPIRED, State.QUEUED):
            self._nursery.start_soon(self._stop, assigned)

    def _free(self, member: bytes) -> None:
        self._reserved[member] -= 1
        if self._reserved[member] <= 0:  # below: it was reserved when this node led before
            del self._reserved[member]

    def _greet(self, peer: Peer, conversation: Conversation) -> None:
        """Give a worker that has started anew what it has to run."""
        self._wake()
        if self._nursery is None:
            return
        member = self._membership.roster.members.get(peer.key.raw)
        boot = conversation.established.peer_boot
        for assigned in list(self._assigned.values()):
            if member is not None and assigned.member == member.id.raw and assigned.boot not in (None, boot):
                assigned.boot, assigned.scope = None, trio.CancelScope()
                self._nursery.start_soon(self._hand_over, self._store.live[assigned.fence.task], assigned)

    def _wake(self) -> None:
        self._woken.set()

    # Deciding.

    async def _decide(self) -> None:
        while self._replica.is_leader:
            woken = self._woken = trio.Event()
            self._lose_leases()
            self._expire()
            self._queue.advance(self.now())
            for need in self._queue.needs():
                self._assign_all(need)
            self._forget_old()
            self._wakes_at = self._world.clock.monotonic() + self._pause_s()
            with trio.move_on_at(self._wakes_at):
                await woken.wait()

    def _pause_s(self) -> float:
        times = [self._queue.next_at, self._deadlines[0][0] if self._deadlines else None]
        now = self.now()
        pause_s = min(
            (max(0.001, (at - now) / 1000) for at in times if at is not None), default=FORGET_EVERY_S
        )
        pause_s = min(pause_s, self._forget_every_s)
        return min(pause_s, LOOK_EVERY_S) if self._assigned or len(self._queue) else pause_s

    def _assign_all(self, need: Need) -> None:
        """Give the tasks with this need away, as long as somebody has a free place."""
        assert self._nursery is not None
        while (task := self._queue.first(need)) is not None:
            assignment = self.assign(work_of(task))
            if assignment is None:
                return
            self._queue.remove(task.id)
            self._nursery.start_soon(self._propose_assignment, task, assignment)

    async def _propose_assignment(self, task: LedgerTask, assignment: Assignment) -> None:
        try:
            outcome = await self._try(Assign(self.now(), task.id, assignment))
        finally:
            self.unassign(assignment)
        now = self._store.live.get(task.id)
        if (outcome is None or outcome.code is not None) and now is not None and now.state is State.QUEUED:
            self._queue.add(now, self.now() + PUT_OFF_MS)
            self._wake()

    # Leases and time.

    def _lose_leases(self) -> None:
        now = self._world.clock.monotonic()
        members = {member.id.raw: member for member in self._membership.roster.members.values()}
        for id, member in members.items():
            if self._workers.state(member) is PeerState.ALIVE:
                self._here_at[id] = now
        for assigned in list(self._assigned.values()):
            holder = members.get(assigned.member)
            if assigned.refusal is not None:
                self._release(assigned, assigned.refusal, charged=False)
            elif holder is None:
                self._release(assigned, "its node is no member any more", charged=False)
            elif self._workers.state(holder) is PeerState.LEFT:
                self._release(assigned, f"{holder.name} was stopped", charged=False)
            elif now - self._here_at.setdefault(assigned.member, now) > LEASE_S:
                self._release(assigned, f"{holder.name} was not heard for {LEASE_S:g} s", charged=True)

    def _release(self, assigned: _Assigned, why: str, *, charged: bool) -> None:
        if self._nursery is not None and not assigned.is_released:
            assigned.is_released = True
            self._nursery.start_soon(self._propose_release, assigned, why, charged)

    async def _propose_release(self, assigned: _Assigned, why: str, charged: bool) -> None:
        fence = assigned.fence
        self._log.info("attempt lost", task=fence.task.hex(), attempt=fence.attempt, why=why)
        if await self._try(Release(self.now(), fence, charged, why)) is None:
            await trio.sleep(LONGEST_PAUSE_S)
            assigned.is_released = False

    def _expire(self) -> None:
        assert self._nursery is not None
        now, due = self.now(), list[bytes]()
        while self._deadlines and self._deadlines[0][0] <= now and len(due) < EXPIRED_AT_ONCE:
            _, id = heapq.heappop(self._deadlines)
            if id in self._store.live:
                due.append(id)
        if due:
            self._nursery.start_soon(self._propose_expiry, tuple(dict.fromkeys(due)))

    async def _propose_expiry(self, due: tuple[bytes, ...]) -> None:
        outcome = await self._try(Expire(self.now(), due))
        if outcome is not None and outcome.code is not None and len(due) > 1:
            for id in due:  # a fault that one of them causes must not keep the others
                await self._propose_expiry((id,))
        elif outcome is None:
            for id in due:
                heapq.heappush(self._deadlines, (self.now() + PUT_OFF_MS, id))

    @property
    def _forget_every_s(self) -> float:
        return FORGET_SOON_S if is_crowded(self._store.totals) else FORGET_EVERY_S

    def _forget_old(self) -> None:
        """From time to time, and while there is more, forget old tasks and operations."""
        now = self._world.clock.monotonic()
        if now - self._forgot_at >= self._forget_every_s and not self._is_forgetting:
            assert self._nursery is not None
            self._forgot_at, self._is_forgetting = now, True
            self._nursery.start_soon(self._propose_forgetting)

    async def _propose_forgetting(self) -> None:
        try:
            while await self._has_old():
                outcome = await self._try(Forget(self.now()))
                if outcome is not None and outcome.count:
                    self._log.info("old tasks and operations forgotten", count=outcome.count)
                if outcome is None or outcome.count < FORGOTTEN_AT_ONCE // 2:
                    break
        finally:
            self._is_forgetting = False

    async def _has_old(self) -> bool:
        totals = self._store.totals
        if totals.kept > KEPT_TASKS or is_crowded(totals):
            return True
        try:
            return await self._store.has_operations_before(self.now() - KEPT_OPERATIONS_MS)
        except KnodeError as error:
            self._log.error("old operations cannot be looked for", why=str(error))
            return False

    async def _try(self, command: Command) -> Outcome | None:
        """Propose; return None when nobody can say what came of it."""
        try:
            return await self.propose(command)
        except KnodeError as error:
            self._log.debug("not proposed", command=type(command).__name__, code=error.code, why=str(error))
            return None

    # Talking to workers.

    async def _hand_over(self, task: LedgerTask, assigned: _Assigned, asked: NewTask | None = None) -> None:
        """Have the worker accept its attempt; stop when the ledger says that it is over."""
        with assigned.scope:
            if asked is None and (asked := await self._read(assigned)) is None:
                return
            refused_at, pause_s = None, FIRST_PAUSE_S
            while True:
                request = AssignAttempt(
                    fence=assigned.fence,
                    agent=asked.agent,
                    input=asked.input,
                    files=asked.files,
                    holders=task.holders,
                    remaining_ms=max(1, task.deadline - self.now()),
                    token=task.id.hex(),
                )
                changed = self._workers.next_change(assigned.member)
                try:
                    assigned.boot = await self._workers.send(assigned.member, request)
                    return
                except KnodeError as error:
                    now = self._world.clock.monotonic()
                    refused_at = refused_at or now
                    is_early = now - refused_at < REFUSED_FOR_S
                    if error.code not in UNANSWERED and not (error.code in _ASK_AGAIN_AT_FIRST and is_early):
                        assigned.refusal = f"{error.code}: {error.message}"[:500]
                        self._wake()
                        return
                with trio.move_on_after(pause_s):
                    await changed.wait()
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def _read(self, assigned: _Assigned) -> NewTask | None:
        """Return what is asked for; None when it has ended, or is to be released since it cannot be read."""
        id = assigned.fence.task
        try:
            record = await self._store.task(id)
        except KnodeError as error:
            self._log.error("a task cannot be read", task=id.hex(), why=str(error))
            assigned.refusal = f"{error.code}: the leader cannot read it"
            self._wake()
            return None
        return None if record is None else record.asked

    async def _stop(self, assigned: _Assigned) -> None:
        """Tell a worker that its attempt is not wanted; what it does nevertheless takes no effect."""
        for _ in range(STOPS):
            try:
                await self._workers.send(assigned.member, StopAttempt(assigned.fence))
                return
            except KnodeError as error:
                if error.code not in _ASK_AGAIN_AT_FIRST | UNANSWERED:
                    self._log.warning(
                        "an attempt was not stopped", task=assigned.fence.task.hex(), why=str(error)
                    )
                    return
            await trio.sleep(LONGEST_PAUSE_S)


def _is_at(task: LedgerTask | None, fence: Fence) -> bool:
    return task is not None and task.state is State.ASSIGNED and task.fence == fence


def work_of(task: LedgerTask) -> Work:
    """Return what matters of a task to who runs it."""
    return Work(task.id, task.agent, task.on, task.holders if task.file_bytes else ())
