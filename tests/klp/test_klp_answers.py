"""At most once: whatever is asked again, in whatever order, over whatever link, runs once."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from klp_pair import ALICE_BOOT, BOB_BOOT, request, seed

from knode.errors import Code
from knode.klp import Answered, Answers, Failure, Fresh, Refused, Response, Running, limits

ALICE = seed("alice raw key")
DAVE = seed("dave raw key")
LATER_BOOT = seed("alice, restarted")[:16]


def refusal_of(verdict: object) -> Code:
    assert isinstance(verdict, Refused), verdict
    return verdict.code


def test_asked_again_it_runs_and_then_is_answered_from_memory() -> None:
    answers = Answers(BOB_BOOT)
    assert answers.begin(ALICE, ALICE_BOOT, request(1), 0.0) == Fresh()
    assert answers.begin(ALICE, ALICE_BOOT, request(1), 0.1) == Running()
    answers.finish(ALICE, ALICE_BOOT, 1, Response(1, b"done"), 0.2)
    assert answers.begin(ALICE, ALICE_BOOT, request(1), 0.3) == Answered(Response(1, b"done"))


def test_a_failure_is_an_answer_too() -> None:
    answers = Answers(BOB_BOOT)
    answers.begin(ALICE, ALICE_BOOT, request(1), 0.0)
    failure = Failure(1, "NO_AGENT", "there is none", "")
    answers.finish(ALICE, ALICE_BOOT, 1, failure, 0.1)
    assert answers.begin(ALICE, ALICE_BOOT, request(1), 0.2) == Answered(failure)


def test_a_request_to_another_boot_is_unknown_and_not_run() -> None:
    answers = Answers(seed("bob, restarted")[:16])
    assert refusal_of(answers.begin(ALICE, ALICE_BOOT, request(1), 0.0)) is Code.UNKNOWN


def test_sources_and_boots_have_counters_of_their_own() -> None:
    answers = Answers(BOB_BOOT)
    for source, boot in ((ALICE, ALICE_BOOT), (ALICE, LATER_BOOT), (DAVE, ALICE_BOOT)):
        assert answers.begin(source, boot, request(1), 0.0) == Fresh()


def test_an_acknowledged_request_never_runs_again() -> None:
    answers = Answers(BOB_BOOT)
    answers.begin(ALICE, ALICE_BOOT, request(1), 0.0)
    answers.finish(ALICE, ALICE_BOOT, 1, Response(1, b""), 0.1)
    answers.acknowledge(ALICE, ALICE_BOOT, (1, 2, 99))
    answers.acknowledge(DAVE, ALICE_BOOT, (1,))
    assert refusal_of(answers.begin(ALICE, ALICE_BOOT, request(1), 0.2)) is Code.UNKNOWN
    assert answers.begin(ALICE, ALICE_BOOT, request(2), 0.2) == Fresh()


def test_acknowledged_while_it_runs_it_still_counts_until_it_is_finished() -> None:
    answers = Answers(BOB_BOOT)
    share = limits.ANSWERS // limits.SOURCE_SHARE
    for counter in range(1, share + 1):
        assert answers.begin(ALICE, ALICE_BOOT, request(counter), 0.0) == Fresh()
        answers.acknowledge(ALICE, ALICE_BOOT, (counter,))
    assert refusal_of(answers.begin(ALICE, ALICE_BOOT, request(1), 0.1)) is Code.UNKNOWN
    assert refusal_of(answers.begin(ALICE, ALICE_BOOT, request(share + 1), 0.1)) is Code.RATE_LIMITED
    answers.finish(ALICE, ALICE_BOOT, 1, Response(1, b""), 0.2)
    assert answers.begin(ALICE, ALICE_BOOT, request(share + 1), 0.3) == Fresh()


def test_an_answer_is_kept_for_its_ttl_and_a_minute() -> None:
    answers = Answers(BOB_BOOT)
    answers.begin(ALICE, ALICE_BOOT, request(1, ttl_ms=1000), 100.0)
    answers.finish(ALICE, ALICE_BOOT, 1, Response(1, b"x"), 100.5)
    answers.expire(160.9)
    assert answers.begin(ALICE, ALICE_BOOT, request(1), 160.9) == Answered(Response(1, b"x"))
    answers.expire(161.0)
    assert refusal_of(answers.begin(ALICE, ALICE_BOOT, request(1), 161.0)) is Code.UNKNOWN


def test_a_request_that_runs_is_not_forgotten_however_long_it_takes() -> None:
    answers = Answers(BOB_BOOT)
    answers.begin(ALICE, ALICE_BOOT, request(1), 0.0)
    answers.expire(10_000.0)
    assert answers.begin(ALICE, ALICE_BOOT, request(1), 10_000.0) == Running()
    answers.finish(ALICE, ALICE_BOOT, 1, Response(1, b""), 10_001.0)
    assert refusal_of(answers.begin(ALICE, ALICE_BOOT, request(1), 10_001.0)) is Code.UNKNOWN


def test_a_newer_boot_leaves_the_answers_of_the_older_one() -> None:
    answers = Answers(BOB_BOOT)
    answers.begin(ALICE, ALICE_BOOT, request(1), 0.0)
    answers.finish(ALICE, ALICE_BOOT, 1, Response(1, b"x"), 0.1)
    answers.begin(ALICE, LATER_BOOT, request(1), 0.2)
    assert answers.begin(ALICE, ALICE_BOOT, request(1), 0.3) == Answered(Response(1, b"x"))


def test_what_4096_later_requests_overtook_is_refused_without_being_run() -> None:
    answers = Answers(BOB_BOOT)
    answers.begin(ALICE, ALICE_BOOT, request(limits.ANSWERS + 1), 0.0)
    assert refusal_of(answers.begin(ALICE, ALICE_BOOT, request(1), 0.1)) is Code.UNKNOWN
    assert answers.begin(ALICE, ALICE_BOOT, request(2), 0.1) == Fresh()


def test_a_huge_counter_costs_nothing_and_hurts_its_source_alone() -> None:
    answers = Answers(BOB_BOOT)
    answers.begin(ALICE, ALICE_BOOT, request(1), 0.0)
    tracemalloc.start()
    answers.begin(ALICE, ALICE_BOOT, request(2**64 - 1), 0.1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000
    assert answers.begin(ALICE, ALICE_BOOT, request(1), 0.2) == Running()
    assert refusal_of(answers.begin(ALICE, ALICE_BOOT, request(2), 0.2)) is Code.UNKNOWN
    assert answers.begin(DAVE, ALICE_BOOT, request(2), 0.2) == Fresh()


def test_a_request_refused_at_a_limit_may_be_asked_again() -> None:
    answers = Answers(BOB_BOOT)
    share = limits.ANSWERS // limits.SOURCE_SHARE
    for counter in range(1, share + 1):
        answers.begin(ALICE, ALICE_BOOT, request(counter), 0.0)
    assert refusal_of(answers.begin(ALICE, ALICE_BOOT, request(share + 1), 0.0)) is Code.RATE_LIMITED
    assert answers.begin(DAVE, ALICE_BOOT, request(1), 0.0) == Fresh()
    answers.finish(ALICE, ALICE_BOOT, 1, Response(1, b""), 0.1)
    answers.acknowledge(ALICE, ALICE_BOOT, (1,))
    assert answers.begin(ALICE, ALICE_BOOT, request(share + 1), 0.2) == Fresh()


def test_all_sources_together_keep_a_bounded_number() -> None:
    answers = Answers(BOB_BOOT)
    share = limits.ANSWERS // limits.SOURCE_SHARE
    for source in range(limits.SOURCE_SHARE):
        for counter in range(1, share + 1):
            assert answers.begin(seed(f"{source}"), ALICE_BOOT, request(counter), 0.0) == Fresh()
    assert refusal_of(answers.begin(DAVE, ALICE_BOOT, request(1), 0.0)) is Code.RATE_LIMITED


def test_answer_bytes_are_bounded_and_an_answer_without_room_is_unknown() -> None:
    answers = Answers(BOB_BOOT)
    body = bytes(limits.MAX_BODY_BYTES)
    fits = limits.ANSWERS_BYTES // limits.SOURCE_SHARE // (len(body) + 256)
    for counter in range(1, fits + 2):
        answers.begin(ALICE, ALICE_BOOT, request(counter), 0.0)
    for counter in range(1, fits + 2):
        answers.finish(ALICE, ALICE_BOOT, counter, Response(counter, body), 0.1)
    assert isinstance(answers.begin(ALICE, ALICE_BOOT, request(fits), 0.2), Answered)
    assert refusal_of(answers.begin(ALICE, ALICE_BOOT, request(fits + 1), 0.2)) is Code.UNKNOWN


def fill_bytes(answers: Answers, source: bytes, now: float) -> None:
    """Use up a source's share of the bytes with answers that it does not acknowledge."""
    body = bytes(limits.MAX_BODY_BYTES)
    quarter = limits.ANSWERS_BYTES // limits.SOURCE_SHARE
    left, counter = quarter, 0
    while left > 256:
        counter += 1
        assert answers.begin(source, ALICE_BOOT, request(counter), now) == Fresh()
        size = min(len(body), left - 256)
        answers.finish(source, ALICE_BOOT, counter, Response(counter, body[:size]), now)
        left -= size + 256
    assert left == 0


def test_a_source_that_used_up_its_bytes_is_limited_and_others_are_not() -> None:
    answers = Answers(BOB_BOOT)
    fill_bytes(answers, ALICE, 0.0)
    assert refusal_of(answers.begin(ALICE, ALICE_BOOT, request(1000), 0.1)) is Code.RATE_LIMITED
    assert answers.begin(DAVE, ALICE_BOOT, request(1000), 0.1) == Fresh()
    answers.acknowledge(ALICE, ALICE_BOOT, (1,))
    assert answers.begin(ALICE, ALICE_BOOT, request(1000), 0.2) == Fresh()


def test_all_sources_together_keep_a_bounded_number_of_bytes() -> None:
    answers = Answers(BOB_BOOT)
    for source in range(limits.SOURCE_SHARE - 1):
        fill_bytes(answers, seed(f"{source}"), 0.0)
    assert answers.begin(DAVE, ALICE_BOOT, request(1), 0.1) == Fresh()
    fill_bytes(answers, ALICE, 0.2)
    answers.finish(DAVE, ALICE_BOOT, 1, Response(1, b"no room"), 0.3)
    assert answers._answer_bytes == limits.ANSWERS_BYTES
    assert refusal_of(answers.begin(DAVE, ALICE_BOOT, request(1), 0.4)) is Code.UNKNOWN
    assert refusal_of(answers.begin(DAVE, ALICE_BOOT, request(2), 0.4)) is Code.RATE_LIMITED


def test_counters_of_a_boot_are_kept_for_360_seconds_after_its_last_request() -> None:
    answers = Answers(BOB_BOOT)
    for counter, now in ((1, 0.0), (2, 300.0)):
        answers.begin(ALICE, ALICE_BOOT, request(counter), now)
        answers.finish(ALICE, ALICE_BOOT, counter, Response(counter, b""), now)
        answers.acknowledge(ALICE, ALICE_BOOT, (counter,))
    answers.expire(659.9)
    assert refusal_of(answers.begin(ALICE, ALICE_BOOT, request(1), 659.9)) is Code.UNKNOWN
    answers.expire(660.0)
    assert not answers._sources


def test_a_window_never_grows_beyond_its_bits() -> None:
    answers = Answers(BOB_BOOT)
    for counter in range(1, 3 * limits.ANSWERS):
        answers.begin(ALICE, ALICE_BOOT, request(counter), 0.0)
        answers.finish(ALICE, ALICE_BOOT, counter, Response(counter, b""), 0.0)
        answers.acknowledge(ALICE, ALICE_BOOT, (counter,))
    (history,) = answers._sources[ALICE].histories.values()
    assert history.seen.bit_length() == limits.ANSWERS


def test_boots_of_all_sources_together_are_bounded() -> None:
    answers = Answers(BOB_BOOT)
    for number in range(limits.MAX_HISTORIES):
        source = seed(str(number % (limits.MAX_HISTORIES // limits.MAX_BOOTS)))
        boot = number.to_bytes(16, "big")
        assert answers.begin(source, boot, request(1), 0.0) == Fresh()
        answers.finish(source, boot, 1, Response(1, b""), 0.0)
        answers.acknowledge(source, boot, (1,))
    assert refusal_of(answers.begin(ALICE, ALICE_BOOT, request(1), 0.0)) is Code.RATE_LIMITED
    assert answers.begin(source, boot, request(2), 0.0) == Fresh()


def test_a_source_that_restarts_without_end_is_limited_until_its_boots_are_forgotten() -> None:
    answers = Answers(BOB_BOOT)
    for number in range(limits.MAX_BOOTS):
        boot = number.to_bytes(16, "big")
        assert answers.begin(ALICE, boot, request(1), 0.0) == Fresh()
        answers.finish(ALICE, boot, 1, Response(1, b""), 0.0)
    assert refusal_of(answers.begin(ALICE, LATER_BOOT, request(1), 0.0)) is Code.RATE_LIMITED
    answers.expire(359.9)
    assert refusal_of(answers.begin(ALICE, LATER_BOOT, request(1), 359.9)) is Code.RATE_LIMITED
    answers.expire(360.0)
    assert answers.begin(ALICE, LATER_BOOT, request(1), 360.0) == Fresh()


def test_when_all_has_expired_nothing_is_left() -> None:
    answers = Answers(BOB_BOOT)
    for counter in range(1, 100):
        answers.begin(ALICE, ALICE_BOOT, request(counter), 0.0)
        answers.finish(ALICE, ALICE_BOOT, counter, Response(counter, b"x"), 0.0)
    answers.expire(1000.0)
    assert (answers._sources, answers._entries, answers._answer_bytes, answers._histories) == ({}, 0, 0, 0)


def test_finishing_twice_is_a_fault_that_is_noticed() -> None:
    answers = Answers(BOB_BOOT)
    answers.begin(ALICE, ALICE_BOOT, request(1), 0.0)
    answers.finish(ALICE, ALICE_BOOT, 1, Response(1, b""), 0.0)
    with pytest.raises(AssertionError):
        answers.finish(ALICE, ALICE_BOOT, 1, Response(1, b"other"), 0.0)


ASK, FINISH, ACKNOWLEDGE, WAIT = "ask", "finish", "acknowledge", "wait"
NUMBERS = st.one_of(st.integers(1, 8), st.integers(4090, 4110), st.just(2**64 - 1))
STEPS = st.lists(
    st.tuples(
        st.sampled_from((ASK, ASK, FINISH, ACKNOWLEDGE, WAIT)),
        st.sampled_from((ALICE, DAVE)),
        st.sampled_from((ALICE_BOOT, LATER_BOOT)),
        NUMBERS,
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(STEPS)
def test_no_interleaving_runs_a_request_twice_or_changes_its_answer(
    steps: list[tuple[str, bytes, bytes, int]],
) -> None:
    answers = Answers(BOB_BOOT)
    now = 0.0
    first_asked: dict[tuple[bytes, bytes, int], float] = {}
    running: set[tuple[bytes, bytes, int]] = set()
    given_answers: dict[tuple[bytes, bytes, int], Response] = {}
    for action, source, boot, counter in steps:
        name = (source, boot, counter)
        if action == WAIT:
            now += 25.0
            answers.expire(now)
        elif action == FINISH and name in running:
            running.remove(name)
            given_answers[name] = Response(counter, repr(now).encode())
            answers.finish(source, boot, counter, given_answers[name], now)
        elif action == ACKNOWLEDGE:
            answers.acknowledge(source, boot, (counter,))
        elif action == ASK and now - first_asked.get(name, now) <= limits.MAX_TTL_MS / 1000:
            verdict = answers.begin(source, boot, request(counter, ttl_ms=limits.MAX_TTL_MS), now)
            if isinstance(verdict, Fresh):
                assert name not in first_asked, "it ran twice"
                running.add(name)
                first_asked[name] = now
            elif isinstance(verdict, Running):
                assert name in running
            elif isinstance(verdict, Answered):
                assert verdict.message == given_answers[name]
            else:
                assert verdict.code is Code.UNKNOWN
