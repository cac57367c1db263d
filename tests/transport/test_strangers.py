from __future__ import annotations

from knode.transport.strangers import HOSTS, WINDOW_S, LineLimit, StrangerLines


def test_of_one_host_the_first_line_of_a_minute_is_written_whatever_its_port() -> None:
    lines = StrangerLines()
    assert [lines.admit(f"10.0.0.1:{port}", port / 10) for port in range(1, 5)] == [0, None, None, None]
    assert lines.admit("10.0.0.2:7", 1.0) == 3
    assert lines.admit("10.0.0.2:8", WINDOW_S) is None
    assert lines.admit("10.0.0.1:9", WINDOW_S + 0.1) == 1


def test_however_many_hosts_come_the_lines_of_a_minute_are_bounded() -> None:
    lines = StrangerLines()
    written = [lines.admit(f"[2001:db8::{n:x}]:1", 0.0) for n in range(1000)]
    assert written.count(0) == HOSTS
    assert written.count(None) == 1000 - HOSTS
    assert lines.admit("[2001:db8::1]:1", WINDOW_S) == 1000 - HOSTS


def test_a_source_may_have_several_lines_a_minute() -> None:
    lines = LineLimit(each=3, sources=2)
    assert [lines.admit("a", 0.0) for _ in range(5)] == [0, 0, 0, None, None]
    assert [lines.admit("b", 1.0), lines.admit("c", 1.0)] == [2, None]
    assert lines.admit("a", WINDOW_S) == 1
