"""One replica at work: the core, its log on disk and the state machine, without the network.

Theory of operation. Four tasks; what they share, the core too, each touches between two of its awaits only:

- the owner gives the core what has come in, and takes what is to be done; another ticks it;
- the disk task makes that durable, in order. While the disk works the owner goes on, so whatever comes
  meanwhile shares the next sync;
- the apply task applies what is committed, in order and in batches, then tells who waits for it, and from
  time to time lets go of the old part of the log.

A full disk is no failure: the replica stands still until there is room. What comes in is dropped, as by a
network, so others elect another leader and nothing grows here. A failed sync or damage is one: it ends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import trio

from knode.consensus.backlog import Backlog
from knode.consensus.inbox import Inbox, share_of
from knode.consensus.installation import DISK_TAKES_NOTHING, Installation, Received
from knode.consensus.journal import Journal
from knode.consensus.messages import (
    MAX_COMMAND_BYTES,
    Configuration,
    Entry,
    HardState,
    Index,
    Message,
    Snapshot,
)
from knode.consensus.proposals import Promise, Proposals
from knode.consensus.raft import Raft
from knode.consensus.ready import Position, Ready, Role
from knode.consensus.refusals import ChangeInProgress, NotLeader, NotVoter, QueueFull, Transferring
from knode.consensus.state_machine import StateMachine
from knode.errors import Code, KnodeError
from knode.world import Log, Monotonic, Turns, World

T = TypeVar("T")

TICK_S = 0.1
INBOX_MESSAGES = 1024
INBOX_BYTES = 6 * 1024 * 1024
"""What of one replica waits to be taken in: more than a leader has under way to a follower."""
WAITING_READIES = 1024
"""So many wait for the disk at once; more, and the replica stands still until it has caught up."""
UNAPPLIED_BYTES = 32 * 1024 * 1024
"""As much waits to be applied; more, and the replica stands still."""
PROPOSALS = 16 * 1024
APPLIED_AT_ONCE = 1024
APPLIED_AT_ONCE_BYTES = 1024 * 1024
AGAIN_S = 1.0
"""How long a disk that takes nothing is left alone."""


class Driver:
    """Drives one core. Make it with what the disk held, then `run` it once."""

    def __init__(
        self,
        world: World,
        raft: Raft,
        journal: Journal,
        state_machine: StateMachine,
        backlog: Backlog,
        installation: Installation,
        log: Log,
    ) -> None:
        self.raft = raft
        self.dropped = 0
        """How many messages were not taken, since too many waited or the disk took nothing."""
        self.on_applied: list[Callable[[Sequence[Entry], Sequence[Any]], None]] = []
        """Called with each batch that was applied and its outcomes; must not raise."""
        self.on_leader: list[Callable[[], None]] = []
        """Called whenever this replica begins or ceases to be the leader; must not raise."""
        self.changed = trio.Event()
        """Set, and replaced, whenever another leads, as far as is known here, or none."""
        self._world = world
        self._journal = journal
        self._state_machine = state_machine
        self._applied = raft.snapshot_at(raft.applied)
        """What the state stands for; its configuration is not kept up."""
        self._backlog = backlog
        self._installation = installation
        self._log = log
        self._send: Callable[[Sequence[Message]], None] = lambda messages: None
        self._work = trio.Event()
        self._inbox: Inbox[Message] = Inbox(INBOX_MESSAGES, INBOX_BYTES)
        self._received: Received | None = None
        self._undurable: deque[tuple[Ready, Received | None]] = deque()
        self._disk_work = trio.Event()
        self._disk_is_idle = True
        self._hard_state: HardState | None = None
        """With the latest commit index, when that is not in the log."""
        self._journal_turn = Turns()
        self._unapplied: deque[Entry] = deque()
        self._unapplied_bytes = 0
        self._apply_work = trio.Event()
        self._state_turn = Turns()
        self._dump_turn = Turns()
        self._advanced = trio.Event()
        self._proposals = Proposals()
        self._reads: dict[int, Promise[Index]] = {}
        self._next_read: Promise[Index] | None = None
        self._seen = (raft.leader, raft.term, False)
        self._troubles: dict[str, KnodeError] = {}
        self._compact_at = world.clock.monotonic()
        self._failure: KnodeError | None = None
        self._scope = trio.CancelScope()
        self._ended = False

    async def run(self, send: Callable[[Sequence[Message]], None]) -> None:
        """Work until cancelled, or until the disk has failed; then close the log.

        Args:
            send: takes messages for other replicas, and may lose any; must not raise.

        Raises:
            KnodeError: why this replica must not speak any more.

        Cancelling waits for what the disk does now. Proposals that wait end with UNKNOWN.
        """
        self._send = send
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    for task in (self._own, self._tick, self._persist, self._apply):
                        nursery.start_soon(self._until_failure, task)
        finally:
            self._ended = True
            self._proposals.end("this node stopped taking part")
            self._fail_reads()
            if self._received is not None:
                self._received.settled.set()
            self._was_applied()
            with trio.CancelScope(shield=True):
                await self._world.blocking.run(self._journal.close)
        if self._failure is not None:
            raise self._failure

    async def aclose(self) -> None:
        """Close the log of one that was never run."""
        self._ended = True
        await self._world.blocking.run(self._journal.close)

    def fail(self, error: KnodeError) -> None:
        """End, for this reason."""
        self._failure = self._failure or error
        self._scope.cancel()

    # What others ask of it. Nothing here waits for the disk, but for `value` of what is returned.

    @property
    def trouble(self) -> KnodeError | None:
        """Why the disk takes nothing now; None: it does."""
        return next(iter(self._troubles.values()), None)

    @property
    def is_leader(self) -> bool:
        """Whether it leads, and has applied all that was committed before it did."""
        leads = self.raft.role is Role.LEADER and not self._troubles and not self._ended
        return leads and self._applied.term == self.raft.term

    @property
    def applied(self) -> Index:
        """The last index that is applied here."""
        return self._applied.index

    def receive(self, message: Message, size_bytes: int) -> None:
        """Take a message of another replica, or drop it: too many of it wait, or the disk takes nothing."""
        share = share_of(self.raft.configuration, message.source)
        if self._stands_still or self._ended or not self._inbox.put(share, message, size_bytes):
            self.dropped += 1
            return
        self._work.set()

    async def install(self, received: Received) -> None:
        """Let the core decide on a state that has arrived; return when it is in use, or not wanted.

        What the core accepts is installed, and its file then removed, even when the caller is cancelled.
        """
        assert self._received is None, "one at a time"
        self._check_running()
        self._received = received
        self._work.set()
        try:
            await received.settled.wait()
        finally:
            self._received = None

    def propose(self, command: bytes) -> tuple[Position, Promise[Any]]:
        """Append a command, if this is the leader; the promise is its outcome here. `forget` it later.

        Raises:
            KnodeError: UNAVAILABLE, RATE_LIMITED, TOO_LARGE; nothing was proposed.
        """
        if len(command) > MAX_COMMAND_BYTES:
            raise KnodeError(Code.TOO_LARGE, f"a command has at most {MAX_COMMAND_BYTES // 1024} KiB")
        assert command, "an empty command is the leader's own"
        self._check_working()
        if len(self._proposals) >= PROPOSALS:
            raise KnodeError(Code.RATE_LIMITED, f"{PROPOSALS} proposals wait already", "try again later")
        position = _asked(partial(self.raft.propose, command))
        promise = self._proposals.add(position)
        self._work.set()
        return position, promise

    def forget(self, position: Position) -> None:
        """Wait no longer for what becomes of a proposal."""
        self._proposals.forget(position)

    def read(self) -> Promise[Index]:
        """Ask which index must be applied so that the state shows all that is committed now.

        All who ask in one turn of the owner share one question to the quorum.

        Raises:
            KnodeError: UNAVAILABLE when this is not the leader; the promise fails so when it ceases to be.
        """
        self._check_working()
        if self.raft.role is not Role.LEADER:
            raise not_leader()
        if self._next_read is None:
            self._next_read = Promise()
            self._work.set()
        return self._next_read

    def change(self, target: Configuration) -> Position:
        """Begin to change the configuration; raises UNAVAILABLE when this is not the leader or changes it."""
        self._check_working()
        position = _asked(partial(self.raft.change, target))
        self._work.set()
        return position

    def transfer(self, to: bytes) -> None:
        """Let another voter lead, if it can; raises UNAVAILABLE when this is not the leader."""
        self._check_working()
        _asked(partial(self.raft.transfer, to))
        self._work.set()

    def lost(self, replica: bytes) -> None:
        """Take note that the last link to a replica's node has ended."""
        if not self._ended:
            self.raft.lost(replica)
            self._work.set()

    def snapshot_failed(self, replica: bytes) -> None:
        """Take note that a state did not reach its replica."""
        if not self._ended:
            self.raft.snapshot_failed(replica)
            self._work.set()

    async def until_applied(self, index: Index) -> None:
        """Wait until an index is applied here."""
        while self.applied < index:
            self._check_running()
            await self._advanced.wait()

    async def dump(self, path: Path) -> Snapshot:
        """Write the state to a new file; return what it stands for.

        Entries are applied meanwhile, and the log is not compacted.

        Raises:
            KnodeError: DISK_FULL, DISK_READ_ONLY; UNAVAILABLE when it was replaced or is about to be.
        """
        async with self._dump_turn:
            index = await self._state_machine.dump(path)
            if index < self.raft.first_index - 1:
                raise KnodeError(Code.UNAVAILABLE, "a newer state takes the place of this one")
            return self.raft.snapshot_at(index)

    # The owner.

    @property
    def _stands_still(self) -> bool:
        return (
            bool(self._troubles)
            or len(self._undurable) >= WAITING_READIES
            or self._unapplied_bytes > UNAPPLIED_BYTES
        )

    async def _own(self) -> None:
        self._advance()
        while True:
            await self._work.wait()
            self._work = trio.Event()
            self._take_in()

    async def _tick(self) -> None:
        clock = self._world.clock
        tick_at = clock.monotonic() + TICK_S
        while True:
            await trio.sleep_until(tick_at)
            # After a sleep of the machine the time that it took is not made up for.
            tick_at = Monotonic(max(tick_at + TICK_S, clock.monotonic() + TICK_S / 2))
            self._take_in()  # what came before the tick counts before it
            if not self._stands_still:
                self.raft.tick()
                self._advance()

    def _take_in(self) -> None:
        """Give the core what has come in, and take what is to be done."""
        if self._stands_still:
            self.dropped += len(self._inbox)
            self._inbox.clear()
            return
        while self._inbox:
            self.raft.receive(self._inbox.take())
        self._ask_next_read()
        self._advance()
        self._consider_received()

    def _ask_next_read(self) -> None:
        promise, self._next_read = self._next_read, None
        if promise is None:
            return
        try:
            self._reads[_asked(self.raft.read)] = promise
        except KnodeError as error:
            promise.fail(error)

    def _consider_received(self) -> None:
        """Show the core a state that has arrived; what it does not install is not wanted."""
        received = self._received
        if received is not None and not received.is_considered:
            received.is_considered = True
            self.raft.receive(received.message)
            self._advance(received)
            if not received.is_accepted:
                received.settled.set()

    def _advance(self, received: Received | None = None) -> None:
        """Take what is to be done, until nothing is; send at once what may go, and queue the rest."""
        while (ready := self.raft.ready()) is not None:
            self._send(ready.messages)
            if ready.snapshot is not None:
                assert received is not None
                assert ready.snapshot == received.message.snapshot
                received.is_accepted = True
            if self._disk_is_idle and not self._undurable and not ready.must_sync:
                self._hard_state = ready.hard_state or self._hard_state
                self._was_persisted(ready)
            else:
                self._undurable.append((ready, received if ready.snapshot is not None else None))
                self._disk_work.set()
            for entry in ready.committed:
                self._unapplied.append(entry)
                self._unapplied_bytes += len(entry.data)
                self._apply_work.set()
            for read in ready.reads:
                promise = self._reads.pop(read.number, None)
                if promise is not None:
                    promise.keep(read.index)
        self._notice_leader()

    def _notice_leader(self) -> None:
        before, self._seen = self._seen, (self.raft.leader, self.raft.term, self.is_leader)
        if self._seen == before:
            return
        if self.raft.role is not Role.LEADER or self._seen[1] != before[1]:
            self._fail_reads()
        self.changed.set()
        self.changed = trio.Event()
        if self._seen[2] != before[2]:
            for tell in self.on_leader:
                tell()

    def _fail_reads(self) -> None:
        if self._next_read is not None:
            self._next_read.fail(not_leader())
            self._next_read = None
        for promise in self._reads.values():
            promise.fail(not_leader())
        self._reads.clear()

    # The disk task.

    async def _persist(self) -> None:
        while True:
            if not self._undurable:
                self._disk_work = trio.Event()
                await self._disk_work.wait()
                continue
            self._disk_is_idle = False
            async with self._journal_turn:
                batch = self._next_batch()
                first, received = batch[0]
                if received is not None:
                    await self._install(first, received)
                else:
                    await self._append([ready for ready, _ in batch])
            self._disk_is_idle = True
            for ready, _ in batch:
                self._was_persisted(ready)
            self._advance()

    def _next_batch(self) -> list[tuple[Ready, Received | None]]:
        """Take what waits for the disk, up to a snapshot; or that alone."""
        batch = [self._undurable.popleft()]
        while batch[0][1] is None and self._undurable and self._undurable[0][1] is None:
            batch.append(self._undurable.popleft())
        return batch

    def _was_persisted(self, ready: Ready) -> None:
        self.raft.persisted(ready)
        self._send(ready.messages_after)

    async def _append(self, batch: Sequence[Ready]) -> None:
        """Make it durable with one sync. How far commits go is written when something else is."""
        left = deque[tuple[HardState | None, tuple[Entry, ...]]]()
        for ready in batch:
            self._hard_state = ready.hard_state or self._hard_state
            if ready.must_sync:
                left.append((self._hard_state, ready.entries))
                self._hard_state = None

        def write() -> None:
            while left:
                self._journal.append(*left[0], sync=len(left) == 1)
                left.popleft()

        if left:
            await self._persevere("log", partial(self._world.blocking.run, write))

    async def _install(self, ready: Ready, received: Received) -> None:
        """Let state and log begin anew."""
        assert ready.snapshot is not None
        snapshot = ready.snapshot
        async with self._state_turn:
            assert ready.hard_state is not None
            work = partial(self._installation.install, received, ready.hard_state)
            await self._persevere("snapshot", work)
            self._applied, self._backlog = snapshot, Backlog(snapshot.index)
        self._hard_state = None
        if ready.entries:
            await self._append([ready])
        self._proposals.skip(snapshot.index)
        received.settled.set()
        self._was_applied()
        self._log.info("ledger installed from the leader's", index=snapshot.index)

    # The apply task.

    async def _apply(self) -> None:
        while True:
            if not self._unapplied:
                self._apply_work = trio.Event()
                await self._apply_work.wait()
                continue
            async with self._state_turn:
                batch = self._next_entries()
                entries = [entry for entry in batch if entry.index > self.applied]
                outcomes: list[Any] = []
                if entries:
                    work = partial(self._state_machine.apply, entries)
                    outcomes = await self._persevere("ledger", work)
                    self._applied = Snapshot(entries[-1].index, entries[-1].term)
                    self._backlog.extend(entries)
            self._unapplied_bytes -= sum(len(entry.data) for entry in batch)
            if entries:
                self.raft.applied_to(entries[-1].index)
                for tell in self.on_applied:
                    tell(entries, outcomes)
                self._proposals.settle(entries, outcomes)
                self._was_applied()
            await self._compact()

    def _next_entries(self) -> list[Entry]:
        batch = [self._unapplied.popleft()]
        size_bytes = len(batch[0].data)
        while self._unapplied and len(batch) < APPLIED_AT_ONCE:
            size_bytes += len(self._unapplied[0].data)
            if size_bytes > APPLIED_AT_ONCE_BYTES:
                break
            batch.append(self._unapplied.popleft())
        return batch

    def _was_applied(self) -> None:
        self._advanced.set()
        self._advanced = trio.Event()
        self._notice_leader()

    async def _compact(self) -> None:
        """Let go of a long log, as far as the state machine holds it durably, but for the latest entries.

        A disk that takes nothing now is asked again later; so is a state machine that is being dumped, for
        which one would wait.
        """
        now = self._world.clock.monotonic()
        if not self._backlog.is_long or now < self._compact_at or self._dump_turn.locked():
            return
        async with self._dump_turn, self._state_turn, self._journal_turn:
            try:
                index = min(await self._state_machine.sync(), self._backlog.unneeded())
                if index >= self.raft.first_index:
                    snapshot = self.raft.snapshot_at(index)
                    await self._world.blocking.run(partial(self._journal.compact, snapshot))
                    self._backlog.forget(index)
                    self.raft.compact(snapshot)
            except KnodeError as error:
                if error.code not in DISK_TAKES_NOTHING:
                    raise
                self._log.warning("the log is not compacted", why=str(error))
                self._compact_at = Monotonic(now + AGAIN_S)

    # What all need.

    async def _until_failure(self, task: Callable[[], Awaitable[None]]) -> None:
        try:
            await task()
        except KnodeError as error:
            self.fail(error)

    async def _persevere(self, what: str, work: Callable[[], Awaitable[T]]) -> T:
        """Do something until the disk takes it. Meanwhile the replica stands still."""
        try:
            while True:
                try:
                    return await work()
                except KnodeError as error:
                    if error.code not in DISK_TAKES_NOTHING:
                        raise
                    if what not in self._troubles:
                        self._log.warning("the replica stands still", what=what, why=str(error))
                    self._troubles[what] = error
                self._notice_leader()
                await trio.sleep(AGAIN_S)
        finally:
            if self._troubles.pop(what, None) is not None:
                self._log.info("the replica goes on", what=what)
                self._notice_leader()
                self._work.set()

    def _check_running(self) -> None:
        if self._ended:
            raise KnodeError(Code.UNAVAILABLE, "this node stopped taking part", "try another node")

    def _check_working(self) -> None:
        self._check_running()
        if self.trouble is not None:
            why = f"the ledger cannot be written here: {self.trouble.message}"
            raise KnodeError(Code.UNAVAILABLE, why, self.trouble.next_step)
        if self._stands_still:
            raise KnodeError(Code.UNAVAILABLE, "the disk of this node is too slow now", "try again later")


def not_leader() -> KnodeError:
    """Return the error of whoever asks a replica that does not lead."""
    return KnodeError(
        Code.UNAVAILABLE, "this node does not lead the cell now", "'knode status' shows who does"
    )


def _asked(ask: Callable[[], T]) -> T:
    """Ask the core, and name its refusal."""
    try:
        return ask()
    except NotLeader as error:
        raise not_leader() from error
    except QueueFull as error:
        why = "more waits for a quorum than this node takes"
        raise KnodeError(Code.RATE_LIMITED, why, "try again later") from error
    except Transferring as error:
        raise KnodeError(Code.UNAVAILABLE, "another node is about to lead the cell", "try again") from error
    except ChangeInProgress as error:
        why = "the voters are being changed already"
        raise KnodeError(Code.UNAVAILABLE, why, "try again in a moment") from error
    except NotVoter as error:
        raise KnodeError(
            Code.INVALID_ARGUMENT, "only a voter can lead", "'knode status' shows who votes"
        ) from error
