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
from collections.abc import Sequence
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
COUNTING = """\
import json, pathlib, time
[path] = pathlib.Path("input").iterdir()
words = len(path.read_text().split())
time.sleep(5)  # long enough for something to happen meanwhile
with open("effects.jsonl", "w") as effects:
    print(json.dumps({"operation": {"file": path.name, "words": words}}), file=effects)
print(words)
"""
BATCH = 16
"""Documents that are counted while the cell falls apart."""


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
        first, second, third, *_ = self.net.nodes
        self.show_members(first)
        self.count_documents(first, second)
        self.hash_in_sandbox(first, third)
        self.kill_and_go_on(first, second, third)
        self.bring_back(first, third)
        self.cut_off(first, second, third)
        self.heal(first, second, third)
        self.take_effect_once()

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

    def take_effect_once(self) -> None:
        """Submit durable tasks while the leader is killed and a worker cut off; each takes effect once."""
        leader = self.leader()
        asker, *others = [node for node in self.net.nodes if node is not leader]
        documents = list({path.name: path for path in sorted(DOCUMENTS.rglob("*.md"))}.values())[:BATCH]
        say(f"    {leader.name} leads the cell; {BATCH} durable tasks are submitted on {asker.name}")
        half = len(documents) // 2
        ids = {path: self.submit_durable(asker, path)["id"] for path in documents[:half]}
        worker = self.busy_one(asker, others)
        say(f"$ kill -9 {self.net.kill(leader.name)}   # {leader.name}, the leader")
        say(f"$ knode testnet partition {worker.name}   # which has tasks under way")
        self.net.cut([worker.name])
        ids |= {path: self.submit_durable(asker, path)["id"] for path in documents[half:]}
        begun = time.monotonic()
        self.wait_for_tasks(asker, set(ids.values()))
        took = time.monotonic() - begun
        say(f"    all {len(ids)} tasks have ended, {took:.1f} s after the last was submitted")
        say(f"$ knode testnet heal\n$ knode up --detach   # {leader.name}")
        self.net.heal()
        self.net.restart(leader.name)
        for node in self.net.nodes:
            self.wait_for_state([other for other in self.net.nodes if other is not node], node, "alive")
        # The same keys again: the same tasks, and nothing is done twice.
        for path in documents[:2]:
            check(self.submit_durable(asker, path)["id"] == ids[path], "a key gave another task")
        expected = {(ids[path], path.name, len(path.read_text().split())) for path in documents}
        for node in self.net.nodes:
            left = [e for e in self.run(node, "task", "effects") if e["task"] in ids.values()]
            seen = [(e["task"], e["operation"]["file"], e["operation"]["words"]) for e in left]
            check(len(seen) == len(expected), f"{node.name} has {len(seen)} effects of {len(expected)} tasks")
            check(set(seen) == expected, f"{node.name} has other effects than were asked for")
        attempts = sum(task["attempt"] for task in self.tasks(asker) if task["id"] in ids.values())
        say(f"    {len(expected)} effects on each of {len(self.net.nodes)} nodes, by {attempts} attempts")
        self.note(
            "exactly once",
            f"{len(ids)} tasks while the leader was killed and a worker cut off: {attempts} attempts, "
            f"each task left its effect once, the same on all nodes",
        )

    def busy_one(self, asker: TestnetNode, nodes: Sequence[TestnetNode]) -> TestnetNode:
        """Return one of the nodes that runs an attempt now; any of them when none does."""
        running = {task["node"] for task in self.tasks(asker) if task["state"] == "assigned"}
        return next((node for node in nodes if node.name in running), nodes[0])

    def submit_durable(self, node: TestnetNode, path: Path) -> dict[str, Any]:
        """Submit a durable task over a document, under a key of its own; it must be acknowledged."""
        program = self.net.folder / "count.py"
        program.write_text(COUNTING)
        words = ("--input", f"@{program}", "--artifact", str(path), "--key", f"count {path.name}")
        task: dict[str, Any] = self.run(node, "task", "submit", "kExecutor:python", *words)
        return task

    def wait_for_tasks(self, node: TestnetNode, ids: set[str]) -> None:
        """Wait until these tasks have succeeded."""
        begun = time.monotonic()
        while True:
            states = {task["id"]: task["state"] for task in self.tasks(node) if task["id"] in ids}
            if len(states) == len(ids) and set(states.values()) == {"succeeded"}:
                return
            ended = {id: state for id, state in states.items() if state in ("failed", "cancelled", "expired")}
            check(not ended, f"tasks ended otherwise: {ended}")
            check(time.monotonic() - begun < NOTICE_WITHIN_S, f"tasks did not end: {states}")
            time.sleep(0.2)

    def tasks(self, node: TestnetNode) -> list[dict[str, Any]]:
        """Return the cell's tasks, as a node lists them."""
        with Client.connect(Home(node.home)) as client:
            tasks: list[dict[str, Any]] = client.call("task.list")
        return tasks

    def leader(self) -> TestnetNode:
        """Return the node that leads the cell, once one does."""
        begun = time.monotonic()
        while True:
            with Client.connect(Home(self.net.nodes[0].home)) as client:
                leader = client.call("status")["leader"]
            for node in self.net.nodes:
                if node.node_id == leader:
                    return node
            check(time.monotonic() - begun < NOTICE_WITHIN_S, "nobody leads the cell")
            time.sleep(0.1)

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

    def wait_for_state(self, watchers: Sequence[TestnetNode], node: TestnetNode, state: str) -> float:
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
        say("five nodes, five processes, one cell:")
        try:
            net = Testnet.up(Path(folder, "net"), nodes=5, tell=lambda text: say(f"    {text}"))
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
