"""What a leader does in its term: it feeds the followers, commits, confirms reads, changes the configuration.

A `Leadership` lives as long as its leader leads in one term. It never changes term, vote or role: it says
that it is over (`is_over`), and `Raft` steps down.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from knode.consensus import configuration as configurations
from knode.consensus import quorum
from knode.consensus.log import ENTRY_OVERHEAD_BYTES, Log, size_of
from knode.consensus.messages import (
    MAX_COMMAND_BYTES,
    Append,
    AppendReply,
    Configuration,
    Entry,
    Heartbeat,
    HeartbeatReply,
    Index,
    InstallSnapshot,
    Kind,
    Message,
    ReplicaId,
    Term,
    TimeoutNow,
)
from knode.consensus.progress import Feeding, FollowerStatus, Progress
from knode.consensus.ready import Position, ReadReady
from knode.consensus.refusals import ChangeInProgress, NotVoter, QueueFull, Transferring
from knode.consensus.settings import Settings


class Leadership:
    """One leader in one term.

    Args:
        id: the leader.
        log: the replica's; its last entry is not yet of this term.
        last_read: the number of the last read that this process was ever asked for.
        send: takes messages that may go out at once.
    """

    def __init__(
        self,
        id: ReplicaId,
        term: Term,
        log: Log,
        settings: Settings,
        last_read: int,
        send: Callable[[Message], None],
    ) -> None:
        self.is_over = False
        """A quorum was not heard, or the configuration without this replica is committed: step down."""
        self.last_read = last_read
        self.transferring_to: ReplicaId | None = None
        self.contradictions = 0
        """Answers that no honest replica gives."""
        self._id = id
        self._term = term
        self._log = log
        self._settings = settings
        self._send = send
        self._tick = 0
        self._transfer_begun = 0
        self._reads: deque[ReadReady] = deque()
        self._confirmed: list[ReadReady] = []
        self._read_sent = last_read
        self._uncommitted_bytes = log.size_between(log.committed, log.last_index)
        self._followers: dict[ReplicaId, Progress] = {}
        self._follow_configuration()
        self._first_index = self._append(Kind.COMMAND, b"").index

    # What the shell asks for

    def propose(self, data: bytes) -> Position:
        """Append a command; see `Raft.propose`."""
        assert len(data) <= MAX_COMMAND_BYTES, "the shell refuses larger commands"
        if self.transferring_to is not None:
            raise Transferring
        self._refuse_over_limit(len(data) + ENTRY_OVERHEAD_BYTES)
        return self._append(Kind.COMMAND, data)

    def change(self, target: Configuration) -> Position:
        """Begin to change the configuration; see `Raft.change`."""
        if self.transferring_to is not None:
            raise Transferring
        if not self._change_may_begin():
            raise ChangeInProgress
        step = configurations.steps_toward(self._log.configuration, target)
        return self._append(Kind.CONFIGURATION, configurations.encoded(step))

    def read(self) -> int:
        """Begin a read; see `Raft.read`."""
        if len(self._reads) + len(self._confirmed) >= self._settings.max_reads:
            raise QueueFull
        self.last_read += 1
        self._reads.append(ReadReady(self.last_read, self._read_index()))
        self._confirm_reads()
        return self.last_read

    def transfer(self, to: ReplicaId) -> None:
        """Hand the leadership over; see `Raft.transfer`."""
        if to == self._id or to not in self._log.configuration.voters:
            raise NotVoter
        self.transferring_to = to
        self._transfer_begun = self._tick
        self._finish_transfer()

    def lost(self, replica: ReplicaId) -> None:
        """Its link ended: what was on the way to it probably went with it."""
        progress = self._followers.get(replica)
        if progress is not None and progress.feeding is Feeding.REPLICATE:
            progress.probe(progress.match + 1)
        self.snapshot_failed(replica)

    def snapshot_failed(self, replica: ReplicaId) -> None:
        """The snapshot did not reach it; look again where it stands when it is heard next."""
        progress = self._followers.get(replica)
        if progress is not None and progress.feeding is Feeding.SNAPSHOT:
            progress.probe(progress.match + 1)
            progress.paused = True

    # What happens

    def tick(self) -> None:
        """One tick has passed."""
        self._tick += 1
        if not self._check_quorum():
            self.is_over = True
            return
        if self.transferring_to is not None and self._transfer_is_late():
            self.transferring_to = None
        if self._tick % self._settings.heartbeat_ticks == 0:
            self._send_heartbeats()

    def receive_append_reply(self, message: AppendReply) -> None:
        """A follower took entries, or refused them."""
        progress = self._followers.get(message.source)
        if progress is None:
            return  # of no replica of this configuration, so it counts for nothing
        progress.heard = self._tick
        if message.accepted:
            self._accepted(message, progress)
        else:
            self._refused(message, progress)

    def receive_heartbeat_reply(self, message: HeartbeatReply) -> None:
        """A follower still takes this replica for its leader."""
        progress = self._followers.get(message.source)
        if progress is None:
            return
        if message.read > self.last_read:
            self.contradictions += 1
            return
        progress.heard = self._tick
        progress.paused = False
        if progress.feeding is not Feeding.PROBE:
            self._look_for_losses(message.source, progress)
        if message.read > progress.read:
            progress.read = message.read
            self._confirm_reads()

    def persisted(self) -> None:
        """More of the own log is durable, and counts now."""
        self._advance_commit()

    def replicate(self) -> None:
        """Send every follower what it lacks, as far as it may be sent now."""
        for replica, progress in self._followers.items():
            self._feed(replica, progress)
        if self._read_sent < self.last_read and self._reads:
            self._send_heartbeats()

    def take_reads(self) -> tuple[ReadReady, ...]:
        """Return the reads that were confirmed since the last call."""
        if not self._confirmed:
            return ()
        reads = tuple(self._confirmed)
        self._confirmed.clear()
        return reads

    @property
    def uncommitted_bytes(self) -> int:
        """How much waits for a quorum."""
        return self._uncommitted_bytes

    def followers(self) -> dict[ReplicaId, FollowerStatus]:
        """Return what is known of every follower."""
        return {
            replica: FollowerStatus(progress.match, self._is_active(progress), progress.feeding)
            for replica, progress in self._followers.items()
        }

    # Appending and committing

    def _append(self, kind: Kind, data: bytes) -> Position:
        entry = Entry(self._term, self._log.last_index + 1, kind, data)
        self._log.append((entry,))
        self._uncommitted_bytes += size_of(entry)
        if kind is Kind.CONFIGURATION:
            self._follow_configuration()
        return Position(self._term, entry.index)

    def _refuse_over_limit(self, size_bytes: int) -> None:
        waiting = self._uncommitted_bytes
        if waiting and waiting + size_bytes > self._settings.max_uncommitted_bytes:
            raise QueueFull

    def _match(self, replica: ReplicaId) -> Index:
        """Up to where a replica's log is known to be this one, durably. The own counts as far as the
        disk has it, no further (section 10.2.1)."""
        if replica == self._id:
            return self._own_match()
        progress = self._followers.get(replica)
        return progress.match if progress is not None else 0

    def _own_match(self) -> Index:
        return self._log.durable

    def _commit_index(self) -> Index:
        """Return what is committed now: what a quorum has, if it is of the leader's own term. An older
        entry is committed by one of its own term after it, never by counting (section 3.6.2, figure 3.7;
        figure 8 of the paper)."""
        index = quorum.agreed(self._log.configuration, self._match)
        return index if self._log.term_at(index) == self._term else self._log.committed

    def _advance_commit(self) -> None:
        log = self._log
        index = self._commit_index()
        if index <= log.committed:
            return
        before = log.committed
        log.commit_to(index)
        self._uncommitted_bytes -= log.size_between(before, index)
        assert self._uncommitted_bytes >= 0, "what is committed was counted"
        if before < log.configuration_index <= index:
            self._follow_configuration()
        if self._joint_is_to_be_left():
            joint = log.configuration
            self._append(Kind.CONFIGURATION, configurations.encoded(configurations.left(joint)))
        if self._has_left():
            self._hand_over()
            self.is_over = True
        self._confirm_reads()

    # Followers

    def _accepted(self, message: AppendReply, progress: Progress) -> None:
        if message.index > self._log.last_index:
            self.contradictions += 1
            return
        is_news = progress.accepted(message.index)
        if progress.feeding is Feeding.PROBE:
            if message.index == progress.match:
                progress.replicate()
        elif progress.feeding is Feeding.SNAPSHOT:
            self._leave_snapshot(progress)
        if not is_news:
            return
        if message.index > self._log.committed:
            self._advance_commit()
        if message.source == self.transferring_to:
            self._finish_transfer()

    def _leave_snapshot(self, progress: Progress) -> None:
        if progress.match >= self._log.snapshot.index:
            progress.replicate()
        elif progress.match >= progress.snapshot.index:
            progress.probe(progress.match + 1)  # it came, but the log has moved on: another is needed

    def _refused(self, message: AppendReply, progress: Progress) -> None:
        """Go back to where the logs can agree (section 3.5, with the hint of etcd's raft)."""
        if progress.feeding is Feeding.REPLICATE:
            if message.index > progress.match:
                progress.probe(progress.match + 1)
        elif progress.feeding is Feeding.SNAPSHOT:
            sent = progress.snapshot
            if message.hint_index >= sent.index and message.hint_term >= sent.term:
                progress.probe(progress.match + 1)  # it came, its answer did not, and the log has moved on
        elif message.index == progress.next - 1:
            hint, _ = self._log.last_agreeing(min(message.hint_index, message.index), message.hint_term)
            progress.probe(max(min(hint + 1, message.index), progress.match + 1))

    def _feed(self, to: ReplicaId, progress: Progress) -> None:
        if progress.feeding is Feeding.PROBE:
            if not progress.paused:
                progress.paused = True
                self._send_entries(to, progress)
            return
        log, settings = self._log, self._settings
        while (
            progress.feeding is Feeding.REPLICATE
            and progress.next <= log.last_index
            and not progress.is_full(settings.max_in_flight, settings.max_in_flight_bytes)
        ):
            self._send_entries(to, progress)

    def _send_entries(self, to: ReplicaId, progress: Progress) -> None:
        previous = progress.next - 1
        if previous < self._log.snapshot.index:
            self._send_snapshot(to, progress)
            return
        entries = self._log.between(progress.next, self._settings.max_append_bytes)
        self._send_append(to, progress, previous, entries)
        if progress.feeding is Feeding.REPLICATE:
            progress.sent(previous + len(entries), sum(map(size_of, entries)))

    def _send_append(
        self, to: ReplicaId, progress: Progress, previous: Index, entries: tuple[Entry, ...]
    ) -> None:
        log = self._log
        previous_term = log.term_at(previous)
        if previous_term is None:
            self._send_snapshot(to, progress)
            return
        self._send(Append(self._term, self._id, to, previous, previous_term, entries, log.committed))

    def _send_snapshot(self, to: ReplicaId, progress: Progress) -> None:
        if not self._is_active(progress):
            progress.probe(progress.match + 1)
            progress.paused = True  # nobody is there to take it: wait for a sign of life
            return
        progress.await_snapshot(self._log.snapshot)
        self._send(InstallSnapshot(self._term, self._id, to, self._log.snapshot))

    def _tell_commit(self, to: ReplicaId, progress: Progress) -> None:
        """Tell a follower at once how far commits go, when no heartbeat of this leader will. All others hear
        it with the next entries or heartbeat: a message of its own, and its answer, would double what a lone
        commit costs, and nobody waits for it there, since a read makes its own heartbeats."""
        if progress.feeding is Feeding.REPLICATE and progress.next > self._log.snapshot.index:
            self._send_entries(to, progress)

    def _look_for_losses(self, to: ReplicaId, progress: Progress) -> None:
        """An append without entries finds out whether what was sent came, when no answer did for a whole
        heartbeat: the answer is either that all is there, or where to begin anew. For a snapshot, the
        same shows that it was installed and only its answer lost."""
        if progress.match == progress.stalled_at and progress.match < progress.next - 1:
            base = self._log.snapshot.index
            previous = progress.next - 1 if progress.feeding is Feeding.REPLICATE else base
            if previous >= base:
                self._send_append(to, progress, previous, ())
            else:
                progress.probe(progress.match + 1)  # compacted meanwhile: it is sent a snapshot
        progress.stalled_at = progress.match

    def _send_heartbeats(self) -> None:
        read = self.last_read if self._reads else 0
        self._read_sent = self.last_read
        committed = self._log.committed
        for replica, progress in self._followers.items():
            self._send(Heartbeat(self._term, self._id, replica, min(progress.match, committed), read))

    def _is_active(self, progress: Progress) -> bool:
        return self._tick - progress.heard < self._settings.election_ticks

    def _check_quorum(self) -> bool:
        """Whether a quorum was heard within the election timeout (section 6.2): who is cut off leads
        nobody, and says so."""
        heard = quorum.agreed(self._log.configuration, self._heard)
        return self._tick - heard < self._settings.election_ticks

    def _heard(self, replica: ReplicaId) -> int:
        if replica == self._id:
            return self._tick
        progress = self._followers.get(replica)
        return progress.heard if progress is not None else 0

    # Reads (section 6.4)

    def _own_term_is_committed(self) -> bool:
        """Only then does a leader know all that is committed (section 6.4, step 1)."""
        return self._log.committed >= self._first_index

    def _read_index(self) -> Index:
        """Return which entries a read that begins now must see."""
        return max(self._log.committed, self._first_index)

    def _read_is_confirmed(self, number: int) -> bool:
        """Whether a quorum answered a heartbeat that was sent after the read began (section 6.4, step 3):
        then there was no newer leader when it began."""
        return quorum.agreed(self._log.configuration, self._read_answered) >= number

    def _read_answered(self, replica: ReplicaId) -> int:
        if replica == self._id:
            return self.last_read
        progress = self._followers.get(replica)
        return progress.read if progress is not None else 0

    def _confirm_reads(self) -> None:
        reads = self._reads
        if not reads or not self._own_term_is_committed():
            return
        while reads and self._read_is_confirmed(reads[0].number):
            self._confirmed.append(reads.popleft())

    # The configuration (chapter 4)

    def _follow_configuration(self) -> None:
        """Keep a progress for everyone who gets the log now: those who leave get it until that is
        committed, so that they learn of it."""
        everyone = {
            replica
            for configuration in self._log.possible_configurations
            for replica in configurations.everyone(configuration)
        }
        for replica in sorted(everyone - {self._id} - self._followers.keys()):
            self._followers[replica] = Progress(self._log.last_index + 1, self._tick)
        for replica in sorted(self._followers.keys() - everyone):
            # Who hears that it has left stands for no election; else nobody listens to it (section 4.2.3).
            self._tell_commit(replica, self._followers.pop(replica))
        if self.transferring_to not in self._log.configuration.voters:
            self.transferring_to = None

    def _change_may_begin(self) -> bool:
        """One change at a time, and none before the leader knows the last one's fate."""
        log = self._log
        is_settled = not log.configuration.outgoing and log.configuration_index <= log.committed
        return is_settled and self._own_term_is_committed()

    def _joint_is_to_be_left(self) -> bool:
        """A joint configuration is left once it is committed, and not earlier (section 4.3)."""
        return bool(self._log.configuration.outgoing) and self._log.configuration_index <= self._log.committed

    def _has_left(self) -> bool:
        """Whether a configuration in which this replica has no vote is committed (section 4.2.2)."""
        configuration = self._log.configuration
        return (
            not configurations.may_vote(configuration, self._id)
            and self._log.configuration_index <= self._log.committed
        )

    # Handing over (section 3.10)

    def _transfer_is_late(self) -> bool:
        return self._tick - self._transfer_begun >= self._settings.election_ticks

    def _finish_transfer(self) -> None:
        """Let the target stand for election as soon as it has the whole log."""
        if (to := self.transferring_to) is not None and self._match(to) == self._log.last_index:
            self._send(TimeoutNow(self._term, self._id, to))

    def _hand_over(self) -> None:
        """Tell everyone of the last commit, and let the voter that has most stand for election."""
        for replica, progress in self._followers.items():
            self._tell_commit(replica, progress)
        voters = self._log.configuration.voters
        best = max(voters, key=lambda voter: (self._match(voter), voter))
        self._send(TimeoutNow(self._term, self._id, best))
