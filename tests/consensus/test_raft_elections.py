"""Elections: who stands, who votes for whom, whose vote counts, and when it may be said."""

from __future__ import annotations

import pytest
from lone_core import A, B, C, D, E, Lone, commands, only, voters

from knode.consensus.configuration import encoded
from knode.consensus.messages import (
    MOST,
    Append,
    Configuration,
    Entry,
    HardState,
    Heartbeat,
    InstallSnapshot,
    Kind,
    Message,
    PreVote,
    PreVoteReply,
    Snapshot,
    TimeoutNow,
    Vote,
    VoteReply,
)
from knode.consensus.raft import LAST, MAX_LEAP_ENTRIES, Raft
from knode.consensus.ready import Recovered, Role
from knode.consensus.settings import Settings

THREE = voters(A, B, C)


def test_a_single_voter_leads_after_one_tick_and_commits_at_once() -> None:
    core = Lone(voters(A))
    core.tick()
    assert core.raft.role is Role.LEADER
    position = core.raft.propose(b"x")
    assert core.work() == []
    assert core.committed[-1].data == b"x"
    assert core.raft.committed == position.index


def test_a_single_voters_own_vote_counts_once_it_is_durable() -> None:
    """Else its learner could get entries of a term that it then forgets, and begins again with others."""
    core = Lone(voters(A, learners=[B]))
    core.raft.tick()
    ready = core.take()
    assert ready.hard_state == HardState(1, A, 0)
    assert ready.must_sync
    assert core.raft.role is Role.CANDIDATE
    assert core.raft.ready() is None
    core.persist(ready)
    assert core.raft.role is Role.LEADER
    assert only(Append, core.work())


def test_an_earlier_write_does_not_make_a_later_vote_durable() -> None:
    core = Lone(voters(A, learners=[B]), term=3)
    core.hear(Vote(4, C, A, 0, 0, False))
    core.raft.receive(Vote(5, C, A, 0, 0, False))
    earlier = core.take()
    core.raft.tick()
    own = core.take()
    assert own.hard_state == HardState(6, A, 0)
    core.persist(earlier)
    assert core.raft.role is Role.CANDIDATE
    core.persist(own)
    assert core.raft.role is Role.LEADER


def test_who_waits_for_its_own_disk_does_not_stand_again() -> None:
    """However slow it is, the vote that it writes is for the present term."""
    for configuration in (voters(A), THREE):
        core = Lone(configuration)
        for _ in range(20):
            core.raft.tick()
        core.raft.receive(PreVoteReply(1, B, A, True))
        ready = core.take()
        for _ in range(100):
            core.raft.tick()
        assert (core.raft.term, core.raft.role) == (1, Role.CANDIDATE)
        assert core.raft.ready() is None
        core.persist(ready)
        core.hear(VoteReply(1, B, A, True))
        assert core.raft.role is Role.LEADER


def test_votes_are_asked_for_and_given_after_the_disk() -> None:
    core = Lone(THREE)
    core.raft.receive(Vote(4, B, A, 0, 0, False))
    ready = core.take()
    assert (ready.hard_state, ready.must_sync) == (HardState(4, B, 0), True)
    assert (ready.messages, ready.messages_after) == ((), (VoteReply(4, A, B, True),))
    core = Lone(THREE)
    for _ in range(19):
        core.raft.tick()
    core.raft.receive(PreVoteReply(1, B, A, True))
    ready = core.take()
    assert [type(message) for message in ready.messages] == [PreVote, PreVote]
    assert [type(message) for message in ready.messages_after] == [Vote, Vote]


def test_a_vote_is_kept_over_a_restart_between_persisting_and_sending() -> None:
    core = Lone(THREE)
    core.raft.receive(Vote(4, B, A, 0, 0, False))
    kept = core.take().hard_state
    assert kept is not None
    again = Lone(THREE, term=kept.term, vote=kept.vote)
    assert again.hear(Vote(4, C, A, 9, 4, False)) == [VoteReply(4, A, C, False)]
    assert again.hear(Vote(4, B, A, 0, 0, False)) == [VoteReply(4, A, B, True)]


@pytest.mark.parametrize(
    ("configuration", "granting", "wins"),
    [
        (THREE, [B], True),
        (voters(A, B), [], False),
        (voters(A, B), [B], True),
        (voters(A, B, C, D), [B], False),
        (voters(A, B, C, D), [B, B, B], False),
        (voters(A, B, C, D), [B, C], True),
        (voters(A, B, C, learners=[D, E]), [D, E], False),
        (voters(A, B, C), [D, E], False),
        (Configuration((A, B, C), (A, D, E)), [B, C], False),
        (Configuration((A, B, C), (A, D, E)), [D, E], False),
        (Configuration((A, B, C), (A, D, E)), [B, D], True),
    ],
)
def test_who_wins(configuration: Configuration, granting: list[bytes], wins: bool) -> None:
    core = Lone(configuration)
    core.stand()
    core.hear(*(VoteReply(core.raft.term, source, A, True) for source in granting))
    assert (core.raft.role is Role.LEADER) == wins


def test_half_of_an_even_cell_that_refuses_ends_the_candidacy() -> None:
    core = Lone(voters(A, B, C, D))
    core.stand()
    core.hear(VoteReply(1, B, A, False), VoteReply(1, B, A, False))
    assert core.raft.role is Role.CANDIDATE
    core.hear(VoteReply(1, C, A, False))
    assert core.raft.role is Role.FOLLOWER


def test_the_first_answer_counts_and_answers_of_another_term_do_not() -> None:
    core = Lone(THREE, term=5)
    core.stand()
    assert core.raft.term == 6
    core.hear(VoteReply(6, B, A, False), VoteReply(6, B, A, True), VoteReply(5, C, A, True))
    core.hear(PreVoteReply(6, C, A, True), PreVoteReply(7, C, A, True))
    assert core.raft.role is Role.CANDIDATE
    core.hear(VoteReply(6, C, A, True))
    assert core.raft.role is Role.LEADER


def test_pre_votes_of_another_time_do_not_count() -> None:
    core = Lone(THREE, term=5)
    core.tick(19)
    assert core.raft.role is Role.PRE_CANDIDATE
    core.hear(PreVoteReply(5, B, A, True), PreVoteReply(7, B, A, True), VoteReply(5, B, A, True))
    assert (core.raft.role, core.raft.term) == (Role.PRE_CANDIDATE, 5)
    core.hear(PreVoteReply(6, B, A, True))
    assert (core.raft.role, core.raft.term) == (Role.CANDIDATE, 6)


def test_a_pre_vote_moves_nobodys_term() -> None:
    core = Lone(THREE, term=5)
    assert core.hear(PreVote(9, B, A, 0, 0)) == [PreVoteReply(9, A, B, True)]
    assert core.hear(PreVote(9, C, A, 0, 0)) == [PreVoteReply(9, A, C, True)]
    assert core.hear(PreVote(4, C, A, 0, 0)) == [PreVoteReply(5, A, C, False)]
    assert (core.raft.term, core.raft.role) == (5, Role.FOLLOWER)


@pytest.mark.parametrize(
    ("index", "term", "granted"), [(2, 3, True), (9, 2, False), (1, 3, False), (1, 4, True)]
)
def test_only_a_log_that_is_as_good_gets_the_vote(index: int, term: int, granted: bool) -> None:
    core = Lone(THREE, log=[1, 3])
    assert core.hear(PreVote(8, B, A, index, term)) == [PreVoteReply(8 if granted else 3, A, B, granted)]
    assert core.hear(Vote(8, B, A, index, term, False)) == [VoteReply(8, A, B, granted)]


def test_nobody_votes_against_a_leader_that_it_hears() -> None:
    core = Lone(THREE, term=1)
    core.follow(B)
    against: list[Message] = [PreVote(9, C, A, 9, 9), Vote(9, C, A, 9, 9, False)]
    assert core.hear(*against) == []
    assert core.raft.term == 1
    core.tick(9)
    assert core.hear(*against) == []
    core.tick(1)
    assert core.hear(against[0]) == [PreVoteReply(9, A, C, True)]


def test_a_leader_ignores_who_would_take_its_place() -> None:
    core = Lone(THREE)
    core.lead()
    assert core.hear(PreVote(9, C, A, 9, 9), Vote(9, C, A, 9, 9, False)) == []
    assert core.raft.role is Role.LEADER


def test_what_the_leader_itself_wants_is_not_ignored() -> None:
    core = Lone(THREE, term=1)
    core.follow(B)
    assert core.hear(Vote(2, C, A, 0, 0, True)) == [VoteReply(2, A, C, True)]


def test_the_hint_that_the_leaders_link_ended_ends_its_lease_and_shortens_the_wait() -> None:
    core = Lone(THREE, term=1)
    core.follow(B)
    core.raft.lost(C)
    assert core.raft.leader == B
    core.raft.lost(B)
    assert core.raft.leader is None
    assert core.hear(PreVote(2, C, A, 0, 0)) == [PreVoteReply(2, A, C, True)]
    assert only(PreVote, core.tick(5))


def test_a_leader_that_is_heard_again_after_the_hint_is_followed_as_before() -> None:
    core = Lone(THREE, term=1)
    core.follow(B)
    core.raft.lost(B)
    core.follow(B)
    assert core.tick(18) == []


def test_repeated_hints_do_not_put_the_election_off() -> None:
    core = Lone(THREE, term=1)
    core.follow(B)
    for _ in range(5):
        core.raft.lost(B)
        assert core.raft.role is Role.FOLLOWER
        core.tick()
    assert core.raft.role is Role.PRE_CANDIDATE


@pytest.mark.parametrize("configuration", [voters(B, C), voters(B, C, learners=[A]), Configuration()])
def test_who_has_no_vote_never_stands_but_answers(configuration: Configuration) -> None:
    """It may have become a voter without knowing it."""
    core = Lone(configuration, term=1)
    assert core.tick(200) == []
    assert core.hear(TimeoutNow(1, B, A)) == []
    assert core.hear(Vote(2, B, A, 0, 0, False)) == [VoteReply(2, A, B, True)]


def test_who_is_voted_out_stands_until_that_is_committed() -> None:
    """Perhaps nobody else has the entry."""
    gone = Entry(1, 1, Kind.CONFIGURATION, encoded(voters(B)))
    for commit, stands in ((0, True), (1, False)):
        recovered = Recovered(HardState(1, b"", commit), Snapshot(0, 0, Configuration((B,), (A, B))), (gone,))
        raft = Raft(A, recovered, applied=0, choose=lambda n: n - 1, settings=Settings())
        for _ in range(20):
            raft.tick()
        assert (raft.role is Role.PRE_CANDIDATE) == stands


def test_timeout_now_is_obeyed_once_and_only_in_its_term() -> None:
    core = Lone(THREE, term=3)
    assert core.hear(TimeoutNow(2, B, A)) == []
    sent = core.hear(TimeoutNow(3, B, A), TimeoutNow(3, B, A))
    assert [(message.term, message.transfer) for message in only(Vote, sent)] == [(4, True), (4, True)]
    assert core.raft.term == 4


def test_an_older_term_gets_to_know_the_newer_one() -> None:
    core = Lone(THREE, term=7)
    for asked in (Append(3, B, A, 0, 0, (), 0), Heartbeat(3, B, A, 0, 0), Vote(3, B, A, 9, 3, False)):
        (answer,) = core.hear(asked)
        assert answer.term == 7
    assert core.raft.leader is None
    for reply in (VoteReply(3, B, A, True), PreVoteReply(3, B, A, True), TimeoutNow(3, B, A)):
        assert core.hear(reply) == []


def test_what_is_for_another_or_from_oneself_is_ignored() -> None:
    core = Lone(THREE)
    assert core.hear(Vote(4, B, C, 9, 9, False), Vote(4, A, A, 9, 9, False)) == []
    assert (core.raft.term, core.raft.contradictions) == (0, 2)


def test_a_second_leader_of_one_term_is_not_followed() -> None:
    core = Lone(THREE, term=1)
    core.follow(B)
    assert core.hear(Append(1, C, A, 0, 0, commands(1), 1)) == []
    assert (core.raft.leader, core.raft.last_index, core.raft.contradictions) == (B, 0, 1)
    core = Lone(THREE)
    core.lead()
    assert core.hear(Heartbeat(1, B, A, 0, 0)) == []
    assert (core.raft.role, core.raft.contradictions) == (Role.LEADER, 1)


def test_a_state_from_out_of_reach_is_not_taken() -> None:
    core = Lone(THREE, log=(1, 1), term=1)
    core.follow(B)
    for index, contradictions in ((2 + MAX_LEAP_ENTRIES + 1, 1), (2 + MAX_LEAP_ENTRIES, 1)):
        core.hear(InstallSnapshot(1, B, A, Snapshot(index, 1, THREE)))
        assert core.raft.contradictions == contradictions
    assert core.raft.last_index == 2 + MAX_LEAP_ENTRIES


@pytest.mark.parametrize("term", [LAST, LAST + 1, MOST])
def test_whoever_is_at_the_end_of_all_terms_stands_no_more_and_still_votes(term: int) -> None:
    core = Lone(THREE, term=term)
    core.tick(100)
    core.hear(TimeoutNow(term, B, A))
    assert (core.raft.role is Role.FOLLOWER) == (term > LAST)
    (answer,) = Lone(THREE, term=term).hear(Vote(term, B, A, 9, 9, False))
    assert isinstance(answer, VoteReply)
    assert (answer.term, answer.granted) == (term, True)
