"""A testnet: its folder, its nodes, and what can be done with them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from knode.consensus.voters import MAX_VOTERS
from knode.control.client import Client
from knode.errors import Code, KnodeError
from knode.home.layout import Home
from knode.testnet.namespaces import Namespaces
from knode.testnet.processes import CommandLine, daemons_of, end, free_ports
from knode.testnet.topology import Topology, on_loopback

PORT = 4747
"""Of every node that has a network of its own."""
DISCOVERY = {"mdns": False, "libp2p": False}
"""A testnet is not to be heard on the machine's own network, unless its topology says else."""
STATE_FILE = "testnet.json"
SEEN_TIMEOUT_S = 60.0
"""How long `up` waits, once all have joined, until every node sees every other, knows the leader, and all
who should vote do."""

ANSWER_TIMEOUT_S = 5.0
"""How long a node that runs may take to answer, before it counts as held up."""

_AT_ONCE = max(2, os.cpu_count() or 1)
_POLL_S = 0.1
_END_ROUNDS = 5

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class TestnetNode:
    """One node of a testnet; `home` is absolute, `port` stays the node's own."""

    __test__ = False  # to pytest it only looks like a test

    name: str
    home: Path
    node_id: str
    port: int

    @property
    def number(self) -> int:
        """Which node it is, from 1."""
        return int(self.name.removeprefix("node"))


@dataclass(slots=True)
class Testnet:
    """A folder with nodes, made by `up` and found again by `open`."""

    __test__ = False

    folder: Path
    nodes: tuple[TestnetNode, ...]
    topology: Topology
    partition: frozenset[str] = frozenset()
    """The names of the nodes that are cut off from all others; empty while the network is whole."""

    @classmethod
    def up(cls, folder: Path, *, nodes: int, tell: Tell = lambda text: None) -> Testnet:
        """Make so many nodes on loopback; see `build`."""
        return cls.build(folder, on_loopback(nodes), tell=tell)

    @classmethod
    def build(cls, folder: Path, topology: Topology, *, tell: Tell = lambda text: None) -> Testnet:
        """Make and start nodes, joined to one cell; return when each sees all of them alive and
        knows the leader, and all who should vote do.

        A failure and an interruption (KeyboardInterrupt) stop all that was started and remove all that
        was made before they are raised again.

        Args:
            folder: empty or absent; it becomes the testnet's.
            topology: how many nodes, and what lies between them.
            tell: told in a few words of each step.

        Raises:
            KnodeError: HOME_EXISTS when the folder is in use, UNAVAILABLE where the topology needs
                namespaces and none are to be had, TIMEOUT when that does not come about within 60
                seconds, or what a command of a node raised.
        """
        folder = folder.resolve()
        made_folder = _claim(folder)
        count = len(topology.nodes)
        ports = [PORT] * count if topology.needs_namespaces else free_ports(count)
        planned = [
            TestnetNode(f"node{number}", folder / f"node{number}", "", port)
            for number, port in enumerate(ports, start=1)
        ]
        made = cls(folder, tuple(planned), topology)
        command_line = CommandLine()
        try:
            made._save()
            if topology.needs_namespaces:
                tell("the network")
                Namespaces.start(folder, topology)
            made._form_cell(command_line, tell)
            made._save()
            made._await_ready(tell)
        except BaseException:
            with _uninterrupted():
                tell("stopping and removing what was started")
                command_line.interrupt()
                made.down()
                if made_folder:
                    folder.rmdir()
            raise
        return made

    @classmethod
    def open(cls, folder: Path) -> Testnet:
        """Find the testnet in a folder.

        Raises:
            KnodeError: NOT_FOUND when there is none, HOME_DAMAGED when its file cannot be read.
        """
        folder = folder.resolve()
        file = folder / STATE_FILE
        try:
            document = json.loads(file.read_text())
            nodes = tuple(_node_of(folder, row) for row in document["nodes"])
            topology = msgspec.convert(document["topology"], Topology)
            partition = frozenset(document["partition"]) & {node.name for node in nodes}
        except (FileNotFoundError, NotADirectoryError) as error:
            raise KnodeError(
                Code.NOT_FOUND,
                f"there is no testnet in {folder}",
                f"knode testnet up --nodes 3 --dir {folder}",
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise KnodeError(
                Code.HOME_DAMAGED, f"{file} is damaged ({error})", "stop its nodes with 'knode down --home …'"
            ) from error
        return cls(folder, nodes, topology, partition)

    def node(self, which: str) -> TestnetNode:
        """Return a node by number or name; NOT_FOUND when there is none."""
        for node in self.nodes:
            if which in (node.name, node.name.removeprefix("node")):
                return node
        raise KnodeError(
            Code.NOT_FOUND,
            f"there is no node {which!r} among {self.nodes[0].name} … {self.nodes[-1].name}",
            f"knode testnet status --dir {self.folder}",
        )

    def status(self) -> dict[str, Any]:
        """Return `{nodes: [{name, home, pid, node_id, state, cut_off_from, sees}]}`.

        A node that answers is running. `cut_off_from` has the names of nodes; `sees` is the state of each
        node by its name, as this node has it, or null when it does not run or answer.
        """
        return {"nodes": [self._row(node) for node in self.nodes]}

    def cut(self, which: Sequence[str]) -> None:
        """Cut these nodes off from all others, in both directions; an earlier partition is over then.

        It lasts until `heal`, also for nodes that are killed or restarted meanwhile.

        Raises:
            KnodeError: NOT_FOUND; INVALID_ARGUMENT when nobody is left on one side; what a node answered.
        """
        side = {self.node(each).name for each in which}
        if not 0 < len(side) < len(self.nodes):
            raise KnodeError(
                Code.INVALID_ARGUMENT,
                f"a partition has nodes on both sides: {len(side)} of {len(self.nodes)} are none",
                f"knode testnet partition {self.nodes[-1].name} --dir {self.folder}",
            )
        self.topology.check_partition(node.number for node in self.nodes if node.name in side)
        self._divide(frozenset(side))

    def heal(self) -> None:
        """Let every node reach every other again; nothing happens when the network is whole.

        Raises:
            KnodeError: what a node answered.
        """
        self._divide(frozenset())

    def cut_off_from(self, node: TestnetNode) -> tuple[TestnetNode, ...]:
        """Return the nodes that `node` neither hears nor reaches."""
        if not self.partition:
            return ()
        side = node.name in self.partition
        return tuple(other for other in self.nodes if (other.name in self.partition) is not side)

    def kill(self, which: str) -> int:
        """End a node's daemon with SIGKILL and return the process id it had.

        Raises:
            KnodeError: NOT_FOUND, NOT_RUNNING.
        """
        node = self.node(which)
        pids = _pids([node])
        if not pids:
            raise KnodeError(
                Code.NOT_RUNNING,
                f"{node.name} does not run",
                f"knode testnet restart {which} --dir {self.folder}",
            )
        end(pids, signal.SIGKILL)
        return pids[0]

    def restart(self, which: str) -> None:
        """Start a node again on its own port; one that runs is stopped first."""
        node = self.node(which)
        self._end([node])
        self._run(CommandLine(), node, "up", "--detach")

    def down(self) -> None:
        """Stop every node and remove the nodes' homes; the folder itself stays, empty of them."""
        self._end(self.nodes)
        for node in self.nodes:
            Home(node.home).socket.unlink(missing_ok=True)  # it may lie outside of the home
            if node.home.exists():
                shutil.rmtree(node.home)
        Namespaces.stop(self.folder)
        (self.folder / STATE_FILE).unlink(missing_ok=True)

    def _end(self, nodes: Sequence[TestnetNode]) -> None:
        for _ in range(_END_ROUNDS):  # one that was being started may show up while others end
            pids = _pids(nodes)
            if not pids:
                return
            end(end(pids, signal.SIGTERM), signal.SIGKILL)
        raise KnodeError(
            Code.TIMEOUT, f"the processes {_pids(nodes)} cannot be ended", "kill -9 each of them"
        )

    def _divide(self, partition: frozenset[str]) -> None:
        """Write the partition down, for the nodes that start later, then tell those that run."""
        self.partition = partition
        self._save()
        network = self._network()
        for node in self.nodes:
            others = self.cut_off_from(node)
            if network is not None:
                network.bar(node.name, self.topology.barred(node.number, [each.number for each in others]))
                continue
            self._configure(node)
            params = {"cut_off_from": [other.node_id for other in others]}
            try:
                with Client.connect(Home(node.home)) as client:
                    client.call("testnet.partition", params, silence_s=ANSWER_TIMEOUT_S)
            except KnodeError as error:
                if error.code is not Code.NOT_RUNNING:
                    raise

    def _network(self) -> Namespaces | None:
        """Return the namespaces of the nodes; None on loopback.

        Raises:
            KnodeError: NOT_RUNNING when they should be there and are not.
        """
        if not self.topology.needs_namespaces:
            return None
        found = Namespaces.find(self.folder)
        if found is None:
            raise KnodeError(
                Code.NOT_RUNNING,
                f"the network of the testnet in {self.folder} does not run any more",
                f"knode testnet down --dir {self.folder}",
            )
        return found

    def _run(self, command_line: CommandLine, node: TestnetNode, *words: str) -> Any:
        """Run a command of a node where the node is."""
        network = self._network()
        place = [] if network is None else network.enter(node.name)
        return command_line.run(node.home, *words, place=place)

    def _configure(self, node: TestnetNode) -> None:
        """Write a node's configuration, as whoever runs a machine does."""
        settings = self.topology.settings_of(node.number, self.nodes[0].node_id)
        settings["discovery"] = DISCOVERY | settings.get("discovery", {})
        if not self.topology.needs_namespaces:
            cut_off_from = [other.node_id for other in self.cut_off_from(node)]
            settings["testnet"] = {"faults": True, "cut_off_from": cut_off_from}
        config = Home(node.home).config_system
        for folder in (node.home, config.parent):
            folder.mkdir(mode=0o700, exist_ok=True)
        _write(config, settings)

    def _form_cell(self, command_line: CommandLine, tell: Tell) -> None:
        """Found the cell on the first node and let the others join it, as many at once as there are cores."""
        first, *others = self.nodes
        host = "::" if self.topology.needs_namespaces else "127.0.0.1"
        tell(f"{first.name}: a new cell")
        founded = self._run(
            command_line, first, "init", "--name", first.name, "--port", str(first.port), "--host", host
        )
        first = replace(first, node_id=founded["node_id"])
        self.nodes = (first, *others)
        for node in self.nodes:
            self._configure(node)
        self._run(command_line, first, "up", "--detach")

        def join(node: TestnetNode) -> TestnetNode:
            ticket = self._run(command_line, first, "invite", "--no-wait")["ticket"]
            place = ("--name", node.name, "--port", str(node.port), "--host", host)
            result = self._run(command_line, node, "join", ticket, *place)
            tell(f"{node.name}: joined")
            return replace(node, node_id=result["node_id"])

        self.nodes = (first, *_all_at_once(command_line, join, others))

    def _row(self, node: TestnetNode) -> dict[str, Any]:
        pid = next(iter(_pids([node])), None)
        state = "stopped" if pid is None else "running"
        return {
            "name": node.name,
            "home": str(node.home),
            "pid": pid,
            "node_id": node.node_id,
            "state": state,
            "cut_off_from": [other.name for other in self.cut_off_from(node)],
            "sees": None if pid is None else self._view(node),
        }

    def _view(self, node: TestnetNode) -> dict[str, str] | None:
        try:
            states = _states_seen(node, silence_s=ANSWER_TIMEOUT_S)
        except KnodeError:  # it is starting, ending or held up: that is what null says
            return None
        return {other.name: states[other.node_id] for other in self.nodes if other.node_id in states}

    def _save(self) -> None:
        rows = [{key: value for key, value in asdict(node).items() if key != "home"} for node in self.nodes]
        document = {
            "nodes": rows,
            "partition": sorted(self.partition),
            "topology": msgspec.to_builtins(self.topology),
        }
        _write(self.folder / STATE_FILE, document)

    def _await_ready(self, tell: Tell) -> None:
        """Wait until every node sees all, knows the leader, and knows that all who should vote do."""
        tell(f"waiting until every node sees all {len(self.nodes)}, and who should vote votes")
        deadline = time.monotonic() + SEEN_TIMEOUT_S
        for node in self.nodes:
            while (missing := self._missing(node)) is not None:
                if time.monotonic() > deadline:
                    raise KnodeError(Code.TIMEOUT, f"after {SEEN_TIMEOUT_S:.0f} s {node.name} {missing}")
                time.sleep(_POLL_S)

    def _missing(self, node: TestnetNode) -> str | None:
        """Return what a node does not see yet; None when it sees all."""
        everyone = {node.node_id for node in self.nodes}
        due = voters_due(len(everyone))
        with Client.connect(Home(node.home)) as client:
            status = client.call("status", silence_s=SEEN_TIMEOUT_S)
            members = client.call("member.list", silence_s=SEEN_TIMEOUT_S)
        alive = {m["node_id"] for m in status["members"] if m["state"] == "alive"}
        voters = sum(member["votes"] == "voter" for member in members)
        if alive != everyone:
            return f"sees {len(alive)} of {len(everyone)} nodes alive"
        if status["leader"] is None:
            return "knows no leader"
        return None if voters == due else f"knows {voters} of {due} voters"


def voters_due(nodes: int) -> int:
    """Return how many of so many nodes vote in the end: never two."""
    return 1 if nodes == 2 else min(nodes, MAX_VOTERS)


def _node_of(folder: Path, row: dict[str, Any]) -> TestnetNode:
    """Return what a row of the testnet's file says; its home is below the folder, since `down` removes it."""
    if re.fullmatch("node[0-9]+", row["name"]) is None:
        raise ValueError(f"{row['name']!r} is no name of a node")
    return TestnetNode(row["name"], folder / row["name"], row["node_id"], row["port"])


def _claim(folder: Path) -> bool:
    """See that the folder is empty, or make it; return whether it was made."""
    if not folder.exists():
        try:
            folder.mkdir(parents=True, mode=0o700)
        except OSError as error:
            raise KnodeError(Code.DISK_READ_ONLY, f"{folder} cannot be made ({error.strerror})") from error
        return True
    if not folder.is_dir():
        raise KnodeError(Code.HOME_EXISTS, f"{folder} is no folder", "choose another with --dir")
    if (folder / STATE_FILE).exists():
        raise KnodeError(
            Code.HOME_EXISTS, f"{folder} holds a testnet already", f"knode testnet down --dir {folder}"
        )
    if any(folder.iterdir()):
        raise KnodeError(
            Code.HOME_EXISTS, f"{folder} is not empty", "choose an empty or new folder with --dir"
        )
    return False


def _all_at_once(
    command_line: CommandLine, work: Callable[[TestnetNode], TestnetNode], nodes: Sequence[TestnetNode]
) -> list[TestnetNode]:
    if not nodes:
        return []
    pool = ThreadPoolExecutor(_AT_ONCE)
    try:
        futures: list[Future[TestnetNode]] = [pool.submit(work, node) for node in nodes]
        wait(futures, return_when=FIRST_EXCEPTION)
        for future in futures:
            if future.done() and not future.cancelled() and (error := future.exception()):
                raise error
        return [future.result() for future in futures]
    except BaseException:
        command_line.interrupt()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _write(file: Path, document: dict[str, Any]) -> None:
    """Write a file as a whole: whoever is killed meanwhile leaves the old one."""
    draft = file.with_name(f".{file.name}")
    draft.write_text(json.dumps(document, indent=2) + "\n")
    draft.replace(file)


def _states_seen(node: TestnetNode, *, silence_s: float) -> dict[str, str]:
    """Return the state of each member, by its id, as a node has it."""
    with Client.connect(Home(node.home)) as client:
        members = client.call("status", silence_s=silence_s)["members"]
    return {member["node_id"]: member["state"] for member in members}


def _pids(nodes: Sequence[TestnetNode]) -> list[int]:
    """Return the processes of these nodes: those started as their daemons, and whatever answers for them."""
    pids = set(daemons_of([node.home for node in nodes]))
    for node in nodes:
        with contextlib.suppress(KnodeError), Client.connect(Home(node.home)) as client:
            pids.add(client.daemon_pid)
    return sorted(pids)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ignore Ctrl-C: impatience must not leave processes behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
