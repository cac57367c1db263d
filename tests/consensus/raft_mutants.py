"""The rules of Raft as the core keeps them, and for each what the core is like without it.

`raft_mutation` tries what notices. A rule that changes in the core changes here: `text` fails when the piece
that it replaces is gone.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from msgspec.structs import replace

from knode.consensus import configuration, quorum
from knode.consensus.leadership import Leadership
from knode.consensus.log import Log
from knode.consensus.messages import AppendReply, HeartbeatReply, VoteReply
from knode.consensus.progress import Progress
from knode.consensus.raft import Raft


@dataclass(frozen=True)
class Mutant:
    """One rule switched off.

    Args:
        change: gets the function that keeps the rule, and returns one that does not.
    """

    rule: str
    section: str
    owner: Any
    name: str
    change: Callable[[Callable[..., Any]], Callable[..., Any]]

    @property
    def where(self) -> str:
        return f"{self.owner.__name__.split('.')[-1]}.{self.name}"


def always(value: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """It returns this, whatever it is asked."""
    return lambda original: lambda *args, **kwargs: value


def becomes(function: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Another function takes its place."""
    return lambda original: function


def text(old: str, new: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A piece of its source is another; it must be there once."""

    def change(original: Callable[..., Any]) -> Callable[..., Any]:
        source = textwrap.dedent(inspect.getsource(original))
        assert source.count(old) == 1, f"{original.__qualname__} has {old!r} {source.count(old)} times"
        names: dict[str, Any] = {}
        exec(source.replace(old, new), original.__globals__, names)
        found: Callable[..., Any] = names[original.__name__]
        return found

    return change


def unless(kind: type) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """It is false for this kind of message, and as it was for others."""
    return lambda original: lambda self, message: not isinstance(message, kind) and original(self, message)


MUTANTS = (
    # Elections
    Mutant(
        "more than half of the voters decide",
        "3.4",
        quorum,
        "majority",
        becomes(lambda voters: len(voters) // 2 or 1),
    ),
    Mutant("one vote a term", "3.4", Raft, "_may_vote", always(True)),
    Mutant(
        "a vote outlasts stepping down in its term",
        "3.4",
        Raft,
        "_become_follower",
        text("if term > self.term:", "if True:"),
    ),
    Mutant(
        "a vote is synced",
        "3.8",
        Raft,
        "ready",
        text("is_promise = told[:2] != self._told[:2]", "is_promise = False"),
    ),
    Mutant(
        "a vote is said once it is durable",
        "3.8",
        Raft,
        "_receive_vote",
        text("self._messages_after.append(VoteReply", "self._messages.append(VoteReply"),
    ),
    Mutant(
        "a candidate's own vote counts once it is durable", "3.8", Raft, "_own_vote_is_durable", always(True)
    ),
    Mutant("no vote for a log that is less up to date", "3.6.1", Raft, "_log_is_up_to_date", always(True)),
    Mutant(
        "the later last term is more up to date",
        "3.6.1",
        Raft,
        "_log_is_up_to_date",
        becomes(lambda self, message: message.last_index >= self._log.last_index),
    ),
    Mutant(
        "of one last term the longer log is",
        "3.6.1",
        Raft,
        "_log_is_up_to_date",
        becomes(lambda self, message: message.last_term >= self._log.last_term),
    ),
    Mutant(
        "no term is begun without prospect of winning",
        "9.6",
        Raft,
        "_campaign_for_pre_votes",
        becomes(lambda self: self._campaign(transfer=False)),
    ),
    Mutant(
        "a pre-vote of another term counts for nothing",
        "9.6",
        Raft,
        "_receive_pre_vote_reply",
        text(" and message.term == answers", ""),
    ),
    Mutant("nobody votes against a leader that it hears", "4.2.3", Raft, "_ignores_vote", always(False)),
    Mutant("a leader that hears no majority steps down", "6.2", Leadership, "_check_quorum", always(True)),
    Mutant("only voters stand for election", "4.2.1", Raft, "_may_campaign", always(True)),
    Mutant("the hint that a link ended", "knode", Raft, "lost", always(None)),
    Mutant(
        "a voter that leaves stands until that is committed",
        "4.2.2",
        Raft,
        "_may_campaign",
        becomes(lambda self: configuration.may_vote(self._log.configuration, self.id)),
    ),
    Mutant(
        "a candidate follows who leads in its term",
        "3.4",
        Raft,
        "_heard_leader",
        text("if self.role is not Role.FOLLOWER:", "if False:"),
    ),
    # Terms
    Mutant(
        "who sees a newer term follows it: a vote's refusal",
        "3.3",
        Raft,
        "_follow_term",
        lambda original: lambda self, m: None if isinstance(m, VoteReply) else original(self, m),
    ),
    Mutant(
        "who sees a newer term follows it: an append's refusal",
        "3.3",
        Raft,
        "_follow_term",
        lambda original: lambda self, m: None if isinstance(m, AppendReply) else original(self, m),
    ),
    Mutant(
        "who sees a newer term follows it: a heartbeat's answer",
        "3.3",
        Raft,
        "_follow_term",
        lambda original: lambda self, m: None if isinstance(m, HeartbeatReply) else original(self, m),
    ),
    Mutant("a vote of an older term does not count", "3.3", Raft, "_is_stale", unless(VoteReply)),
    Mutant(
        "an acknowledgement of an older term does not count", "3.3", Raft, "_is_stale", unless(AppendReply)
    ),
    Mutant(
        "an answered heartbeat of an older term confirms no read",
        "3.3",
        Raft,
        "_is_stale",
        unless(HeartbeatReply),
    ),
    Mutant("terms rise by so much at a time", "knode", Raft, "_is_implausible", always(False)),
    Mutant("what asks in an older term is refused", "3.3", Raft, "_is_stale", always(False)),
    Mutant("and is told the newer term", "3.3", Raft, "_refuse_stale", always(None)),
    # The log
    Mutant(
        "entries go only where the logs agree",
        "3.5",
        Log,
        "matches",
        becomes(lambda self, index, term: self.term_at(index) is not None),
    ),
    Mutant(
        "a conflict is cut off", "3.5", Log, "merge", text("self._truncate_conflict(entry.index)", "return")
    ),
    Mutant(
        "nothing else is cut off",
        "3.5",
        Log,
        "merge",
        becomes(
            lambda self, entries: (
                entries
                and (
                    self._truncate_conflict(entries[0].index)
                    if entries[0].index <= self.last_index
                    else None,
                    self.append(entries),
                )
            )
        ),
    ),
    Mutant(
        "what is committed is not taken back",
        "3.5",
        Raft,
        "_receive_append",
        text("message.previous_index < log.committed", "False"),
    ),
    Mutant(
        "a refusal hints at where logs can agree",
        "3.5",
        Log,
        "last_agreeing",
        becomes(lambda self, index, term: (max(index - 1, 0), term)),
    ),
    Mutant(
        "what was cut off while it was written does not count", "10.2.1", Log, "_void_writes", always(None)
    ),
    Mutant("what was lost is sent again", "3.5", Leadership, "_look_for_losses", always(None)),
    # Commits
    Mutant(
        "an older term's entry is not committed by counting",
        "3.6.2",
        Leadership,
        "_commit_index",
        text("index if self._log.term_at(index) == self._term else self._log.committed", "index"),
    ),
    Mutant(
        "a leader counts itself as far as its disk has it",
        "10.2.1",
        Leadership,
        "_own_match",
        becomes(lambda self: self._log.last_index),
    ),
    Mutant(
        "an entry is acknowledged once it is durable",
        "3.8",
        Raft,
        "_accept",
        text("_messages_after", "_messages"),
    ),
    Mutant(
        "only what is durable here is applied",
        "10.2.1",
        Log,
        "hand_committed",
        text("min(self.committed, self.durable)", "self.committed"),
    ),
    Mutant(
        "a leader begins its term with an entry",
        "6.4",
        Leadership,
        "__init__",
        text('self._append(Kind.COMMAND, b"").index', "log.last_index + 1"),
    ),
    Mutant(
        "an append commits what it shows to be the same",
        "3.5",
        Raft,
        "_commit_of_append",
        becomes(lambda self, message: min(message.commit, self._log.last_index)),
    ),
    Mutant(
        "a heartbeat commits what is known to be the same",
        "3.5",
        Leadership,
        "_send_heartbeats",
        text("min(progress.match, committed)", "committed"),
    ),
    Mutant(
        "what is known to match never goes back",
        "3.5",
        Progress,
        "accepted",
        text("if index <= self.match:", "if index == self.match:"),
    ),
    # Reads
    Mutant(
        "a read waits for an entry of the own term", "6.4", Leadership, "_own_term_is_committed", always(True)
    ),
    Mutant(
        "a read sees what an earlier leader committed",
        "6.4",
        Leadership,
        "_read_index",
        becomes(lambda self: self._log.committed),
    ),
    Mutant("a read waits for a quorum", "6.4", Leadership, "_read_is_confirmed", always(True)),
    Mutant(
        "a quorum that was asked after the read",
        "6.4",
        Leadership,
        "receive_heartbeat_reply",
        lambda original: lambda self, m: original(self, replace(m, read=self.last_read)),
    ),
    # Transfer
    Mutant(
        "nothing is proposed during a transfer",
        "3.10",
        Leadership,
        "propose",
        text("self.transferring_to is not None", "False"),
    ),
    Mutant(
        "the next leader first gets the whole log",
        "3.10",
        Leadership,
        "_finish_transfer",
        text(" and self._match(to) == self._log.last_index", ""),
    ),
    Mutant("a transfer that is late is given up", "3.10", Leadership, "_transfer_is_late", always(False)),
    Mutant(
        "a vote for a transfer breaks the lease",
        "3.10",
        Raft,
        "_campaign",
        lambda original: lambda self, *, transfer: original(self, transfer=False),
    ),
    # Who votes
    Mutant(
        "votes change by way of a joint configuration",
        "4.3",
        configuration,
        "steps_toward",
        becomes(lambda present, target: target),
    ),
    Mutant(
        "a joint one needs the majority of the old", "4.3", quorum, "halves", becomes(lambda c: (c.voters,))
    ),
    Mutant("and that of the new", "4.3", quorum, "halves", becomes(lambda c: (c.outgoing or c.voters,))),
    Mutant("it is left", "4.3", Leadership, "_joint_is_to_be_left", always(False)),
    Mutant(
        "it is left when it is committed, not earlier",
        "4.3",
        Leadership,
        "_joint_is_to_be_left",
        becomes(lambda self: bool(self._log.configuration.outgoing)),
    ),
    Mutant(
        "one change at a time",
        "4.1",
        Leadership,
        "_change_may_begin",
        becomes(lambda self: not self._log.configuration.outgoing),
    ),
    Mutant(
        "none before an entry of the own term is committed",
        "4.1",
        Leadership,
        "_change_may_begin",
        text(" and self._own_term_is_committed()", ""),
    ),
    Mutant(
        "a configuration goes with its entry",
        "4.1",
        Log,
        "_truncate_conflict",
        text("while self._configurations[-1][0] >= index:", "while False:"),
    ),
    Mutant("a leader that is voted out leaves", "4.2.2", Leadership, "_has_left", always(False)),
    Mutant(
        "and not before that is committed",
        "4.2.2",
        Leadership,
        "_has_left",
        text("self._log.configuration_index <= self._log.committed", "True"),
    ),
    Mutant(
        "a learner has no vote", "4.2.1", quorum, "halves", becomes(lambda c: ((*c.voters, *c.learners),))
    ),
    # Snapshots
    Mutant("a snapshot that is older than the log is ignored", "5.3", Raft, "_wants_snapshot", always(True)),
    Mutant(
        "a snapshot brings its configuration",
        "5.1",
        Log,
        "reset",
        text("[(snapshot.index, snapshot.configuration)]", "[(snapshot.index, self.configuration)]"),
    ),
    Mutant("a snapshot that failed is sent again", "5.3", Leadership, "snapshot_failed", always(None)),
    # Limits
    Mutant("appends under way are limited", "10.2.2", Progress, "is_full", always(False)),
    Mutant("what waits for a quorum is limited", "knode", Leadership, "_refuse_over_limit", always(None)),
    Mutant(
        "reads that wait are limited",
        "knode",
        Leadership,
        "read",
        text(">= self._settings.max_reads", "> 10**9"),
    ),
)
