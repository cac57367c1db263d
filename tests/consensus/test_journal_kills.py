"""A real process, a real disk, and SIGKILL."""

from __future__ import annotations

from pathlib import Path

from journal_kills import kill_again_and_again


def test_a_process_that_is_killed_loses_nothing_that_it_acknowledged(tmp_path: Path) -> None:
    changes = kill_again_and_again(tmp_path / "raft", rounds=8, seed=1)
    assert changes >= 8
