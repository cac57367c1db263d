"""The attempts of durable tasks on the node that runs them: taken, run, and told until the leader knows.

An attempt is kept on the disk from the answer that accepts it until the leader has answered how it ended,
so it outlives this process. Without an outcome it is run again at the next start, under the same fence and
with the same token; with one it is delivered. A node that is cut off finishes what it accepted and
delivers when it is back. What a stale attempt did takes no effect: the ledger refuses its fence.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

import trio

from knode.agents.runtime import Attempt, Progress, Runner
from knode.errors import Code, KnodeError
from knode.identity import PublicKey
from knode.klp.codec import encode
from knode.mesh.membership import Membership
from knode.mesh.methods import Call, Methods
from knode.tasks.bundle import bundle_of
from knode.tasks.commands import Bundle, Fence
from knode.tasks.failures import failure_of
from knode.tasks.folders import Folders
from knode.tasks.messages import (
    AssignAttempt,
    AttemptReport,
    CompleteAttempt,
    FailAttempt,
    Settled,
    StopAttempt,
)
from knode.tasks.places import Places
from knode.tasks.routing import RUNNING_ROLES
from knode.tasks.work import Outcome, Work
from knode.tasks.worker import report_of
from knode.world import Log, Monotonic, Turns, World

KEPT_ATTEMPTS = 1024
KEPT_BYTES = 64 * 1024 * 1024
"""Of requests and outcomes together; each that runs may still add an outcome of MAX_BUNDLE_BYTES."""
REMEMBERED = 1024
"""Attempts that are over, kept in mind so that a late request does not begin one again."""
ANSWER_S = 20.0
"""How long the leader's answer is waited for."""
ASK_S = 5.0
"""How long an attempt of the last start waits to hear whether it is still wanted."""
FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 5.0
"""Pauses between deliveries that failed: doubled each time, up to the longest, each with jitter."""
DELIVERIES_AT_ONCE = 32
TIDY_EVERY_S = 0.5
"""How often progress is told and the disk tidied."""

_FINAL_REFUSALS = frozenset({Code.BAD_FRAME, Code.INVALID_ARGUMENT, Code.NON_CANONICAL, Code.TOO_LARGE})
"""A completion that is answered so can never be taken: the attempt has failed."""
PATIENCE_S = 60.0
"""How long a completion for which the ledger has no room, or that meets a fault of knode itself, is repeated
before the attempt has failed: room may never come while attempts that wait for it hold the places of those
that would make it."""
_NOT_FOR_LONG = frozenset({Code.INTERNAL, Code.RATE_LIMITED})

Bring = Callable[[AssignAttempt, Path], Awaitable[None]]
"""Put the files of an attempt into a folder; see `knode.tasks.inputs`."""


class Leader(Protocol):
    """Whoever leads now, as this node speaks to it; this node itself, perhaps.

    What waits for an answer finds the leader, waits for one while there is none, and raises KnodeError when
    there is no answer by `deadline`.
    """

    def may_lead(self, key: PublicKey) -> bool:
        """Tell whether a member may give this node attempts and take them away."""
        ...

    async def complete(self, request: CompleteAttempt, *, deadline: Monotonic) -> Settled:
        """Tell that an attempt is done; NOT_ALLOWED when it is another member's."""
        ...

    async def fail(self, request: FailAttempt, *, deadline: Monotonic) -> Settled:
        """Tell that an attempt failed; NOT_ALLOWED when it is another member's."""
        ...

    async def is_current(self, fence: Fence, *, deadline: Monotonic) -> bool:
        """Ask whether the ledger still waits for this attempt."""
        ...

    def report(self, report: AttemptReport) -> None:
        """Tell how far an attempt is, if the leader can be reached now."""
        ...


@dataclass(eq=False, slots=True)
class _Kept:
    """An attempt that this node has accepted, or is about to."""

    request: AssignAttempt
    deadline: Monotonic
    size_bytes: int
    outcome: Outcome | None = None
    is_outcome_kept: bool = False
    """Whether the disk has the outcome."""
    is_old: bool = False
    """Whether it was accepted before this start of the node."""
    is_accepted: bool = False
    answered: trio.Event = field(default_factory=trio.Event)
    """Set once it is accepted or refused."""
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    over: trio.Event = field(default_factory=trio.Event)
    """Set once nothing of it runs and it is forgotten."""


class Attempts:
    """What this node runs for the cell's ledger."""

    def __init__(
        self,
        world: World,
        work: Work,
        runner: Runner,
        places: Places,
        folders: Folders,
        bring: Bring,
        membership: Membership,
        leader: Leader,
        methods: Methods,
        log: Log,
    ) -> None:
        self._world = world
        self._work = work
        self._runner = runner
        self._places = places
        self._folders = folders
        self._bring = bring
        self._membership = membership
        self._leader = leader
        self._log = log
        # In the order in which they were accepted.
        self._kept: dict[Fence, _Kept] = {}
        self._kept_bytes = 0
        self._over: OrderedDict[Fence, None] = OrderedDict()
        self._reports: dict[Fence, Progress] = {}
        self._deliveries = Turns(DELIVERIES_AT_ONCE)
        self._nursery: trio.Nursery | None = None
        membership.changed.append(lambda _: self._follow_roster())
        methods.add("task.assign", AssignAttempt, self._answer_assign)
        methods.add("task.stop", StopAttempt, self._answer_stop)

    def __len__(self) -> int:
        """Return how many attempts are kept: those that run, wait, or are being delivered."""
        return len(self._kept)

    @property
    def kept_bytes(self) -> int:
        """What they and their ends take in memory."""
        return self._kept_bytes

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Go on with what the last start left, then own what is accepted, until cancelled.

        Start it after `Worker.run` has emptied the folder of the attempts.

        Raises:
            KnodeError: as `Work.load`.
        """
        async with trio.open_nursery() as self._nursery:
            try:
                for request, outcome in await self._work.load():
                    self._take_up(request, outcome)
                self._follow_roster()
                task_status.started()
                while True:
                    await trio.sleep(TIDY_EVERY_S)
                    self._tell_progress()
                    await self._tidy()
            finally:
                self._nursery = None

    async def assign(self, request: AssignAttempt) -> None:
        """Accept an attempt: it is kept, and will be run. The same fence again is the same attempt.

        An older attempt of its task is ended first.

        Raises:
            KnodeError: NOT_ALLOWED by this node's role, NO_AGENT, NO_SANDBOX, RATE_LIMITED, DISK_FULL,
                STALE_FENCE when it is over here already or a newer one is here, UNAVAILABLE when this
                node goes down. Then nothing of it runs.

        Cancelled, it may have been accepted or not: ask again.
        """
        self._check_role()
        fence = request.fence
        while (kept := self._kept.get(fence)) is not None:
            if kept.is_accepted:
                return
            await kept.answered.wait()
        if fence in self._over:
            raise _stale("it is over on this node")
        kept = self._kept[fence] = self._new(request)
        try:
            await self._accept(kept)
        except BaseException:
            del self._kept[fence]
            kept.over.set()
            raise
        finally:
            kept.answered.set()

    async def stop(self, fence: Fence) -> None:
        """End an attempt and forget it; return once nothing of it runs. What is not here is ended already."""
        self._remember(fence)
        kept = self._kept.get(fence)
        if kept is not None:
            kept.scope.cancel()
            await kept.over.wait()

    # Accepting.

    async def _accept(self, kept: _Kept) -> None:
        if self._nursery is None:
            raise KnodeError(Code.UNAVAILABLE, "this node goes down", "try another node")
        await self._end_older(kept)
        self._runner.check(kept.request.agent)
        self._check_room()
        self._places.admit()
        try:
            await self._work.accept(kept.request)
            if self._nursery is None:
                raise KnodeError(
                    Code.UNAVAILABLE, "this node goes down", "it may run again at its next start"
                )
        except BaseException:
            self._places.leave()
            raise
        kept.is_accepted = True
        self._kept_bytes += kept.size_bytes
        self._nursery.start_soon(self._carry_out, kept)

    def _take_up(self, request: AssignAttempt, outcome: Outcome | None) -> None:
        """Go on with an attempt of an earlier start."""
        assert self._nursery is not None
        kept = self._kept[request.fence] = self._new(request)
        kept.is_accepted = kept.is_old = True
        kept.answered.set()
        kept.outcome = outcome
        kept.is_outcome_kept = outcome is not None
        if outcome is None:
            self._places.admit_again()
        else:
            kept.size_bytes += len(encode(outcome))
        self._kept_bytes += kept.size_bytes
        self._nursery.start_soon(self._carry_out, kept)

    def _new(self, request: AssignAttempt) -> _Kept:
        # After a restart its whole time again: what the ledger takes for over, it has the leader stop.
        deadline = Monotonic(self._world.clock.monotonic() + request.remaining_ms / 1000)
        return _Kept(request, deadline, len(encode(request)))

    async def _end_older(self, newer: _Kept) -> None:
        fence = newer.request.fence
        for other in [kept for kept in self._kept.values() if kept.request.fence.task == fence.task]:
            theirs = other.request.fence
            if other is newer:
                continue
            if theirs.incarnation == fence.incarnation and theirs.attempt > fence.attempt:
                raise _stale("a newer attempt of its task is here")
            await self.stop(theirs)

    def _check_role(self) -> None:
        role = self._membership.own.role
        if role not in RUNNING_ROLES:
            raise KnodeError(Code.NOT_ALLOWED, f"this node runs no tasks: its role is {role}")

    def _check_room(self) -> None:
        if len(self._kept) > KEPT_ATTEMPTS or self._kept_bytes > KEPT_BYTES:
            raise KnodeError(
                Code.RATE_LIMITED, "too many attempts of this node wait to be delivered", "try another node"
            )

    # Carrying out.

    async def _carry_out(self, kept: _Kept) -> None:
        """See an attempt to its end. It stays kept when the node goes down."""
        fence = kept.request.fence
        with kept.scope:
            if kept.outcome is None:
                try:
                    if not kept.is_old or await self._is_wanted(kept):
                        kept.outcome = await self._outcome(kept)
                finally:
                    self._places.leave()
            if kept.outcome is not None:
                await self._deliver(kept)
        del self._kept[fence]
        self._kept_bytes -= kept.size_bytes
        self._reports.pop(fence, None)
        self._remember(fence)
        self._work.forget(fence)
        kept.over.set()

    async def _is_wanted(self, kept: _Kept) -> bool:
        """Ask the leader about an attempt of an earlier start; it is wanted as long as nobody can say."""
        deadline = Monotonic(self._world.clock.monotonic() + ASK_S)
        try:
            with trio.move_on_at(deadline):
                return await self._leader.is_current(kept.request.fence, deadline=deadline)
        except KnodeError as error:
            self._log.info("attempt begins again unasked", **_fields(kept), why=error.message)
        return True

    async def _outcome(self, kept: _Kept) -> Outcome:
        """Run an attempt to its end."""
        fence, started = kept.request.fence, self._world.clock.monotonic()
        self._log.info("attempt begins", **_fields(kept))
        try:
            outcome: Outcome = CompleteAttempt(fence, await self._run(kept))
        except KnodeError as error:
            outcome = failure_of(fence, error)
        except Exception:
            self._log.error("an attempt failed", **_fields(kept), exc_info=True)
            outcome = failure_of(fence, KnodeError(Code.INTERNAL, "a fault of the node that ran it"))
        seconds = round(self._world.clock.monotonic() - started, 4)
        ended = "succeeded" if isinstance(outcome, CompleteAttempt) else outcome.code
        self._log.info("attempt ended", **_fields(kept), outcome=ended, seconds=seconds)
        return outcome

    async def _run(self, kept: _Kept) -> Bundle:
        request = kept.request
        # No direct task's: those have sixteen bytes.
        name = request.fence.task + request.fence.attempt.to_bytes(2, "big")
        async with self._folders.claim(self._membership.key.public.raw, name, ()) as folder:
            if request.files or not self._runner.is_builtin(request.agent):
                await self._folders.make(name)
            if request.files:
                await self._bring(request, folder / "input")
            attempt = Attempt(
                folder=folder.name,
                input=request.input,
                token=request.token,
                number=request.fence.attempt,
                deadline=kept.deadline,
                files=tuple(folder / "input" / file.name for file in request.files),
            )
            result = await self._places.run(request.agent, attempt, partial(self._note, request.fence))
        return bundle_of(result)

    # Delivering.

    async def _deliver(self, kept: _Kept) -> None:
        """Tell the leader how an attempt ended until it knows."""
        assert kept.outcome is not None
        pause_s = FIRST_PAUSE_S
        refused_at: float | None = None
        while True:
            try:
                settled = await self._tell_and_keep(kept, kept.outcome)
                if not settled.is_current:
                    self._log.info("attempt was stale", **_fields(kept))
                return
            except KnodeError as error:
                self._log.debug("attempt not delivered", **_fields(kept), code=error.code, why=error.message)
                if error.code is Code.NOT_ALLOWED:
                    self._log.warning("attempt was another member's", **_fields(kept), why=error.message)
                    return
                now = self._world.clock.monotonic()
                refused_at = (refused_at or now) if error.code in _NOT_FOR_LONG else None
                is_final = error.code in _FINAL_REFUSALS or (
                    refused_at is not None and now - refused_at > PATIENCE_S
                )
                if isinstance(kept.outcome, CompleteAttempt) and is_final:
                    self._log.warning("the leader takes no such end", **_fields(kept), why=error.message)
                    kept.outcome, kept.is_outcome_kept = failure_of(kept.outcome.fence, error), False
                    continue
            except Exception:
                self._log.error("an attempt could not be delivered", **_fields(kept), exc_info=True)
            await trio.sleep(self._world.randomness.uniform(pause_s / 2, pause_s))
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def _tell_and_keep(self, kept: _Kept, outcome: Outcome) -> Settled:
        """Tell the leader, while the disk takes the outcome for the case that no answer comes."""
        answers: list[Settled] = []
        errors: list[Exception] = []

        async def tell() -> None:
            try:
                async with self._deliveries:
                    answers.append(await self._tell(outcome))
            except Exception as error:
                errors.append(error)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(tell)
            await self._keep_outcome(kept)
        if errors:
            raise errors.pop()
        return answers[0]

    async def _tell(self, outcome: Outcome) -> Settled:
        deadline = Monotonic(self._world.clock.monotonic() + ANSWER_S)
        with trio.move_on_at(deadline):
            if isinstance(outcome, CompleteAttempt):
                return await self._leader.complete(outcome, deadline=deadline)
            return await self._leader.fail(outcome, deadline=deadline)
        raise KnodeError(Code.TIMEOUT, "the leader did not answer in time")

    async def _keep_outcome(self, kept: _Kept) -> None:
        """Keep the outcome on the disk. A disk that takes no more does not keep it from being delivered."""
        if kept.is_outcome_kept:
            return
        assert kept.outcome is not None
        try:
            await self._work.end(kept.outcome)
        except KnodeError as error:
            self._log.warning("an attempt's end is not kept", **_fields(kept), why=str(error))
            return
        kept.is_outcome_kept = True
        kept.size_bytes += len(encode(kept.outcome))
        self._kept_bytes += len(encode(kept.outcome))

    def _note(self, fence: Fence, progress: Progress) -> None:
        self._reports[fence] = progress

    def _tell_progress(self) -> None:
        """Tell the latest of each attempt that had news."""
        reports, self._reports = self._reports, {}
        for fence, progress in reports.items():
            if fence in self._kept:
                self._leader.report(AttemptReport(fence, report_of(progress)))

    async def _tidy(self) -> None:
        try:
            await self._work.flush()
        except KnodeError as error:
            self._log.warning("attempts that are over cannot be removed", why=str(error))

    def _remember(self, fence: Fence) -> None:
        self._over[fence] = None
        if len(self._over) > REMEMBERED:
            self._over.popitem(last=False)

    def _follow_roster(self) -> None:
        """End everything once this node is no member any more."""
        members = self._membership.roster.members if self._membership.in_cell else {}
        if self._membership.key.public.raw not in members:
            for kept in self._kept.values():
                kept.scope.cancel()

    # What the leader asks.

    async def _answer_assign(self, call: Call, request: AssignAttempt) -> None:
        self._check_leader(call.caller)
        await self.assign(request)

    async def _answer_stop(self, call: Call, request: StopAttempt) -> None:
        self._check_leader(call.caller)
        await self.stop(request.fence)

    def _check_leader(self, caller: PublicKey) -> None:
        if not self._leader.may_lead(caller):
            raise KnodeError(Code.NOT_ALLOWED, "only who leads the cell's ledger may ask this")


def _stale(why: str) -> KnodeError:
    return KnodeError(Code.STALE_FENCE, f"the attempt is not to be run any more: {why}")


def _fields(kept: _Kept) -> dict[str, object]:
    fence = kept.request.fence
    return {"task": fence.task.hex(), "attempt": fence.attempt, "agent": kept.request.agent}
