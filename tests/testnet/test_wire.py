"""Bad wires: every frame's fate is drawn from the seed, and what is on its way is bounded."""

from __future__ import annotations

from math import inf

from hypothesis import given, settings
from hypothesis import strategies as st

from knode.testnet.topology import Wire
from knode.testnet.wire import QUEUED_FRAMES, Direction


def carried(direction: Direction, frames: int, every_s: float = 0.001) -> list[tuple[float, bytes]]:
    """Put frames in at a steady pace; return each that came out, with the time that it took."""
    out = []
    for number in range(frames):
        now = number * every_s
        direction.put(number.to_bytes(4), now)
    while (now := direction.next_arrival) < inf:
        for frame in direction.arrived(now):
            out.append((now - int.from_bytes(frame) * every_s, frame))
    return out


@settings(deadline=None)
@given(seed=st.text(), low=st.floats(0, 50), more=st.floats(0, 50), loss=st.floats(0, 0.9))
def test_what_comes_out_was_put_in_is_in_order_and_took_its_time(
    seed: str, low: float, more: float, loss: float
) -> None:
    direction = Direction(Wire((low, low + more), loss), seed)
    out = carried(direction, 200)
    frames = [frame for _, frame in out]
    assert frames == sorted(frames)
    assert len(frames) + direction.lost == 200
    assert all(took >= low / 1000 - 1e-9 for took, _ in out)


def test_the_same_seed_gives_the_same_fate_and_another_another() -> None:
    bad = Wire((40, 60), 0.1)
    first, again, other = (carried(Direction(bad, seed), 500) for seed in ("7", "7", "8"))
    assert first == again != other
    assert 10 < 500 - len(first) < 100


def test_a_good_wire_loses_nothing_and_takes_no_time() -> None:
    assert carried(Direction(Wire(), "1"), 50) == [(0.0, number.to_bytes(4)) for number in range(50)]


def test_frames_that_nobody_takes_out_are_lost_beyond_a_limit() -> None:
    direction = Direction(Wire((1000, 1000)), "1")
    for _ in range(QUEUED_FRAMES + 10):
        direction.put(b"x", 0.0)
    assert direction.overflowed == 10
    assert len(list(direction.arrived(0.999))) == 0
    assert len(list(direction.arrived(1.0))) == QUEUED_FRAMES
    assert direction.next_arrival == inf
