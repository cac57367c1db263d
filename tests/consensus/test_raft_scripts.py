"""Every rule of Raft as a story: tests/scenarios/raft."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import raft_script
from raft_script import SCRIPTS, ScriptError, Stage, play


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_the_script_plays_as_written(path: Path) -> None:
    play(path)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_the_script_begins_with_its_story_and_where_the_rule_stands(path: Path) -> None:
    story = re.match(r"(?:# .*\n)+", path.read_text())
    assert story
    assert re.search(r"Dissertation,\s+(?:#\s+)?(?:section|figure)", story[0])
    assert max(map(len, path.read_text().splitlines())) <= 115


def test_a_script_that_does_not_play_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "wrong.txt"
    path.write_text("# A story.\ncell a b c\nelect a\n\nexpect term a = 7   # wrong\n")
    with pytest.raises(ScriptError, match=r"^wrong.txt:5: expect term a = 7: a has 1$"):
        play(path)
    path.write_text("cell a\nsing a\n")
    with pytest.raises(ScriptError, match=r"^wrong.txt:2: sing a"):
        play(path)
    path.write_text('cell a b\nstand a\npropose b "x"\n')
    with pytest.raises(ScriptError, match=r"^wrong.txt:3: .*NotLeader"):
        play(path)


def test_the_table_of_commands_is_whole() -> None:
    assert raft_script.__doc__
    told = {line.strip() for line in raft_script.__doc__.splitlines() if line.startswith("    ")}
    commands = {line.split()[0] for line in told} - {"expect"}
    expectations = {line.split()[1] for line in told if line.startswith("expect ")}
    assert commands == {name.removeprefix("do_") for name in vars(Stage) if name.startswith("do_")}
    assert expectations | {"not"} == {
        name.removeprefix("expect_") for name in vars(Stage) if name.startswith("expect_")
    }
