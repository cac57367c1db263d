"""A follower: what it takes, what it answers, and what old and doubled messages do to it."""

from __future__ import annotations

import pytest
from lone_core import A, B, C, Lone, commands, only, voters

from knode.consensus.messages import (
    Append,
    AppendReply,
    Configuration,
    Entry,
    Heartbeat,
    HeartbeatReply,
    InstallSnapshot,
    Kind,
    Snapshot,
)
from knode.consensus.ready import Role

THREE = voters(A, B, C)


def test_an_append_is_answered_when_it_is_durable() -> None:
    core = Lone(THREE)
    core.raft.receive(Append(1, B, A, 0, 0, commands(1, 1), 1))
    ready = core.take()
    assert ready.entries == commands(1, 1)
    assert ready.must_sync
    assert (ready.messages, ready.messages_after) == ((), (AppendReply(1, A, B, 2, True, 0, 0),))
    assert ready.committed == ()
    assert core.raft.ready() is None
    core.persist(ready)
    core.work()
    assert core.committed == list(commands(1))


def test_a_heartbeat_is_answered_at_once_and_needs_no_sync_of_its_own() -> None:
    core = Lone(THREE, log=[1, 1])
    core.follow(B)
    core.raft.receive(Heartbeat(1, B, A, 2, 7))
    ready = core.take()
    assert ready.messages == (HeartbeatReply(1, A, B, 7),)
    assert ready.hard_state is not None
    assert (ready.hard_state.commit, ready.must_sync) == (2, False)
    assert ready.committed == commands(1, 1)


def test_doubled_and_overtaken_appends_change_nothing() -> None:
    core = Lone(THREE)
    first, second = Append(1, B, A, 0, 0, commands(1), 0), Append(1, B, A, 1, 1, commands(1, first=2), 1)
    assert core.hear(second) == [AppendReply(1, A, B, 1, False, 0, 0)]
    core.hear(first, second)
    assert core.hear(first, first, second) == [
        AppendReply(1, A, B, 1, True, 0, 0),
        AppendReply(1, A, B, 1, True, 0, 0),
        AppendReply(1, A, B, 2, True, 0, 0),
    ]
    assert (core.raft.last_index, core.raft.committed) == (2, 1)


def test_a_conflict_is_cut_away_and_answered_with_where_to_look() -> None:
    core = Lone(THREE, log=[1, 1, 2, 2, 2], term=3)
    assert core.hear(Append(4, B, A, 9, 4, (), 0)) == [AppendReply(4, A, B, 9, False, 5, 2)]
    assert core.hear(Append(4, B, A, 4, 1, (), 0)) == [AppendReply(4, A, B, 4, False, 2, 1)]
    core.hear(Append(4, B, A, 2, 1, commands(4, first=3), 0))
    assert (core.raft.last_index, core.raft.snapshot_at(0).index) == (3, 0)
    assert core.raft.entries(1, 10_000) == (*commands(1, 1), *commands(4, first=3))


def test_the_old_leaders_tail_is_not_committed_by_the_new_leaders_word() -> None:
    core = Lone(THREE, log=[1, 1, 1])
    core.hear(Append(2, B, A, 1, 1, (), 3))
    assert core.raft.committed == 1


def test_an_append_from_before_the_commit_is_answered_with_the_commit() -> None:
    core = Lone(THREE, log=[1, 1, 1], commit=3)
    core.hear(Heartbeat(1, B, A, 0, 0))
    assert core.hear(Append(1, B, A, 1, 1, commands(1, first=2), 2)) == [AppendReply(1, A, B, 3, True, 0, 0)]


@pytest.mark.parametrize(
    "entries",
    [
        commands(1, first=2),
        (*commands(1), *commands(1, first=3)),
        commands(2),
        commands(1, 0),
        (Entry(1, 1, Kind.CONFIGURATION, b"no configuration"),),
    ],
)
def test_an_append_that_no_leader_makes_is_ignored_and_counted(entries: tuple[Entry, ...]) -> None:
    core = Lone(THREE)
    assert core.hear(Append(1, B, A, 0, 0, entries, 0)) == []
    assert (core.raft.last_index, core.raft.contradictions) == (0, 1)


def test_a_commit_beyond_the_log_is_ignored_and_counted() -> None:
    core = Lone(THREE, log=[1])
    core.hear(Heartbeat(1, B, A, 5, 0))
    assert (core.raft.committed, core.raft.contradictions) == (0, 1)


def test_what_is_cut_away_while_the_disk_writes_it_is_not_applied() -> None:
    """The old leader's answer still goes out: when it was promised, it was true."""
    core = Lone(THREE)
    core.raft.receive(Append(1, B, A, 0, 0, commands(1, 1), 0))
    old = core.take()
    core.raft.receive(Append(2, C, A, 0, 0, commands(2), 1))
    new = core.take()
    assert new.entries == commands(2)
    core.persist(old)
    assert core.raft.ready() is None
    core.persist(new)
    core.work()
    assert core.committed == list(commands(2))


def test_batches_are_persisted_in_their_order() -> None:
    core = Lone(THREE)
    core.raft.receive(Append(1, B, A, 0, 0, commands(1), 0))
    core.take()
    core.raft.receive(Append(1, B, A, 1, 1, commands(1, first=2), 0))
    later = core.take()
    with pytest.raises(AssertionError, match="in the order"):
        core.persist(later)


def snapshot_to(core: Lone, index: int, term: int, *, of: int = 2) -> InstallSnapshot:
    return InstallSnapshot(of, B, A, Snapshot(index, term, voters(A, B)))


def test_a_snapshot_replaces_the_log_and_is_answered_when_it_is_durable() -> None:
    core = Lone(THREE, log=[1, 1])
    core.raft.receive(snapshot_to(core, 8, 2))
    core.raft.receive(Append(2, B, A, 8, 2, commands(2, first=9), 9))
    ready = core.take()
    assert ready.snapshot == Snapshot(8, 2, voters(A, B))
    assert ready.entries == commands(2, first=9)
    assert ready.messages_after == (AppendReply(2, A, B, 8, True, 0, 0), AppendReply(2, A, B, 9, True, 0, 0))
    assert ready.committed == ()
    core.persist(ready)
    assert core.raft.applied == 8
    core.work()
    assert core.committed == list(commands(2, first=9))
    assert core.raft.configuration == voters(A, B)


def test_a_doubled_snapshot_is_installed_once() -> None:
    core = Lone(THREE)
    core.raft.receive(snapshot_to(core, 8, 2))
    first = core.take()
    core.raft.receive(snapshot_to(core, 8, 2))
    second = core.take()
    assert second.snapshot is None
    assert second.messages_after == first.messages_after
    core.persist(first)
    core.persist(second)


def test_a_newer_snapshot_follows_one_that_is_being_written() -> None:
    core = Lone(THREE)
    core.raft.receive(snapshot_to(core, 8, 2))
    first = core.take()
    core.raft.receive(snapshot_to(core, 12, 2))
    second = core.take()
    assert second.snapshot == Snapshot(12, 2, voters(A, B))
    core.persist(first)
    assert core.raft.applied == 8
    core.persist(second)
    assert (core.raft.applied, core.raft.first_index) == (12, 13)


def test_a_snapshot_that_the_appends_overtook_only_commits() -> None:
    core = Lone(THREE)
    core.hear(Append(2, B, A, 0, 0, commands(1, 1, 2, 2), 1))
    assert core.hear(snapshot_to(core, 3, 2)) == [AppendReply(2, A, B, 3, True, 0, 0)]
    assert (core.raft.committed, core.raft.first_index, core.raft.last_index) == (3, 1, 4)
    assert core.hear(snapshot_to(core, 2, 1)) == [AppendReply(2, A, B, 3, True, 0, 0)]


def test_snapshots_of_an_old_leader_and_such_as_no_leader_sends_are_refused() -> None:
    core = Lone(THREE, term=5)
    assert core.hear(snapshot_to(core, 8, 2)) == [AppendReply(5, A, B, 0, False, 0, 0)]
    assert core.hear(snapshot_to(core, 8, 7, of=6)) == []
    assert core.hear(InstallSnapshot(6, B, A, Snapshot(8, 2, Configuration((B, A))))) == []
    assert (core.raft.first_index, core.raft.contradictions) == (1, 2)


def test_who_stands_follows_a_leader_of_its_term() -> None:
    for message in (
        Append(1, B, A, 0, 0, (), 0),
        Heartbeat(1, B, A, 0, 0),
        snapshot_to(Lone(THREE), 4, 1, of=1),
    ):
        core = Lone(THREE)
        core.stand()
        core.hear(message)
        assert (core.raft.role, core.raft.leader, core.raft.term) == (Role.FOLLOWER, B, 1)


def test_what_is_applied_and_durable_is_committed_after_a_restart_whatever_the_hint_was() -> None:
    core = Lone(THREE, log=[1, 1, 1], commit=99)
    assert core.raft.committed == 3
    core.work()
    assert core.committed == list(commands(1, 1, 1))
    assert only(AppendReply, core.work()) == []
