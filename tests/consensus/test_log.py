"""The log in memory: what stands, what is cut away, and what the disk has of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lone_core import A, B, voters

from knode.consensus.configuration import encoded
from knode.consensus.log import ENTRY_OVERHEAD_BYTES, Log
from knode.consensus.messages import MAX_ENTRIES, Entry, HardState, Kind, Snapshot
from knode.consensus.ready import Recovered


def entries_of(*terms: int, first: int = 1) -> tuple[Entry, ...]:
    return tuple(Entry(term, index, Kind.COMMAND, b"") for index, term in enumerate(terms, start=first))


def log_of(*terms: int, commit: int = 0, snapshot: Snapshot | None = None) -> Log:
    snapshot = snapshot or Snapshot()
    held = entries_of(*terms, first=snapshot.index + 1)
    return Log(Recovered(HardState(commit=commit), snapshot, held), snapshot.index)


def terms_of(log: Log) -> list[int | None]:
    return [log.term_at(index) for index in range(log.first_index, log.last_index + 1)]


some_terms = st.lists(st.integers(1, 6), max_size=12).map(sorted)


@st.composite
def two_logs(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Two logs as Raft makes them: equal up to a place, and never the same term at one index behind it."""
    shared = draw(some_terms)
    last = shared[-1] if shared else 1
    mine = sorted(draw(st.lists(st.sampled_from([last, last + 1, last + 3]), max_size=6)))
    theirs = sorted(draw(st.lists(st.sampled_from([last + 2, last + 4]), max_size=6)))
    return shared + mine, shared + theirs


@given(two_logs(), st.data())
def test_merging_a_leaders_entries_makes_the_logs_equal_there(
    logs: tuple[list[int], list[int]], data: st.DataObject
) -> None:
    mine, theirs = logs
    log, leader = log_of(*mine), log_of(*theirs)
    shared = max(index for index in range(min(len(mine), len(theirs)) + 1) if mine[:index] == theirs[:index])
    previous = data.draw(st.integers(0, shared))
    count = data.draw(st.integers(0, len(theirs) - previous))
    sent = entries_of(*theirs)[previous : previous + count]
    log.merge(sent)
    assert terms_of(log)[: previous + count] == theirs[: previous + count]
    if previous + count <= shared:
        assert terms_of(log) == mine, "nothing was in conflict, so nothing is cut away"
    # Doing it again, or an earlier part of it later, changes nothing.
    before = terms_of(log)
    log.merge(sent)
    log.merge(sent[: count // 2])
    assert terms_of(log) == before
    # And log matching: one entry in common, all before it in common.
    for index in range(1, min(log.last_index, leader.last_index) + 1):
        if log.term_at(index) == leader.term_at(index):
            assert terms_of(log)[:index] == terms_of(leader)[:index]


@given(two_logs())
def test_the_hint_never_skips_what_agrees_and_always_leads_there(
    logs: tuple[list[int], list[int]],
) -> None:
    """The leader's next try is never below the last place that agrees, and gets there in few rounds."""
    mine, theirs = logs
    follower, leader = log_of(*mine), log_of(*theirs)
    shared = max(i for i in range(min(len(mine), len(theirs)) + 1) if mine[:i] == theirs[:i])
    previous, rounds = leader.last_index, 0
    while not follower.matches(previous, leader.term_at(previous) or 0):
        hint = follower.last_agreeing(previous, leader.term_at(previous) or 0)
        tried, previous = previous, min(leader.last_agreeing(*hint)[0], previous - 1)
        assert shared <= previous < tried
        rounds += 1
    assert rounds <= len({*mine, *theirs}) + 1


@given(some_terms, st.integers(0, 14), st.integers(0, 8))
def test_last_agreeing_is_the_last_place_of_no_later_term(terms: list[int], index: int, term: int) -> None:
    log = log_of(*terms)
    places = [i for i in range(min(index, len(terms)) + 1) if (log.term_at(i) or 0) <= term]
    assert log.last_agreeing(index, term) == (places[-1], log.term_at(places[-1]))


def test_last_agreeing_before_the_snapshot_is_not_known() -> None:
    log = log_of(5, 5, snapshot=Snapshot(10, 4, voters(A)))
    assert log.last_agreeing(12, 4) == (10, 4)
    assert log.last_agreeing(12, 3) == (9, 0)
    assert log.last_agreeing(7, 9) == (7, 0)


def test_what_is_committed_is_never_replaced() -> None:
    log = log_of(1, 1, 1, commit=2)
    with pytest.raises(AssertionError, match="never replaced"):
        log.merge(entries_of(2, first=2))
    with pytest.raises(AssertionError, match="never go back"):
        log.commit_to(1)
    with pytest.raises(AssertionError, match="beyond the log"):
        log.commit_to(4)
    with pytest.raises(AssertionError, match="takes back"):
        log.reset(Snapshot(2, 1, voters(A)))


def test_a_gap_and_a_term_that_goes_back_are_refused() -> None:
    log = log_of(2, 2)
    with pytest.raises(AssertionError, match="no gap"):
        log.append(entries_of(2, first=4))
    with pytest.raises(AssertionError, match="terms never go back"):
        log.append(entries_of(1, first=3))


def test_what_is_cut_away_while_it_is_written_does_not_count() -> None:
    """Also not when the same entries come back: the disk will cut them away in between."""
    log = log_of(1)
    log.append(entries_of(2, 2, first=2))
    log.take()
    log.merge(entries_of(3, first=2))
    log.take()
    log.merge(entries_of(4, 4, first=2))
    log.take()
    log.written(None)
    assert log.durable == 1
    log.written(None)
    assert log.durable == 1
    log.written(None)
    assert log.durable == 3


def test_what_is_on_disk_and_cut_away_is_not_durable_any_more() -> None:
    log = log_of(1, 1, 1)
    assert log.durable == 3
    log.merge(entries_of(2, first=2))
    assert log.durable == 1
    assert log.take() == (None, entries_of(2, first=2))
    log.written(None)
    assert log.durable == 2


def test_committed_entries_are_handed_out_once_they_are_durable() -> None:
    log = log_of()
    log.append(entries_of(1, 1, 1))
    log.take()
    log.commit_to(2)
    assert log.hand_committed() == ()
    log.written(None)
    assert log.hand_committed() == entries_of(1, 1)
    assert log.hand_committed() == ()
    with pytest.raises(AssertionError, match="handed out"):
        log.applied_to(3)


def test_a_snapshot_replaces_the_log_and_is_written_first() -> None:
    log = log_of(1, 1, 1, commit=1)
    log.hand_committed()
    log.reset(Snapshot(5, 2, voters(A, B)))
    log.append(entries_of(2, first=6))
    log.commit_to(6)
    assert log.hand_committed() == (), "it is not durable"
    assert log.take() == (Snapshot(5, 2, voters(A, B)), entries_of(2, first=6))
    assert log.take() == (None, ())
    log.written(Snapshot(5, 2, voters(A, B)))
    assert log.applied == 5
    assert log.hand_committed() == entries_of(2, first=6)
    assert log.configuration == voters(A, B)


def test_configurations_follow_the_log() -> None:
    log = log_of(1, snapshot=Snapshot(3, 1, voters(A)))
    log.append((Entry(1, 5, Kind.CONFIGURATION, encoded(voters(A, B))),))
    log.append(entries_of(1, first=6))
    assert (log.configuration, log.configuration_index) == (voters(A, B), 5)
    assert log.possible_configurations == [voters(A), voters(A, B)]
    log.merge(entries_of(2, first=5))
    assert (log.configuration, log.configuration_index) == (voters(A), 3)


def test_compaction_keeps_what_follows_and_the_configuration_of_then() -> None:
    log = log_of(1, 1)
    log.append((Entry(1, 3, Kind.CONFIGURATION, encoded(voters(A, B))),))
    log.append(entries_of(2, 2, first=4))
    log.take()
    log.written(None)
    log.commit_to(5)
    log.hand_committed()
    log.applied_to(4)
    with pytest.raises(AssertionError, match="only what is applied"):
        log.compact(log.snapshot_at(5))
    assert log.snapshot_at(2).configuration != voters(A, B)
    log.compact(log.snapshot_at(4))
    assert log.snapshot == Snapshot(4, 2, voters(A, B))
    assert (log.first_index, terms_of(log), log.term_at(4), log.term_at(3)) == (5, [2], 2, None)
    log.compact(Snapshot(2, 1, voters(A)))
    assert log.first_index == 5, "an older one changes nothing"
    assert log.configuration == voters(A, B)


def test_what_is_sent_at_once_is_bounded() -> None:
    big = b"x" * 1000
    log = log_of()
    log.append([Entry(1, index, Kind.COMMAND, big) for index in range(1, 2001)])
    one = 1000 + ENTRY_OVERHEAD_BYTES
    assert len(log.between(1, 10 * one)) == 10
    assert len(log.between(1, 10 * one - 1)) == 9
    assert len(log.between(1, 1)) == 1
    assert len(log.between(1, 10**9)) == MAX_ENTRIES
    assert log.between(2001, 10**9) == ()
