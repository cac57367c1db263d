from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from knode.mesh.liveness import Liveness, PeerState


def liveness() -> Liveness:
    return Liveness(3.0, heard_at=0.0)


def test_silence_makes_a_peer_suspect_and_then_failed() -> None:
    judged = liveness()
    states = [judged.state(at / 2) for at in range(8)]
    assert states == [PeerState.ALIVE] * 4 + [PeerState.SUSPECT] * 2 + [PeerState.FAILED] * 2


def test_whatever_is_heard_makes_it_alive_again() -> None:
    judged = liveness()
    assert judged.state(2.9) is PeerState.SUSPECT
    judged.heard(2.9)
    assert judged.state(4.8) is PeerState.ALIVE


def test_a_good_bye_is_remembered_whatever_the_time() -> None:
    judged = liveness()
    judged.left()
    assert judged.state(0.1) is judged.state(99.0) is PeerState.LEFT


def test_a_node_that_was_held_up_excuses_the_peer_by_as_much() -> None:
    judged = liveness()
    judged.excuse(60.0, 61.0)  # this machine slept for a minute
    assert judged.state(61.0) is PeerState.ALIVE
    assert judged.state(62.5) is PeerState.SUSPECT
    assert judged.state(64.0) is PeerState.FAILED


@given(st.lists(st.floats(0.001, 30), max_size=30))
def test_an_excuse_never_reaches_into_the_future(steps) -> None:
    judged, now = liveness(), 0.0
    for step in steps:
        now += step
        judged.excuse(step, now)
        assert judged.heard_at <= now


@given(st.floats(0, 1e7), st.floats(0.01, 100))
def test_at_its_own_deadline_a_peer_has_failed(heard_at, dead_after_s) -> None:
    judged = Liveness(dead_after_s, heard_at=heard_at)
    assert judged.state(judged.fails_at) is PeerState.FAILED
