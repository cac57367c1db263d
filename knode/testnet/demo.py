"""`make demo`: the main job, on this machine, with real processes and the project's own documents.

It types what a user would type, shows it, and checks every answer against what it knows from elsewhere.
Whatever happens, nothing stays running or on the disk.
"""

from __future__ import annotations

import hashlib
import shlex
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from knode.control.client import Client
from knode.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, Code, KnodeError
from knode.home.layout import Home
from knode.testnet.processes import CommandLine
from knode.testnet.testnet import Testnet, TestnetNode

DOCUMENTS = Path(__file__).parents[2] / "docs"
NOTICE_WITHIN_S = 60.0
PROJECT = DOCUMENTS.parent
SANDBOXED = """\
import hashlib, pathlib
for path in sorted(pathlib.Path("input").iterdir()):
    print(hashlib.sha256(path.read_bytes()).hexdigest(), path.name)
"""


class Wrong(Exception):
    """The demo saw something else than what should have happened."""


@dataclass
class Demo:
    """One run: a testnet, and what happened in it."""

    net: Testnet
    command_line: CommandLine = field(default_factory=CommandLine)
    events: list[tuple[str, str]] = field(default_factory=list)

    def play(self) -> None:
        """Do everything, in order; Wrong or KnodeError when something is not as it should be."""
        first, second, third = self.net.nodes
        self.show_members(first)
        self.count_documents(first, second)
        self.hash_in_sandbox(first, third)
        self.kill_and_go_on(first, second, third)
        self.bring_back(first, third)
        self.cut_off(first, second, third)
        self.heal(first, second, third)

    def show_members(self, first: TestnetNode) -> None:
        """Show the cell as its first node sees it."""
        members = self.run(first, "member", "list")
        for member in members:
            say(f"    {member['name']}  {member['id']}  {member['role']:<6}  {member['state']}")
        check(all(member["state"] == "alive" for member in members), "a member is not alive")
        self.note("cell formed", f"{len(members)} members, by init, invite and join")

    def count_documents(self, first: TestnetNode, second: TestnetNode) -> None:
        """Let another node count the words of every document, and compare."""
        documents = sorted(DOCUMENTS.rglob("*.md"))
        words = 0
        for path in documents:
            task = self.submit(first, "kExecutor:text", '{"op":"count"}', path, on=second)
            counted = task["result"]["total"]["words"]
            check(counted == len(path.read_text().split()), f"{path.name} was counted wrong")
            say(f"    {counted} words")
            words += counted
        say(f"    {words} words in {len(documents)} documents, counted on {second.name}")
        self.note("direct tasks", f"{len(documents)} documents of docs/ counted on {second.name}, all right")

    def hash_in_sandbox(self, first: TestnetNode, third: TestnetNode) -> None:
        """Run code in the sandbox of another node over a real file, and compare."""
        path = DOCUMENTS / "klp.md"
        program = self.net.folder / "hash.py"
        program.write_text(SANDBOXED)
        task = self.submit(first, "kExecutor:python", f"@{program}", path, on=third)
        expected = hashlib.sha256(path.read_bytes()).hexdigest()
        check(task["result"].split() == [expected, path.name], "the sandboxed hash differs")
        status = self.run(third, "status")
        say(f"    sha256 {expected[:16]}…, computed on {third.name} inside {status['sandbox']}")
        self.note("sandboxed code", f"ran on {third.name} inside {status['sandbox']}, its result is right")

    def kill_and_go_on(self, first: TestnetNode, second: TestnetNode, third: TestnetNode) -> None:
        """Kill a node with SIGKILL while it works; the others notice, say what is unknown, and go on."""
        words = ("task", "submit", "kExecutor:command", "--direct", "--input", "sleep 60", "--on", third.name)
        lost = self.run(first, *words)
        say(f"$ kill -9 {self.net.kill(third.name)}   # {third.name}")
        noticed = self.wait_for_state((first, second), third, "failed")
        say(f"    {first.name} and {second.name} call {third.name} failed after {noticed:.1f} s")
        self.note("node killed", f"{third.name}, SIGKILL; the others noticed after {noticed:.1f} s")
        try:
            self.submit(first, "kExecutor:text", '{"op":"count","text":"x"}', on=third)
        except KnodeError as refused:
            say(f"    as it should be: {refused.code}: {refused.message}")
        else:
            raise Wrong(f"a task ran on {third.name}, which is dead")
        task = self.submit(first, "kExecutor:text", '{"op":"search","query":"node"}', DOCUMENTS / "klp.md")
        say(f"    found {len(task['result']['matches'])} lines with 'node', on {task['node']}")
        check(task["state"] == "succeeded" and task["node"] != third.name, "the others did not go on")
        self.note("others go on", f"the next task ran on {task['node']}")
        try:
            self.run(first, "task", "watch", lost["id"])
        except KnodeError as unknown:
            check(unknown.code is Code.UNKNOWN, f"the lost task ended as {unknown.code}")
            say(f"    as it should be: {unknown.code}: {unknown.message}")
        else:
            raise Wrong("the task on the killed node ended as if nothing had happened")
        self.note("task was cut off", "its fate is called unknown; it is not run a second time")

    def bring_back(self, first: TestnetNode, third: TestnetNode) -> None:
        """Start the killed node again: same home, same identity, back in the cell."""
        say(f"$ knode up --detach   # {third.name}")
        self.net.restart(third.name)
        back = self.wait_for_state((first,), third, "alive")
        task = self.submit(first, "kExecutor:text", '{"op":"count","text":"back again"}', on=third)
        check(task["result"]["total"]["words"] == 2, "the node that came back counts wrong")
        self.note(
            "node restarted", f"{third.name} is in the cell again, {back:.1f} s after it answered, and works"
        )

    def cut_off(self, first: TestnetNode, second: TestnetNode, third: TestnetNode) -> None:
        """Cut a node off that goes on working; each side calls the other failed, and works on."""
        say(f"$ knode testnet partition {third.name}")
        self.net.cut([third.name])
        begun = time.monotonic()
        for node in (first, second):
            self.wait_for_state((node,), third, "failed")
            self.wait_for_state((third,), node, "failed")
        noticed = time.monotonic() - begun
        say(f"    each side calls the other failed after {noticed:.1f} s")
        for here, there in ((first, second), (third, third)):
            self.submit(here, "kExecutor:text", '{"op":"count","text":"on this side"}', on=there)
        try:
            self.submit(first, "kExecutor:text", '{"op":"count","text":"x"}', on=third)
        except KnodeError as refused:
            say(f"    as it should be: {refused.code}: {refused.message}")
        else:
            raise Wrong(f"a task reached {third.name} through the cut")
        self.note(
            "partition", f"{third.name} cut off, noticed after {noticed:.1f} s; each side worked on alone"
        )

    def heal(self, first: TestnetNode, second: TestnetNode, third: TestnetNode) -> None:
        """Undo the partition: all see all, and a task crosses again."""
        say("$ knode testnet heal")
        self.net.heal()
        begun = time.monotonic()
        for node in (first, second):
            self.wait_for_state((third,), node, "alive")
            self.wait_for_state((node,), third, "alive")
        healed = time.monotonic() - begun
        say(f"    all see all again after {healed:.1f} s")
        self.submit(third, "kExecutor:text", '{"op":"count","text":"across again"}', on=first)
        self.note(
            "healed",
            f"all see all again after {healed:.1f} s, and a task of {third.name} ran on {first.name}",
        )

    def submit(
        self, first: TestnetNode, agent: str, text: str, *files: Path, on: TestnetNode | None = None
    ) -> dict[str, Any]:
        """Submit a direct task, wait for it, and return it; it must have succeeded."""
        words = ["task", "submit", agent, "--direct", "--wait", "--input", text]
        for file in files:
            words += ["--artifact", str(file)]
        if on is not None:
            words += ["--on", on.name]
        task: dict[str, Any] = self.run(first, *words)
        check(task["state"] == "succeeded", f"the task {task['state']}: {task['error']}")
        return task

    def wait_for_state(self, watchers: tuple[TestnetNode, ...], node: TestnetNode, state: str) -> float:
        """Wait until all watchers see `node` in `state`; return the seconds that it took."""
        begun = time.monotonic()
        for watcher in watchers:
            while self.state_of(watcher, node) != state:
                check(time.monotonic() - begun < NOTICE_WITHIN_S, f"{node.name} did not become {state}")
                time.sleep(0.1)
        return time.monotonic() - begun

    def state_of(self, watcher: TestnetNode, node: TestnetNode) -> str:
        """Return what `watcher` thinks of `node`."""
        with Client.connect(Home(watcher.home)) as client:
            members = client.call("status")["members"]
        return next(str(member["state"]) for member in members if member["node_id"] == node.node_id)

    def run(self, node: TestnetNode, *words: str) -> Any:
        """Show a command as it would be typed on a node, run it, and return its document."""
        shown = shlex.join(words).replace(f"{PROJECT}/", "").replace(f"{self.net.folder}/", "")
        say(f"$ knode {shown}   # {node.name}")
        return self.command_line.run(node.home, *words)

    def note(self, what: str, how: str) -> None:
        """Keep a line for the table at the end."""
        self.events.append((what, how))


def say(line: str) -> None:
    """Show a line at once."""
    print(line, flush=True)


def check(holds: bool, complaint: str) -> None:
    """Stop the demo with `complaint` unless `holds`."""
    if not holds:
        raise Wrong(complaint)


def main() -> int:
    """Play the demo and return the exit code."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="knode-demo-") as folder:
        say("three nodes, three processes, one cell:")
        try:
            net = Testnet.up(Path(folder, "net"), nodes=3, tell=lambda text: say(f"    {text}"))
            demo = Demo(net)
            try:
                demo.play()
            finally:
                say("$ knode testnet down")
                net.down()
        except (Wrong, KnodeError) as error:
            print(f"demo failed: {error}", file=sys.stderr)
            return EXIT_FAILED
        except KeyboardInterrupt:
            print("interrupted; nothing is left running", file=sys.stderr)
            return EXIT_INTERRUPTED
    demo.note("cleaned up", "nothing left running or on the disk")
    say(f"\nwhat happened, in {time.monotonic() - begun:.0f} s:")
    for what, how in demo.events:
        say(f"    {what:<18}{how}")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
