"""Whole runs of the simulator: the same seed the same bytes, promises kept, and a planted bug found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

from knode.cli import main as program
from knode.errors import Code, KnodeError
from knode.klp.answers import Answers, Fresh, Verdict
from knode.klp.handshake import Established, Hello
from knode.klp.keepalive import Load
from knode.klp.messages import Request
from knode.mesh.heartbeat import Heartbeat
from knode.mesh.liveness import Liveness, PeerState
from knode.mesh.membership import Membership
from knode.node import Node
from knode.simulation import scenario as scenarios
from knode.simulation.command import reproduction, simulate
from knode.simulation.invariants import INVARIANTS
from knode.simulation.run import Run
from knode.tasks.worker import Worker

SEEDS = (1,)
LONG = ("standard", "rolling", "hunting", "flapping", "slow", "churn", "damaged", "lost")
"""The scenarios of durable tasks; a shorter storm stands for theirs here."""
SHORT_S = 10
LARGE = "fifty"
"""Takes minutes; a part of it stands for it here."""
SOME_SEEDS = range(1, 11)

IDLE = """
what = "Nobody does anything."
lasts_s = {lasts_s}
invariants = ["finally_the_cell_has_worked"]

[clients]
every_s = [1000, 1000]
"""


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("scenario", [name for name in scenarios.names() if name not in (LARGE, *LONG)])
def test_every_promise_is_kept(scenario: str, seed: int) -> None:
    outcome = simulate(seed=seed, nodes=3, scenario=scenario)
    assert outcome["violations"] == [], reproduction(seed, 3, scenario)
    assert outcome["tasks"]["succeeded"] > 50


@pytest.mark.parametrize("scenario", LONG)
def test_every_promise_of_durable_tasks_is_kept(scenario: str) -> None:
    short = msgspec.structs.replace(scenarios.load(scenario), lasts_s=SHORT_S)
    assert Run(short, 1, nodes=3).run().violations == ()


def test_a_large_cell_has_all_links_and_knows_all_loads() -> None:
    short = msgspec.structs.replace(scenarios.load(LARGE), lasts_s=20)
    outcome = Run(short, 1, nodes=16).run()
    assert outcome.violations == ()
    assert outcome.tasks["succeeded"] > 5


# Each of these once found a bug, which is fixed.
@pytest.mark.parametrize(
    ("scenario", "seed"),
    [
        ("crashes", 4),  # a request waited in an endless loop for a moment that had come
        ("lossy", 8),  # a member stayed unknown who joined between a handshake and its conversation
        ("disks", 8),  # a node with a full disk never heard of a change, or reconnected all the time
    ],
)
def test_what_was_found_once_stays_away(scenario: str, seed: int) -> None:
    assert simulate(seed=seed, nodes=3, scenario=scenario)["violations"] == []


def test_one_seed_gives_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    outputs = set()
    path = tmp_path / "everything.toml"
    path.write_text(
        (scenarios.FOLDER / "standard.toml").read_text().replace("lasts_s = 60", "lasts_s = 10", 1)
    )
    for hash_seed in ("0", "4711"):
        command = (sys.executable, "-m", "knode", "simulate", "--json", "-q", "--seed", "5")
        done = subprocess.run(
            (*command, "--scenario", str(path), "--nodes", "4"),
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            timeout=60,
            check=True,
        )
        assert done.stderr == b""
        outputs.add(done.stdout)
    assert len(outputs) == 1
    document = json.loads(outputs.pop())
    assert list(document) == [
        *("seed", "scenario", "nodes", "virtual_s", "events", "trace_hash", "tasks", "violations")
    ]


def test_a_seed_gives_the_same_run_again_in_one_process_and_another_seed_another_run() -> None:
    first, again, other = (simulate(seed=seed, nodes=3) for seed in (7, 7, 8))
    assert first == again
    assert first["trace_hash"] != other["trace_hash"]


def test_every_line_of_every_node_can_be_read() -> None:
    lines: list[dict[str, Any]] = []
    simulate(seed=1, nodes=2, show=lambda line: lines.append(json.loads(line)))
    assert {line["by"] for line in lines} >= {"node1", "node2"}
    assert [line["at"] for line in lines] == sorted(line["at"] for line in lines)
    assert {"node is up", "peer connected", "attempt begins", "task ended"} <= {
        line["event"] for line in lines
    }


def broken_invariants(scenario: str) -> set[str]:
    """Run seed after seed until one finds something; return what it found."""
    for seed in SOME_SEEDS:
        violations = simulate(seed=seed, nodes=3, scenario=scenario)["violations"]
        if violations:
            return {violation["invariant"] for violation in violations}
    return set()


def test_a_node_that_forgets_what_it_answered_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    begin = Answers.begin

    def forgetful(self: Answers, source: bytes, boot: bytes, request: Request, now: float) -> Verdict:
        self._sources.pop(source, None)
        verdict = begin(self, source, boot, request, now)
        return verdict if request.destination_boot != self._boot else Fresh()

    def unrecorded(self: Answers, *arguments: object) -> None:
        pass

    monkeypatch.setattr(Answers, "begin", forgetful)
    monkeypatch.setattr(Answers, "finish", unrecorded)
    assert "anytime_direct_task_runs_at_most_once" in broken_invariants("lossy")


def test_a_node_that_admits_anybody_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Membership, "admit", lambda self, peer: None)
    assert "anytime_no_stranger_is_served" in broken_invariants("calm")


def test_a_node_that_miscounts_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    attempt = Worker.attempt

    async def miscount(self: Worker, *arguments: Any, **named: Any) -> bytes:
        output = json.loads(await attempt(self, *arguments, **named))
        output["total"]["words"] += 1
        return json.dumps(output).encode()

    monkeypatch.setattr(Worker, "attempt", miscount)
    assert "finally_answers_are_right" in broken_invariants("calm")


def test_a_node_that_judges_members_by_its_wall_clock_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    admit = Membership.admit

    def distrustful(self: Membership, peer: Established | Hello) -> None:
        admit(self, peer)
        contact = self.contacts.get(peer.key if isinstance(peer, Hello) else peer.peer.raw)
        if contact is not None and contact.body.issued > self._world.clock.wall():
            raise KnodeError(Code.EXPIRED, "its addresses are of tomorrow")

    monkeypatch.setattr(Membership, "admit", distrustful)
    assert "anytime_no_link_is_lost" in broken_invariants("clocks")


def test_a_node_that_tells_no_news_of_its_load_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Node, "_load", lambda self: Load(7, 0, 2, 0))
    assert "finally_loads_are_right" in broken_invariants("clocks")


def test_a_node_that_seldom_tells_its_load_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Heartbeat, "interval_s", 6.0)
    monkeypatch.setattr(Liveness, "state", lambda self, now: PeerState.ALIVE)
    assert broken_invariants("clocks") >= {"anytime_loads_are_known"}


def test_a_node_that_takes_the_silent_for_alive_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Liveness, "state", lambda self, now: PeerState.ALIVE)
    assert "anytime_the_silent_are_found_dead" in broken_invariants("sleep")


def test_an_unknown_scenario_names_those_there_are() -> None:
    with pytest.raises(KnodeError) as caught:
        simulate(seed=1, nodes=3, scenario="sunny")
    assert caught.value.code is Code.NOT_FOUND
    assert all(name in str(caught.value) for name in ("calm", "crashes", "lossy", "partition"))


@pytest.mark.parametrize(
    "text",
    [
        "lasts_s = 1",
        IDLE.format(lasts_s=-1),
        IDLE.format(lasts_s=1).replace("finally", "never"),
        "no TOML",
        "\x00",
        "a = " + "[" * 30_000,
    ],
)
def test_a_file_that_is_no_scenario_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(KnodeError) as caught:
        simulate(seed=1, nodes=2, scenario=str(path))
    assert caught.value.code is Code.INVALID_ARGUMENT


def test_a_scenario_is_read_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "long.toml"
    path.write_text(IDLE.format(lasts_s=1) + "#" * 64 * 1024 + '\n[[faults]]\nkind = "unknown"\n')
    with pytest.raises(KnodeError) as caught:
        simulate(seed=1, nodes=2, scenario=str(path))
    assert caught.value.code is Code.TOO_LARGE


def test_a_broken_promise_exits_with_one_and_says_how_to_see_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "idle.toml"
    path.write_text(IDLE.format(lasts_s=1))
    words = ["simulate", "--json", "--seed", "3", "--nodes", "2", "--scenario", str(path)]
    monkeypatch.setattr(sys, "argv", ["knode", *words])
    assert program.main() == 1
    shown = capsys.readouterr()
    document = json.loads(shown.out)
    assert document["scenario"] == "idle"
    assert [violation["invariant"] for violation in document["violations"]] == ["finally_the_cell_has_worked"]
    assert f"knode simulate --scenario {path} --nodes 2 --seed 3" in shown.err


def test_many_seeds_are_run_by_one_command_and_those_that_fail_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "idle.toml"
    path.write_text(IDLE.format(lasts_s=1))
    words = ["simulate", "-q", "--seeds", "3-4", "--nodes", "2", "--scenario", str(path)]
    monkeypatch.setattr(sys, "argv", ["knode", *words])
    assert program.main() == 1
    shown = capsys.readouterr().out
    assert "broken by 2 of 2 seeds" in shown
    assert f"knode simulate --scenario {path} --nodes 2 --seed 4" in shown

    monkeypatch.setattr(sys, "argv", ["knode", "simulate", "--seeds", "2-1"])
    assert program.main() == 2


def test_people_read_a_short_summary(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["knode", "simulate", "-q"])
    assert program.main() == 0
    shown = capsys.readouterr().out
    assert "calm, seed 1, 3 nodes" in shown
    assert "all kept" in shown


def test_the_guide_names_every_scenario_fault_and_invariant() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "guides" / "simulation.md").read_text()
    faults = [str(fault.__struct_config__.tag) for fault in get_args(scenarios.Fault)]
    for name in (*scenarios.names(), *faults, *INVARIANTS):
        assert f"`{name}`" in guide, name


def test_every_invariant_is_held_in_some_scenario() -> None:
    assert {name for each in scenarios.names() for name in scenarios.load(each).invariants} == set(INVARIANTS)


def test_the_folder_of_the_scenarios_in_the_repository_is_the_package_s() -> None:
    assert (Path(__file__).parents[2] / "simulations").resolve() == scenarios.FOLDER
