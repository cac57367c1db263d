"""The core of consensus: one replica of a cell's log.

It is the Raft of Ongaro's dissertation (Consensus: Bridging Theory and Practice, 2014); what that leaves open
is as in etcd's raft. Pure: `receive`, `tick` and what the shell asks for change the state, `ready` says what
must be done. Each rule on which safety rests is one small function, so that it can be read, named in a test,
and switched off to see a test fail:

| rule | where | source |
|---|---|---|
| two decisions share a voter | `quorum.majority` | 3.1 |
| in a joint configuration, of both halves | `quorum.halves` | 4.3 |
| one vote a term | `Raft._may_vote` | figure 3.1, RequestVote 2 |
| no vote for a log that lacks what may be committed | `Raft._log_is_up_to_date` | 3.6.1 |
| a candidate's own vote counts once it is durable | `Raft._own_vote_is_durable` | figure 3.1, "persistent" |
| who sees a newer term follows it | `Raft._follow_term` | 3.3 |
| terms rise by so much at a time, whatever is said | `Raft._is_implausible` | knode |
| what is of an older term is refused | `Raft._is_stale` | figure 3.1, AppendEntries 1 |
| nobody votes against a leader that it hears | `Raft._ignores_vote` | 4.2.3, 6.4.1 |
| no term is begun without prospect of winning | `Raft._campaign` (pre-vote) | 9.6 |
| only voters stand for election, also one that leaves | `Raft._may_campaign` | 4.2.1, 4.2.2 |
| entries go only where the logs agree | `Log.matches` | figure 3.1, AppendEntries 2 |
| a conflict is cut away | `Log._truncate_conflict` | figure 3.1, AppendEntries 3 |
| nothing else is | `Log.merge` | figure 3.1, AppendEntries 4 |
| a follower commits what it shares with the leader | `Raft._commit_of_append` | figure 3.1, AppendEntries 5 |
| what was cut away while it was written does not count | `Log._void_writes` | 10.2.1 |
| only what is durable here is applied | `Log.hand_committed` | 10.2.1 |
| a snapshot never takes back | `Raft._wants_snapshot` | 5 |
| a leader counts itself as far as its disk has it | `Leadership._own_match` | 10.2.1 |
| older entries are not committed by counting | `Leadership._commit_index` | 3.6.2, the paper's figure 8 |
| a leader without a quorum steps down | `Leadership._check_quorum` | 6.2 |
| a read waits for an entry of the own term | `Leadership._own_term_is_committed` | 6.4, step 1 |
| a read waits for a quorum's later answers | `Leadership._read_is_confirmed` | 6.4, step 3 |
| one change of the configuration at a time | `Leadership._change_may_begin` | 4.1 |
| votes change by way of a joint configuration | `configuration.steps_toward` | 4.3 |
| that is left once it is committed | `Leadership._joint_is_to_be_left` | 4.3 |
| a leader that is voted out leaves once that is committed | `Leadership._has_left` | 4.2.2 |
| nothing is proposed during a transfer | `Leadership.propose` | 3.10 |

Learners, and replicas that were removed, answer when they are asked for a vote: a learner may have become a
voter without knowing it. Nobody who has not got that configuration counts their answer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import assert_never

from knode.consensus import configuration as configurations
from knode.consensus import quorum
from knode.consensus.leadership import Leadership
from knode.consensus.log import Log
from knode.consensus.messages import (
    MOST,
    Append,
    AppendReply,
    Configuration,
    Entry,
    HardState,
    Heartbeat,
    HeartbeatReply,
    Index,
    InstallSnapshot,
    Kind,
    Message,
    PreVote,
    PreVoteReply,
    ReplicaId,
    Snapshot,
    Term,
    TimeoutNow,
    Vote,
    VoteReply,
)
from knode.consensus.progress import FollowerStatus
from knode.consensus.ready import Position, ReadReady, Ready, Recovered, Role
from knode.consensus.refusals import NotLeader
from knode.consensus.settings import Settings

MAX_LEAP_TERMS = 2**28
"""By so much the term may rise within a tick. An honest replica is not as far behind: it makes eight years of
an election every second. And whoever lies needs fifty years to use the terms up."""
MAX_LEAP_ENTRIES = 2**48
"""How far ahead the state may be that a leader sends: nine centuries of 10,000 entries a second."""
LAST = MOST // 2
"""Whoever has a greater term or log stands for election no more: it could not go on for long."""
PATIENCE_TICKS = 3
"""Who would have voted for another waits at least this long before it stands itself: long enough for the
other's disk, and for its votes to come in."""


class Raft:
    """One replica.

    Args:
        id: its own; a replica whose configuration does not name it is a silent follower.
        recovered: what its disk held.
        applied: the last index that its state machine has; at least the recovered snapshot's.
        choose: `choose(n)` returns a random integer of [0, n).
    """

    def __init__(
        self,
        id: ReplicaId,
        recovered: Recovered,
        *,
        applied: Index,
        choose: Callable[[int], int],
        settings: Settings,
    ) -> None:
        self.id = id
        self.term: Term = recovered.hard_state.term
        self.role = Role.FOLLOWER
        self.leader: ReplicaId | None = None
        """Who leads in this term, as far as is known."""
        self._vote: bytes = recovered.hard_state.vote
        self._settings = settings
        self._choose = choose
        self._log = Log(recovered, applied)
        assert self._log.last_term <= self.term, "the term was durable before its entries were"
        self._ceiling = self.term + MAX_LEAP_TERMS
        """The highest term that counts until the next tick."""
        self._leadership: Leadership | None = None
        self._votes: dict[ReplicaId, bool] = {}
        self._last_read = 0
        self._contradictions = 0
        self._messages: list[Message] = []
        self._messages_after: list[Message] = []
        self._told = (self.term, self._vote, recovered.hard_state.commit)
        self._writing: deque[tuple[Ready, Term]] = deque()
        self._elapsed = 0
        self._timeout = 0
        self._restart_timer()

    # What a shell may look at

    @property
    def committed(self) -> Index:
        """Up to here the log is known to be committed."""
        return self._log.committed

    @property
    def applied(self) -> Index:
        """Up to here the state machine has it, as `applied_to` told."""
        return self._log.applied

    @property
    def first_index(self) -> Index:
        """Index of the first entry that is not compacted; it need not have come yet."""
        return self._log.first_index

    @property
    def last_index(self) -> Index:
        """Index of the last entry; of the snapshot when there is none."""
        return self._log.last_index

    @property
    def last_term(self) -> Term:
        """Term of the entry at `last_index`."""
        return self._log.last_term

    @property
    def configuration(self) -> Configuration:
        """The configuration in force: the latest in the log, committed or not."""
        return self._log.configuration

    @property
    def is_joint(self) -> bool:
        """Whether votes are being changed."""
        return bool(self._log.configuration.outgoing)

    @property
    def progress(self) -> dict[ReplicaId, FollowerStatus]:
        """What the leader knows of each follower; empty for who is no leader."""
        return self._leadership.followers() if self._leadership is not None else {}

    @property
    def transferring_to(self) -> ReplicaId | None:
        """To whom the leadership is being handed over."""
        return self._leadership.transferring_to if self._leadership is not None else None

    @property
    def uncommitted_bytes(self) -> int:
        """How much the leader has taken that no quorum has yet."""
        return self._leadership.uncommitted_bytes if self._leadership is not None else 0

    @property
    def contradictions(self) -> int:
        """How many messages were ignored that no honest replica with a sound disk sends."""
        return self._contradictions + (self._leadership.contradictions if self._leadership else 0)

    def entries(self, first: Index, max_bytes: int) -> tuple[Entry, ...]:
        """Return entries from an index on, at most about so many bytes; the first must not be compacted."""
        return self._log.between(first, max_bytes)

    def snapshot_at(self, index: Index) -> Snapshot:
        """Return what a state with everything up to `index` applied stands for: what `compact` wants, and
        what goes with a state that is sent. `index` is applied, and at least that of the last `compact`."""
        return self._log.snapshot_at(index)

    # What a shell asks for

    def propose(self, data: bytes) -> Position:
        """Append a command of at most `MAX_COMMAND_BYTES`; it goes out with the next `ready`.

        Raises:
            NotLeader, Transferring: it was not appended.
            QueueFull: `max_uncommitted_bytes` wait for a quorum.
        """
        return self._led().propose(data)

    def change(self, target: Configuration) -> Position:
        """Begin to make `target` (voters and learners; not joint) the configuration.

        When voters change, the position is that of the joint configuration. Once that is committed, whoever
        leads then appends `target` by itself.

        Raises:
            NotLeader, Transferring: nothing was begun.
            ChangeInProgress: another change is not committed, or nothing of this term is.
            ValueError: it is no configuration.
        """
        return self._led().change(target)

    def read(self) -> int:
        """Begin a read; its number comes back in `Ready.reads`, with the index that must be applied first.

        Reads of a leader that steps down never come back.

        Raises:
            NotLeader: ask the leader.
            QueueFull: `max_reads` wait for a quorum.
        """
        number = self._led().read()
        self._last_read = number
        return number

    def transfer(self, to: ReplicaId) -> None:
        """Hand the leadership to a voter: it stands for election once it has the whole log. Proposals are
        refused meanwhile, at most for an election timeout. A later call replaces an earlier one.

        Raises:
            NotLeader: there is nothing to hand over.
            NotVoter: it cannot lead, or does already.
        """
        self._led().transfer(to)

    def lost(self, replica: ReplicaId) -> None:
        """Take the hint that the link to a replica ended.

        If it leads, its lease stands no more, and the election timer fires within a few ticks. To a leader it
        says that what was on the way may be sent again.
        """
        if self._leadership is not None:
            self._leadership.lost(replica)
        elif replica == self.leader:
            self.leader = None
            soon = self._elapsed + 1 + self._choose(max(self._settings.election_ticks // 2, 1))
            self._timeout = min(self._timeout, soon)

    def snapshot_failed(self, replica: ReplicaId) -> None:
        """Take note that the transfer of a snapshot failed: where the follower stands is found out anew."""
        if self._leadership is not None:
            self._leadership.snapshot_failed(replica)

    def tick(self) -> None:
        """Let one tick pass."""
        self._ceiling = self.term + MAX_LEAP_TERMS
        if self._leadership is not None:
            self._leadership.tick()
            self._end_leadership_if_over()
            return
        self._elapsed += 1
        if self._elapsed >= self._timeout:
            self._restart_timer()
            self.leader = None
            waits_for_disk = self.role is Role.CANDIDATE and self.id not in self._votes
            if self._may_campaign() and not waits_for_disk:
                self._campaign_for_pre_votes()

    def applied_to(self, index: Index) -> None:
        """Take note that the state machine has everything up to an index that was handed out."""
        self._log.applied_to(index)

    def compact(self, snapshot: Snapshot) -> None:
        """Forget the entries up to `snapshot.index`, which the state machine has made durable. Whoever
        needs them gets `InstallSnapshot`."""
        self._log.compact(snapshot)

    # What is to be done

    def ready(self) -> Ready | None:
        """Take everything that is to be done now; None when there is nothing.

        It may be called again before the last one is persisted.
        """
        log, leadership = self._log, self._leadership
        reads: tuple[ReadReady, ...] = ()
        if leadership is not None:
            leadership.replicate()
            reads = leadership.take_reads()
        hard_state: HardState | None = None
        is_promise = False
        told = (self.term, self._vote, log.committed)
        if told != self._told:
            hard_state = HardState(*told)
            is_promise = told[:2] != self._told[:2]
            self._told = told
        committed = log.hand_committed()
        is_idle = hard_state is None and not log.has_untaken and not committed and not reads
        if is_idle and not self._messages and not self._messages_after:
            return None
        snapshot, entries = log.take()
        ready = Ready(
            hard_state=hard_state,
            must_sync=is_promise or bool(entries) or snapshot is not None,
            snapshot=snapshot,
            entries=entries,
            messages=tuple(self._messages),
            messages_after=tuple(self._messages_after),
            committed=committed,
            reads=reads,
        )
        self._messages.clear()
        self._messages_after.clear()
        self._writing.append((ready, self.term))
        return ready

    def persisted(self, ready: Ready) -> None:
        """Take note that all of a `Ready` is durable; each is told once, in their order."""
        assert self._writing, "a Ready that was taken"
        oldest, term = self._writing.popleft()
        assert oldest is ready, "in the order in which they were taken"
        self._log.written(ready.snapshot)
        if self._leadership is not None:
            if ready.entries:
                self._leadership.persisted()
                self._end_leadership_if_over()
        elif self.role is Role.CANDIDATE and self._own_vote_is_durable(term):
            self._count_vote(self.id, granted=True)

    # Messages

    def receive(self, message: Message) -> None:
        """Take a message, from whomever, however old, as often as it comes; never raises."""
        if message.target != self.id or message.source == self.id:
            self._contradictions += 1
            return
        if self._is_implausible(message):
            self._contradictions += 1
            self._follow_leap(message)
            return
        if self._ignores_vote(message):
            return
        if message.term > self.term:
            self._follow_term(message)
        elif self._is_stale(message):
            self._refuse_stale(message)
            return
        match message:
            case Append():
                self._receive_append(message)
            case AppendReply():
                if self._leadership is not None:
                    self._leadership.receive_append_reply(message)
                    self._end_leadership_if_over()
            case Heartbeat():
                self._receive_heartbeat(message)
            case HeartbeatReply():
                if self._leadership is not None:
                    self._leadership.receive_heartbeat_reply(message)
            case Vote() | PreVote():
                self._receive_vote(message)
            case VoteReply():
                if self.role is Role.CANDIDATE:
                    self._count_vote(message.source, granted=message.granted)
            case PreVoteReply():
                self._receive_pre_vote_reply(message)
            case InstallSnapshot():
                self._receive_snapshot(message)
            case TimeoutNow():
                if self._leadership is None and self._may_campaign():
                    self._campaign(transfer=True)
            case _:
                assert_never(message)

    def _is_implausible(self, message: Message) -> bool:
        """Whether it shows a term, or brings a state, that no honest replica can have reached while this one
        was away. Terms never go back, so a few great ones would use them up for the whole cell."""
        if message.term > self._ceiling:
            return True
        leap = self._log.last_index + MAX_LEAP_ENTRIES
        return isinstance(message, InstallSnapshot) and message.snapshot.index > leap

    def _follow_leap(self, message: Message) -> None:
        """Go towards the term of an implausible message: else who was lied to, and who was not, would never
        come together again."""
        if message.term > self._ceiling > self.term and _shows_term(message):
            self._become_follower(self._ceiling)

    def _is_stale(self, message: Message) -> bool:
        """Whether it is of a term that has passed: what it says was true once."""
        return message.term < self.term

    def _refuse_stale(self, message: Message) -> None:
        """Tell who asks in an old term that there is a newer one; a stale answer is worth nothing. Without
        this, a replica with a newer term and a cell that leads in an older one would never come together."""
        source, term, id = message.source, self.term, self.id
        match message:
            case Append():
                refusal = AppendReply(term, id, source, message.previous_index, False, 0, 0)
                self._messages_after.append(refusal)
            case Heartbeat() | InstallSnapshot():
                self._messages_after.append(AppendReply(term, id, source, 0, False, 0, 0))
            case Vote():
                self._messages_after.append(VoteReply(term, id, source, False))
            case PreVote():
                self._messages_after.append(PreVoteReply(term, id, source, False))
            case _:
                pass

    def _follow_term(self, message: Message) -> None:
        """Go to the newer term that a message shows."""
        if _shows_term(message):
            self._become_follower(message.term)

    # Elections

    def _restart_timer(self) -> None:
        ticks = self._settings.election_ticks
        self._elapsed = 0
        self._timeout = ticks + self._choose(ticks)
        present = self._log.configuration
        if self.role is Role.FOLLOWER and (present.voters, present.outgoing) == ((self.id,), ()):
            self._timeout = 1  # there is nobody to wait for

    def _become_follower(self, term: Term) -> None:
        assert term >= self.term, "terms never go back"
        if term > self.term:
            self.term = term
            self._vote = b""
        if self._leadership is not None:
            self._contradictions += self._leadership.contradictions
            self._leadership = None
        self.role = Role.FOLLOWER
        self.leader = None
        self._votes = {}
        self._restart_timer()

    def _end_leadership_if_over(self) -> None:
        if self._leadership is not None and self._leadership.is_over:
            self._become_follower(self.term)

    def _may_campaign(self) -> bool:
        """Only a voter stands for election, and only it may be told to. One that is to lose its vote goes on
        until that is committed: perhaps nobody else has the entry with which it can be (section 4.2.2)."""
        return max(self.term, self._log.last_index) <= LAST and any(
            configurations.may_vote(configuration, self.id)
            for configuration in self._log.possible_configurations
        )

    def _campaign_for_pre_votes(self) -> None:
        """Ask whether an election could be won, before a term is spent on it."""
        self.role = Role.PRE_CANDIDATE
        self.leader = None
        self._votes = {}
        log = self._log
        for voter in self._other_voters():
            self._messages.append(PreVote(self.term + 1, self.id, voter, log.last_index, log.last_term))
        self._count_vote(self.id, granted=True)

    def _campaign(self, *, transfer: bool) -> None:
        """Stand for election in a new term."""
        self.role = Role.CANDIDATE
        self.term += 1
        self._vote = self.id
        self.leader = None
        self._votes = {}
        self._restart_timer()
        log = self._log
        for voter in self._other_voters():
            self._messages_after.append(
                Vote(self.term, self.id, voter, log.last_index, log.last_term, transfer)
            )

    def _other_voters(self) -> list[ReplicaId]:
        configuration = self._log.configuration
        return sorted({*configuration.voters, *configuration.outgoing} - {self.id})

    def _own_vote_is_durable(self, term: Term) -> bool:
        """Whether what was written in `term` holds the vote of the present campaign: a leader that forgot
        its own vote could vote for another in its term."""
        return term == self.term

    def _count_vote(self, voter: ReplicaId, *, granted: bool) -> None:
        """The first answer of each counts, of those who were asked."""
        asked = {self.id, *self._other_voters()}
        if voter not in asked:
            return
        self._votes.setdefault(voter, granted)
        configuration = self._log.configuration
        if quorum.is_quorum(configuration, {voter for voter, yes in self._votes.items() if yes}):
            if self.role is Role.PRE_CANDIDATE:
                self._campaign(transfer=False)
            else:
                self._become_leader()
            return
        refused = {voter for voter, yes in self._votes.items() if not yes}
        if not quorum.is_quorum(configuration, asked - refused):
            self._become_follower(self.term)

    def _become_leader(self) -> None:
        assert self.role is Role.CANDIDATE, "only a candidate becomes leader"
        assert self._vote == self.id, "and has its own vote"
        assert self._log.last_term < self.term, "nobody led in this term before"
        self.role = Role.LEADER
        self.leader = self.id
        self._votes = {}
        self._elapsed = 0
        self._leadership = Leadership(
            self.id, self.term, self._log, self._settings, self._last_read, self._messages.append
        )

    def _receive_vote(self, message: Vote | PreVote) -> None:
        granted = self._may_vote(message) and self._log_is_up_to_date(message)
        if isinstance(message, PreVote):
            if granted:  # who asked first goes first: two that stand at once may both fail
                self._timeout = max(self._timeout, self._elapsed + PATIENCE_TICKS)
            term = message.term if granted else self.term
            self._messages.append(PreVoteReply(term, self.id, message.source, granted))
            return
        if granted:
            self._vote = message.source
            self._elapsed = 0
        self._messages_after.append(VoteReply(self.term, self.id, message.source, granted))

    def _receive_pre_vote_reply(self, message: PreVoteReply) -> None:
        """A grant is for the term that was asked for, a refusal of the present one."""
        answers = self.term + 1 if message.granted else self.term
        if self.role is Role.PRE_CANDIDATE and message.term == answers:
            self._count_vote(message.source, granted=message.granted)

    def _ignores_vote(self, message: Message) -> bool:
        """Whether it asks for a vote against a leader that was heard within the election timeout: a replica
        that was removed, or cut off, must not disturb the others. Only the leader itself can want it."""
        match message:
            case PreVote():
                pass
            case Vote() if not message.transfer:
                pass
            case _:
                return False
        if message.term <= self.term:
            return False  # disturbs nobody, and the answer shows it the newer term
        return self.leader is not None and self._elapsed < self._settings.election_ticks

    def _may_vote(self, message: Vote | PreVote) -> bool:
        """One vote a term, and none once the term has a leader; repeating it is no second one. A pre-vote
        for a term to come takes nothing from anyone."""
        if isinstance(message, PreVote) and message.term > self.term:
            return True
        return self._vote == message.source or (not self._vote and self.leader is None)

    def _log_is_up_to_date(self, message: Vote | PreVote) -> bool:
        """Whether the candidate's log is at least as good as the own: then it has all that is committed."""
        log = self._log
        return (message.last_term, message.last_index) >= (log.last_term, log.last_index)

    # Following

    def _heard_leader(self, source: ReplicaId) -> bool:
        """Follow who leads in this term. False: it is this replica, so the message is nobody's."""
        if self._leadership is not None:
            self._contradictions += 1
            return False
        if self.role is not Role.FOLLOWER:
            self._become_follower(self.term)
        if self.leader is None:
            self.leader = source
            self._restart_timer()  # `lost` may have shortened it
        elif self.leader != source:
            self._contradictions += 1
            return False
        self._elapsed = 0
        return True

    def _receive_append(self, message: Append) -> None:
        if not self._heard_leader(message.source):
            return
        log = self._log
        if not _is_well_formed(message):
            self._contradictions += 1
            return
        if message.previous_index < log.committed:
            self._accept(message.source, log.committed)  # the leader has that too: go on from there
        elif log.matches(message.previous_index, message.previous_term):
            log.merge(message.entries)
            self._commit(self._commit_of_append(message))
            self._accept(message.source, message.previous_index + len(message.entries))
        else:
            hint, hint_term = log.last_agreeing(message.previous_index, message.previous_term)
            self._messages_after.append(
                AppendReply(
                    self.term, self.id, message.source, message.previous_index, False, hint, hint_term
                )
            )

    def _commit_of_append(self, message: Append) -> Index:
        """Return what is committed of what the leader and this replica are now known to share: what
        stands here beyond the message may be of an old leader."""
        return min(message.commit, message.previous_index + len(message.entries))

    def _receive_heartbeat(self, message: Heartbeat) -> None:
        if not self._heard_leader(message.source):
            return
        self._commit(message.commit)  # at most what this replica is known to share with the leader
        self._messages.append(HeartbeatReply(self.term, self.id, message.source, message.read))

    def _receive_snapshot(self, message: InstallSnapshot) -> None:
        if not self._heard_leader(message.source):
            return
        snapshot = message.snapshot
        if snapshot.term > message.term or not configurations.is_sound(snapshot.configuration):
            self._contradictions += 1
            return
        if self._wants_snapshot(snapshot):
            self._log.reset(snapshot)
        else:
            self._commit(min(snapshot.index, self._log.last_index))
        self._accept(message.source, self._log.committed)

    def _wants_snapshot(self, snapshot: Snapshot) -> bool:
        """Not one that is older than what is known here, and not when the log goes on from it anyway."""
        return snapshot.index > self._log.committed and not self._log.matches(snapshot.index, snapshot.term)

    def _commit(self, index: Index) -> None:
        log = self._log
        if index > log.committed:
            if index > log.last_index:
                self._contradictions += 1
                return
            log.commit_to(index)

    def _accept(self, source: ReplicaId, index: Index) -> None:
        self._messages_after.append(AppendReply(self.term, self.id, source, index, True, 0, 0))

    def _led(self) -> Leadership:
        if self._leadership is None:
            raise NotLeader
        return self._leadership


def _shows_term(message: Message) -> bool:
    """Whether its term is somebody's; a pre-vote only asks about one."""
    match message:
        case PreVote():
            return False
        case PreVoteReply():
            return not message.granted
        case _:
            return True


def _is_well_formed(message: Append) -> bool:
    """Whether its entries follow each other, in terms that a leader of this term can have, and hold what they
    say that they hold."""
    index, term = message.previous_index, message.previous_term
    for entry in message.entries:
        index += 1
        if entry.index != index or entry.term < term:
            return False
        term = entry.term
        if entry.kind is not Kind.COMMAND and configurations.decoded(entry.data) is None:
            return False
    return term <= message.term
