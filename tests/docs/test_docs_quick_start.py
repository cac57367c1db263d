"""The README's quick start is typed, line by line, on two homes of this machine; what it shows is compared.

Both nodes then answer with the JSON that docs/cli.md shows.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from docs_pages import ROOT, knode_words, page
from real_processes import PATIENCE_S, Process, kill_daemons, plain_environment

from knode.control.client import Client
from knode.home.layout import Home

MAPS = {"tasks", "refusals", "failures", "refused_ends", "dropped_messages"}
"""Fields of documents whose keys are data."""
ANY_KIND = {"result", "value"}
"""Fields that hold whatever there is."""

# What differs from run to run, as the README shows it, and what may stand there. The first that fits counts.
VARIABLE = [
    (r"12D3KooW\w+", r"12D3KooW\\w+"),
    (r"did:key:\w+", r"did:key:z6Mk\\w+"),
    (r"\b[0-9a-f]{64}\b", r"[0-9a-f]{64}"),
    (r"process \d+", r"process \\d+"),
    (r"\d{4}-\d\d-\d\dT[\d:]+Z", r"\\d{4}-\\d\\d-\\d\\dT[\\d:]+Z"),
    (r"\d+(?:\.\d+){3}:\d+", r"\\d+(?:\\.\\d+){3}:\\d+"),
    (r"\d+\.\d ms", r"\\d+\\.\\d ms"),
    (r"(?<=^words   )\w+ \w+ \w+ \w+", r"\\w+ \\w+ \\w+ \\w+"),
    (r"\S*…", r".*"),
]


@dataclass
class Step:
    """One command of the transcript, and what it printed."""

    machine: str
    command: str
    shown: list[str] = field(default_factory=list)
    printed: list[str] = field(default_factory=list)
    exit_code: int = -1


def transcript() -> list[Step]:
    """The commands of the quick start with what the README shows; `invite` goes on after the join."""
    steps: list[Step] = []
    blocks = [b for b in page("README.md").blocks if b.language == "console" and b.heading == "Two machines"]
    for block in blocks:
        current = next((step for step in steps if step.command == "knode invite"), None)
        for line in block.text.splitlines():
            typed = re.match(r"(\w+)\$ (.+)", line)
            if typed:
                current = Step(typed[1], typed[2])
                steps.append(current)
            elif line.strip():
                assert current is not None, "the README's transcript begins with a command"
                current.shown.append(line)
    return steps


def pattern(shown: str) -> str:
    """A regular expression for a line as the README shows it."""
    marks: list[str] = []

    def mark(replacement: str) -> str:
        marks.append(replacement.replace("\\\\", "\\"))
        return f"\0{len(marks) - 1}\0"

    for found, replacement in VARIABLE:
        shown = re.sub(found, lambda _, replacement=replacement: mark(replacement), shown)  # type: ignore[misc]
    shown = re.sub(r"\\? +", r" +", re.escape(shown).replace("\\ ", " "))
    return re.sub("\0(\\d+)\0", lambda found: marks[int(found[1])], shown)


class Machine:
    """One home of this machine, as if it were a machine of its own."""

    def __init__(self, path: Path) -> None:
        self.home = Home(path)
        self._environment = {
            **plain_environment(),
            "KNODE_HOME": str(path),
            "KNODE_NODE_HOST": "127.0.0.1",
            "KNODE_NODE_PORT": "0",
        }

    def start(self, words: list[str]) -> Process:
        return Process(
            [sys.executable, "-m", "knode", *words],
            cwd=ROOT,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *words: str) -> tuple[list[str], int]:
        with self.start(list(words)) as process:
            printed, complaints = process.communicate(timeout=PATIENCE_S)
        if process.returncode:
            printed += complaints
        return printed.splitlines(), process.returncode

    def document(self, *words: str) -> Any:
        printed, code = self.run(*words, "--json")
        assert code == 0, printed
        return json.loads("\n".join(printed))

    def call(self, method: str, **params: object) -> Any:
        with Client.connect(self.home) as client:
            return client.call(method, params)

    def wait_until_linked(self) -> None:
        """Wait until every member is alive, over the best link, and its round trip was measured."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            others = [member for member in self.call("status")["members"] if member["name"] != "home"]
            if all(
                (member["state"], member["link"]) == ("alive", "websocket") and member["rtt_ms"] is not None
                for member in others
            ):
                return
            time.sleep(0.05)
        raise AssertionError(f"not all alive over a websocket: {others}")


@dataclass
class Played:
    """The two machines after the quick start, and what each command printed."""

    machines: dict[str, Machine]
    steps: list[Step]

    def step(self, beginning: str) -> Step:
        return next(step for step in self.steps if step.command.startswith(beginning))


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Played]:
    folder = tmp_path_factory.mktemp("quick-start")
    machines = {name: Machine(folder / name) for name in ("home", "laptop", "third")}
    steps = transcript()
    try:
        play(machines, steps)
        yield Played(machines, steps)
    finally:
        kill_daemons(*(machine.home.path for machine in machines.values()))


def play(machines: dict[str, Machine], steps: list[Step]) -> None:
    """Type every command; between `invite` and the join it waits as it does at a terminal."""
    [invite] = [step for step in steps if step.command == "knode invite"]
    before, after = steps[: steps.index(invite)], steps[steps.index(invite) + 1 :]
    for step in before:
        type_command(machines, step)
    with machines[invite.machine].start(["invite", "--wait"]) as waiting:
        ticket = waiting.stdout.readline().strip()
        type_command(machines, after[0], ticket)
        rest, _ = waiting.communicate(timeout=PATIENCE_S)
    invite.printed, invite.exit_code = [ticket, *rest.splitlines()], waiting.returncode
    machines[invite.machine].wait_until_linked()
    for step in after[1:]:
        type_command(machines, step)


def type_command(machines: dict[str, Machine], step: Step, ticket: str = "") -> None:
    words = knode_words(step.command)
    assert words is not None
    words = [ticket if word.startswith("knode-") else word for word in words]
    step.printed, step.exit_code = machines[step.machine].run(*words)
    assert step.exit_code == 0, (step.command, step.printed)


def test_the_quick_start_prints_what_the_readme_shows(played: Played) -> None:
    assert [step.command.split()[1] for step in played.steps][:4] == ["init", "up", "invite", "join"]
    for step in played.steps:
        printed = [line for line in step.printed if line.strip()]
        assert step.exit_code == 0, (step.command, printed)
        assert len(printed) == len(step.shown), (step.command, printed)
        for shown, line in zip(step.shown, printed, strict=True):
            expected = pattern(shown)
            if step.command.startswith("knode join"):  # the link to a member may be a moment younger
                expected = expected.replace("alive", "(alive|suspect|failed)")
            assert re.fullmatch(expected, line.rstrip()), f"{step.command}\nREADME: {shown}\nreally: {line}"


def test_both_machines_show_the_same_four_words(played: Played) -> None:
    [invited] = [line for line in played.step("knode invite").printed if line.startswith("words")]
    assert played.step("knode join").printed[0] == invited
    assert len(invited.split("(")[0].split()) == 5


def test_a_line_that_the_readme_shows_wrongly_is_found() -> None:
    shown = "laptop  12D3KooWRKrbPeFT  worker  alive  websocket  3.3 ms"
    assert re.fullmatch(pattern(shown), "laptop  12D3KooWAAAAAAAA  worker   alive  websocket  0.7 ms")
    for other in ("laptop  12D3KooWAAAAAAAA  worker  failed  websocket  0.7 ms", "laptop  12D3KooWAAAAAAAA"):
        assert not re.fullmatch(pattern(shown), other)


def test_documents_have_the_shape_that_the_page_shows(played: Played) -> None:
    home, laptop, third = played.machines["home"], played.machines["laptop"], played.machines["third"]
    ticket = home.call("invite")
    [recovery] = [line.split()[-1] for line in played.step("knode init").printed if "recovery" in line][:1]
    seen = {
        "knode up": home.document("up", "--detach"),
        "knode status": home.call("status"),
        "knode invite": ticket,
        "knode join": third.document("join", ticket["ticket"], "--name", "third"),
        "knode peer list": home.call("peer.list"),
        "knode doctor": home.document("doctor"),
        "knode peer ping": home.call("peer.ping", node="laptop", count=2),
        "knode member rotate": third.document("member", "rotate", "--force"),
        "knode member recover": home.call("member.recover", recovery_key=recovery),
        "knode member role": home.call("member.role", node="third", role="observer"),
        "knode member revoke": home.call("member.revoke", node="third"),
        "knode agent list": home.call("agent.list"),
        "knode agent show": home.call("agent.show", agent="kExecutor:python"),
        "knode task submit": home.call("task.submit", agent="kExecutor:python", key="k", wait=True),
        "knode config list": home.document("config", "list"),
        "knode config set": home.document("config", "set", "log.level", "debug"),
        "knode down": third.document("down"),
    }
    for heading, document in seen.items():
        assert_same_shape(shown_in_page(heading), document, heading)
    assert_same_shape(shown_in_page("knode peer show"), home.call("peer.show", node="laptop"), "peer.show")
    assert_same_shape(shown_in_page("knode join")["members"], laptop.call("member.list"), "member.list")
    assert_same_shape([shown_in_page("knode task submit")], home.call("task.list"), "task.list")
    assert_same_shape(
        shown_in_page("knode config list")[0], home.document("config", "get", "node.port"), "get"
    )
    assert_same_shape(shown_in_page("knode simulate"), home.document("simulate", "--nodes", "1"), "simulate")


def test_a_new_home_and_an_error_have_the_shape_that_the_page_shows(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "home")
    assert_same_shape(shown_in_page("knode init"), machine.document("init", "--name", "home"), "init")
    printed, code = machine.run("status", "--json")
    error = json.loads(printed[0])
    assert_same_shape(shown_in_page("Exit codes"), error, "an error")
    assert (error["error"]["code"], code) == ("NOT_RUNNING", 3)


def shown_in_page(heading: str) -> Any:
    """The first JSON under a heading of the command line's page."""
    blocks = page("docs/cli.md").blocks
    return json.loads(next(b.text for b in blocks if b.heading == heading and b.language == "json"))


def assert_same_shape(shown: Any, real: Any, where: str) -> None:
    """Assert that keys and kinds of values are the same; null stands for what may be absent."""
    last = where.rsplit(".", 1)[-1]
    if shown is None or real is None or last in ANY_KIND:
        return
    if isinstance(shown, dict):
        assert isinstance(real, dict), where
        if last not in MAPS:
            assert set(shown) == set(real), (where, set(shown) ^ set(real))
            for key, value in shown.items():
                assert_same_shape(value, real[key], f"{where}.{key}")
    elif isinstance(shown, list):
        assert isinstance(real, list), where
        if shown and real:
            for each in real:
                assert_same_shape(shown[0], each, where)
    elif isinstance(shown, int | float) and not isinstance(shown, bool):
        assert isinstance(real, int | float), where
    else:
        assert type(real) is type(shown), where
