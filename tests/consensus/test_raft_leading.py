"""A leader: how it feeds followers, what it commits, and what it refuses."""

from __future__ import annotations

import pytest
from lone_core import A, B, C, D, E, Lone, only, voters

from knode.consensus.log import ENTRY_OVERHEAD_BYTES
from knode.consensus.messages import (
    Append,
    AppendReply,
    Configuration,
    Heartbeat,
    HeartbeatReply,
    InstallSnapshot,
    TimeoutNow,
    Vote,
    VoteReply,
)
from knode.consensus.progress import Feeding
from knode.consensus.ready import Role
from knode.consensus.refusals import ChangeInProgress, NotLeader, NotVoter, QueueFull, Transferring
from knode.consensus.settings import Settings

THREE = voters(A, B, C)


def leader(configuration: Configuration = THREE, *, settings: Settings | None = None) -> Lone:
    """A leader of term 1 whose first entry everyone has."""
    core = Lone(configuration, settings=settings)
    core.lead()
    core.accept(*(replica for replica in (B, C, D, E) if replica in core.raft.progress))
    assert core.raft.committed == 1
    return core


# Committing


def test_an_entry_is_committed_when_a_majority_has_it_durably() -> None:
    core = leader(voters(A, B, C, D, E))
    core.raft.propose(b"x")
    core.work()
    core.accept(B)
    core.accept(B)
    assert core.raft.committed == 1
    core.accept(C)
    assert core.raft.committed == 2


def test_half_of_an_even_cell_is_no_majority() -> None:
    core = leader(voters(A, B, C, D))
    core.raft.propose(b"x")
    core.work()
    core.accept(B)
    assert core.raft.committed == 1
    core.accept(C)
    assert core.raft.committed == 2


def test_the_leader_counts_itself_only_when_its_disk_has_it() -> None:
    core = leader()
    core.raft.propose(b"x")
    ready = core.take()
    assert [message.entries for message in only(Append, ready.messages)] == [ready.entries] * 2
    core.raft.receive(AppendReply(1, B, A, 2, True, 0, 0))
    assert core.raft.committed == 1
    core.raft.receive(AppendReply(1, C, A, 2, True, 0, 0))
    assert core.raft.committed == 2, "the others alone are a majority"
    core.raft.propose(b"y")
    later = core.take()
    assert later.committed == (), "but here it is applied when it is durable here"
    core.raft.receive(AppendReply(1, B, A, 3, True, 0, 0))
    core.persist(ready)
    assert core.raft.committed == 2
    core.persist(later)
    assert core.raft.committed == 3


def test_older_entries_are_not_committed_by_counting() -> None:
    """Figure 8: another leader may still replace them."""
    core = Lone(voters(A, B, C, D, E), log=[1, 2])
    core.lead()
    core.accept(B, C, D, E, index=2)
    assert core.raft.committed == 0
    core.accept(B, C, index=3)
    assert core.raft.committed == 3


def test_answers_of_learners_strangers_and_other_terms_do_not_count() -> None:
    core = leader(voters(A, B, C, learners=[D]))
    core.raft.propose(b"x")
    core.work()
    core.accept(D, E)
    core.hear(AppendReply(0, B, A, 2, True, 0, 0))
    assert core.raft.committed == 1
    assert core.raft.progress[D].match == 2
    assert E not in core.raft.progress


def test_an_answer_that_claims_more_than_there_is_is_ignored_and_counted() -> None:
    core = leader()
    core.accept(B, index=99)
    core.beat(B, read=99)
    assert (core.raft.progress[B].match, core.raft.contradictions) == (1, 2)


def test_a_newer_term_in_any_answer_ends_the_leadership() -> None:
    for answer in (
        AppendReply(5, B, A, 0, False, 0, 0),
        HeartbeatReply(5, B, A, 0),
        VoteReply(5, B, A, False),
        Vote(5, B, A, 9, 9, True),
    ):
        core = leader()
        core.hear(answer)
        assert (core.raft.role, core.raft.term) == (Role.FOLLOWER, 5)
        with pytest.raises(NotLeader):
            core.raft.propose(b"x")


# Feeding


def test_one_append_goes_to_an_unknown_follower_until_it_answers() -> None:
    core = Lone(THREE)
    core.lead()
    assert core.raft.progress[B].feeding is Feeding.PROBE
    core.raft.propose(b"x")
    assert only(Append, core.work()) == []
    (append,) = only(Append, core.beat(B))
    assert (append.target, append.previous_index, len(append.entries)) == (B, 0, 2)
    core.accept(B)
    core.raft.propose(b"y")
    core.raft.propose(b"z")
    (append,) = only(Append, core.work())
    assert (append.target, append.previous_index, len(append.entries)) == (B, 2, 2)


def test_a_refusal_leads_to_where_the_logs_agree() -> None:
    core = Lone(THREE, log=[1, 1, 3, 3, 4])
    core.lead()
    (append,) = only(Append, core.refuse(B, 5, 5, 2))
    assert (append.previous_index, append.previous_term) == (2, 1)
    assert only(Append, core.refuse(B, 5, 5, 2)) == [], "the same again says nothing new"
    (append,) = only(Append, core.refuse(B, 2, 0, 0))
    assert (append.previous_index, append.previous_term, len(append.entries)) == (0, 0, 6)


def test_a_refusal_of_what_is_known_to_be_there_is_old() -> None:
    core = leader()
    assert core.refuse(B, 1, 0, 0) == []
    assert core.raft.progress[B].feeding is Feeding.REPLICATE
    core.raft.propose(b"x")
    core.raft.propose(b"y")
    core.work()
    (append,) = only(Append, core.refuse(B, 3, 1, 1))
    assert (append.previous_index, len(append.entries)) == (1, 2)


def test_what_is_in_flight_is_bounded_by_number() -> None:
    one = ENTRY_OVERHEAD_BYTES + 1
    core = leader(settings=Settings(max_in_flight=2, max_append_bytes=one))
    for _ in range(5):
        core.raft.propose(b"x")
    assert [message.entries[0].index for message in only(Append, core.work()) if message.target == B] == [
        2,
        3,
    ]
    assert [message.entries[0].index for message in only(Append, core.accept(B, index=2))] == [4]


def test_what_is_in_flight_is_bounded_by_bytes() -> None:
    one = ENTRY_OVERHEAD_BYTES + 1
    core = leader(settings=Settings(max_in_flight_bytes=3 * one, max_append_bytes=one))
    for _ in range(9):
        core.raft.propose(b"x")
    assert len([message for message in only(Append, core.work()) if message.target == B]) == 3


def test_what_no_quorum_has_is_bounded() -> None:
    one = ENTRY_OVERHEAD_BYTES + 1
    core = leader(settings=Settings(max_uncommitted_bytes=3 * one))
    for _ in range(3):
        core.raft.propose(b"x")
    with pytest.raises(QueueFull):
        core.raft.propose(b"x")
    core.work()
    core.accept(B, index=2)
    core.raft.propose(b"x")
    core.work()
    core.accept(B)
    assert core.raft.uncommitted_bytes == 0
    core.raft.propose(b"x" * 10 * one)


def test_what_an_earlier_leader_left_uncommitted_counts() -> None:
    core = Lone(THREE, log=[1, 1], settings=Settings(max_uncommitted_bytes=100))
    core.lead()
    assert core.raft.uncommitted_bytes == 3 * ENTRY_OVERHEAD_BYTES + 2
    with pytest.raises(QueueFull):
        core.raft.propose(b"x")


def test_a_commit_is_told_with_the_next_entry_and_not_by_itself() -> None:
    core = leader()
    core.raft.propose(b"x")
    core.work()
    assert core.accept(B) == []
    core.raft.propose(b"y")
    told = only(Append, core.work())
    assert [(message.target, len(message.entries), message.commit) for message in told] == [
        (B, 1, 2),
        (C, 1, 2),
    ]


def test_a_heartbeat_promises_no_more_than_the_follower_has() -> None:
    core = leader()
    core.raft.propose(b"x")
    core.work()
    core.accept(B)
    beats = only(Heartbeat, core.tick(2))
    assert [(message.target, message.commit) for message in beats] == [(B, 2), (C, 1)]


def test_a_lost_append_is_found_by_the_second_heartbeat() -> None:
    core = leader()
    core.raft.propose(b"x")
    core.work()
    core.beat(C)
    (asked,) = only(Append, core.beat(C))
    assert (asked.previous_index, asked.entries) == (2, ())
    (again,) = only(Append, core.refuse(C, 2, 1, 1))
    assert [entry.index for entry in again.entries] == [2]


def test_after_the_link_ended_what_was_in_flight_goes_again() -> None:
    core = leader()
    core.raft.propose(b"x")
    core.work()
    core.raft.lost(C)
    (again,) = only(Append, core.work())
    assert (again.target, again.entries[0].index) == (C, 2)


# Snapshots


def compacted() -> Lone:
    """A leader that has forgotten what C, in PROBE at 0, would need."""
    core = Lone(THREE)
    core.lead()
    for _ in range(4):
        core.raft.propose(b"x")
    core.work()
    core.accept(B)
    core.raft.compact(core.raft.snapshot_at(3))
    return core


def test_who_needs_what_is_forgotten_gets_one_snapshot() -> None:
    core = compacted()
    sent = core.refuse(C, 0, 0, 0) + core.beat(C)
    (install,) = only(InstallSnapshot, sent)
    assert (install.target, install.snapshot.index) == (C, 3)
    assert core.raft.progress[C].feeding is Feeding.SNAPSHOT
    core.raft.propose(b"x")
    assert [message for message in core.work() + core.beat(C) if isinstance(message, InstallSnapshot)] == []
    (append,) = only(Append, [m for m in core.accept(C, index=3) if m.target == C])
    assert (append.previous_index, len(append.entries)) == (3, 3)


def test_a_snapshot_of_a_later_state_than_was_asked_for_does_as_well() -> None:
    core = compacted()
    core.beat(C)
    (append,) = only(Append, [m for m in core.accept(C, index=4) if m.target == C])
    assert (append.previous_index, len(append.entries)) == (4, 1)


def test_a_failed_snapshot_is_tried_again_when_the_follower_is_heard() -> None:
    core = compacted()
    core.beat(C)
    core.raft.snapshot_failed(C)
    assert core.work() == []
    assert only(InstallSnapshot, core.beat(C))


def test_a_snapshot_whose_answer_was_lost_is_found_out() -> None:
    core = compacted()
    core.beat(C)
    (asked,) = [m for m in only(Append, core.beat(C)) if m.target == C]
    assert (asked.previous_index, asked.entries) == (3, ())
    core.accept(C, index=3)
    assert core.raft.progress[C].feeding is Feeding.REPLICATE


def test_a_follower_with_an_old_tail_is_not_sent_the_snapshot_again_meanwhile() -> None:
    """It refuses in a term older than the snapshot's, so it has not installed it."""
    core = Lone(THREE, log=[1, 3])
    core.lead()
    core.raft.propose(b"x")
    core.work()
    core.accept(B)
    core.raft.compact(core.raft.snapshot_at(3))
    assert only(InstallSnapshot, core.beat(C))
    assert core.refuse(C, 3, 3, 2) == []
    assert core.raft.progress[C].feeding is Feeding.SNAPSHOT


def test_nobody_there_gets_no_snapshot_until_it_is_heard() -> None:
    core = compacted()
    for _ in range(12):
        core.beat(B)
        core.tick()
    assert not core.raft.progress[C].active
    core.raft.lost(C)
    assert only(InstallSnapshot, core.work()) == []
    assert only(InstallSnapshot, core.beat(C))


# Check-quorum


def test_a_leader_that_hears_no_majority_for_an_election_timeout_steps_down() -> None:
    core = leader(voters(A, B, C, learners=[D]))
    core.tick(9)
    core.beat(D)
    assert core.raft.role is Role.LEADER
    core.tick(1)
    assert (core.raft.role, core.raft.leader, core.raft.term) == (Role.FOLLOWER, None, 1)


def test_one_of_two_others_is_enough() -> None:
    core = leader()
    for _ in range(50):
        core.tick()
        core.beat(B)
    assert core.raft.role is Role.LEADER
    assert [status.active for status in core.raft.progress.values()] == [True, False]


def test_during_a_joint_configuration_both_halves_must_be_heard() -> None:
    core = leader()
    core.raft.change(voters(A, D, E))
    for _ in range(9):
        core.tick()
        core.beat(B, C)
    assert core.raft.role is Role.LEADER
    core.tick()
    assert core.raft.role is Role.FOLLOWER


# Reads


def test_a_read_needs_an_answer_to_a_heartbeat_that_was_sent_after_it() -> None:
    core = leader()
    first = core.raft.read()
    assert {message.read for message in only(Heartbeat, core.work())} == {first}
    second = core.raft.read()
    core.beat(B, read=first)
    assert [(read.number, read.index) for read in core.reads] == [(first, 1)]
    core.beat(B, read=first)
    core.beat(C, read=first)
    assert len(core.reads) == 1
    core.beat(C, read=second)
    assert [read.number for read in core.reads] == [first, second]


def test_a_read_waits_for_an_entry_of_the_leaders_term() -> None:
    core = Lone(THREE, log=[1], commit=1)
    core.lead()
    number = core.raft.read()
    core.work()
    core.beat(B, C, read=number)
    assert core.reads == []
    core.accept(B)
    assert [(read.number, read.index) for read in core.reads] == [(number, 2)]


def test_learners_and_strangers_confirm_no_read() -> None:
    core = leader(voters(A, B, C, learners=[D]))
    number = core.raft.read()
    core.work()
    core.beat(D, E, read=number)
    assert core.reads == []


def test_a_read_of_a_single_voter_is_confirmed_at_once() -> None:
    core = Lone(voters(A))
    core.tick()
    number = core.raft.read()
    core.work()
    assert [read.number for read in core.reads] == [number]


def test_reads_are_bounded_and_those_of_an_ended_leadership_never_come() -> None:
    core = leader(settings=Settings(max_reads=2))
    numbers = [core.raft.read(), core.raft.read()]
    with pytest.raises(QueueFull):
        core.raft.read()
    core.hear(AppendReply(5, B, A, 0, False, 0, 0))
    with pytest.raises(NotLeader):
        core.raft.read()
    core.lead()
    core.accept(B)
    assert core.raft.read() > max(numbers), "an old answer cannot confirm a new read"
    core.beat(B, C, read=numbers[-1])
    assert core.reads == []


def test_reads_that_are_confirmed_and_not_taken_count_as_well() -> None:
    core = Lone(voters(A), settings=Settings(max_reads=2))
    core.tick()
    core.raft.read()
    core.raft.read()
    with pytest.raises(QueueFull):
        core.raft.read()
    core.work()
    core.raft.read()


# Transfer


def test_a_transfer_waits_until_the_target_has_the_log() -> None:
    core = leader()
    core.raft.propose(b"x")
    core.raft.transfer(B)
    assert only(TimeoutNow, core.work()) == []
    with pytest.raises(Transferring):
        core.raft.propose(b"y")
    with pytest.raises(Transferring):
        core.raft.change(voters(A, B))
    assert only(TimeoutNow, core.accept(C)) == []
    assert only(TimeoutNow, core.accept(B)) == [TimeoutNow(1, A, B)]
    assert only(TimeoutNow, core.accept(B)) == []


def test_a_transfer_is_given_up_after_an_election_timeout() -> None:
    core = leader()
    core.raft.transfer(B)
    for _ in range(10):
        assert core.raft.transferring_to == B
        core.beat(B, C)
        core.tick()
    assert core.raft.transferring_to is None
    core.raft.propose(b"x")


def test_only_another_voter_can_be_given_the_leadership() -> None:
    core = leader(voters(A, B, learners=[D]))
    for to in (A, D, E):
        with pytest.raises(NotVoter):
            core.raft.transfer(to)
    assert core.raft.transferring_to is None


# Changing who votes


def test_a_change_goes_through_a_joint_configuration_by_itself() -> None:
    core = leader()
    core.raft.change(voters(A, B, D))
    assert core.raft.configuration == Configuration((A, B, D), (A, B, C))
    assert core.raft.is_joint
    core.work()
    core.accept(C)
    assert core.raft.committed == 1, "one of the new half"
    core.accept(D, index=2)
    assert core.raft.committed == 2
    assert core.raft.configuration == voters(A, B, D)
    assert core.raft.last_index == 3
    with pytest.raises(ChangeInProgress):
        core.raft.change(voters(A))
    core.accept(C, index=3)
    assert core.raft.committed == 2, "C has no vote any more"
    core.accept(B, index=3)
    assert core.raft.committed == 3
    assert C not in core.raft.progress
    core.raft.change(voters(A, B))


def test_who_leaves_is_fed_until_that_is_committed_and_told_of_it() -> None:
    core = leader()
    core.raft.change(voters(A, B))
    core.work()
    left = [m for m in only(Append, core.accept(B, C)) if m.target == C]
    assert [entry.index for message in left for entry in message.entries] == [3]
    core.accept(C)
    (farewell,) = [m for m in only(Append, core.accept(B)) if m.target == C]
    assert farewell.commit == 3
    assert [m for m in core.tick(4) if m.target == C] == []


def test_a_newcomer_gets_the_log_at_once() -> None:
    core = leader()
    core.raft.change(voters(A, B, C, learners=[D]))
    (append,) = [m for m in only(Append, core.work()) if m.target == D]
    (append,) = only(Append, core.refuse(D, append.previous_index, 0, 0))
    assert (append.previous_index, len(append.entries)) == (0, 2)


def test_a_leader_that_leaves_leads_until_that_is_committed_and_hands_over() -> None:
    core = leader()
    core.raft.change(voters(B, C))
    core.work()
    core.accept(B, C)
    assert core.raft.configuration == voters(B, C)
    core.raft.propose(b"x")
    core.work()
    core.accept(B, index=3)
    assert (core.raft.role, core.raft.committed) == (Role.LEADER, 2), "its own copy does not count"
    sent = core.accept(C, index=4)
    assert (core.raft.role, core.raft.committed) == (Role.FOLLOWER, 3)
    assert only(TimeoutNow, sent) == [TimeoutNow(1, A, C)]
    assert core.tick(100) == []


def test_a_new_leader_ends_the_joint_configuration_that_it_finds() -> None:
    core = Lone(Configuration((A, B), (A, B, C)))
    core.lead()
    with pytest.raises(ChangeInProgress):
        core.raft.change(voters(A))
    core.accept(B, index=1)
    assert core.raft.configuration == voters(A, B)


def test_no_change_before_an_entry_of_the_own_term_is_committed() -> None:
    core = Lone(THREE)
    core.lead()
    with pytest.raises(ChangeInProgress):
        core.raft.change(voters(A, B))
    core.accept(B)
    core.raft.change(voters(A, B))


def test_what_is_no_configuration_changes_nothing() -> None:
    core = leader()
    for wrong in (Configuration(), Configuration((B, A)), Configuration((A,), (B,))):
        with pytest.raises(ValueError, match=r"sorted|needs a voter|cannot be joint"):
            core.raft.change(wrong)
    assert core.raft.last_index == 1


def test_who_does_not_lead_refuses_everything() -> None:
    core = Lone(THREE)
    core.follow(B)
    for asked in (
        lambda: core.raft.propose(b"x"),
        lambda: core.raft.change(voters(A)),
        core.raft.read,
        lambda: core.raft.transfer(B),
    ):
        with pytest.raises(NotLeader):
            asked()
    assert core.raft.progress == {}
