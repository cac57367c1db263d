"""Those who use the cell: they submit direct tasks on random nodes, and know the right answers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import trio

from knode.errors import KnodeError
from knode.identity import PublicKey
from knode.simulation.cell import Cell
from knode.simulation.host import Host
from knode.simulation.scenario import Clients
from knode.simulation.schedule import running_on
from knode.simulation.trace import Line
from knode.simulation.world import SimulatedRandomness
from knode.tasks.direct import Submission
from knode.tasks.task import Task

AGENT = "kExecutor:text"
WORDS = ("mesh", "links", "carry", "frames", "from", "node", "to", "node", "Grüße", "雪", "\n")
MOST_WORDS = 40
FILES = {
    Path("/clients/empty.txt"): "",
    Path("/clients/small.txt"): " ".join(WORDS * 100),
    Path("/clients/large.txt"): " ".join(WORDS * 22_000),
}
"""What lies on every machine to be sent along with tasks; the largest needs more than a first credit."""
NAMED_NODE = 0.5
"""How many tasks ask for a node by its name."""


@dataclass(frozen=True, slots=True)
class Submitted:
    """A task, and what its result must be."""

    task: Task
    origin: str
    right: dict[str, int]


@dataclass(slots=True)
class History:
    """What the clients did and what came of it."""

    cell: Cell
    submitted: list[Submitted] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    """By error code: submissions that began nothing."""
    begun: Counter[str] = field(default_factory=Counter)
    """By task id: attempts that began, on whatever node."""
    served_revoked: list[str] = field(default_factory=list)
    """Attempts that began for someone whom the node knew to be revoked."""
    faults: list[str] = field(default_factory=list)
    """What nodes logged as their own fault."""
    lost_links: list[str] = field(default_factory=list)
    """Conversations that ended, as either node logged it, where there was no other to the same peer."""

    def read(self, owner: str, line: Line) -> None:
        """Take a line of the trace, at the moment at which it is written."""
        if line["event"] == "attempt begins" and "submitter" in line:  # a direct one
            self.begun[line["task"]] += 1
            self._check_submitter(owner, line)
        if line["event"] == "peer disconnected":
            self._check_link(owner, line)
        if line.get("level") == "error" and "error" in line:  # an exception: a disk's failure is told without
            self.faults.append(f"{owner} logged: {line['event']} ({line['error']})")

    def _check_submitter(self, owner: str, line: Line) -> None:
        for host, node in self.cell.nodes():
            if host.name == owner and node.membership.in_cell and line["submitter"] != node.key.node_id:
                revoked = {PublicKey(raw).node_id for raw in node.membership.roster.revoked}
                if line["submitter"] in revoked:
                    self.served_revoked.append(f"{owner} begins task {line['task']} for who is revoked")

    def _check_link(self, owner: str, line: Line) -> None:
        for host, node in self.cell.nodes():
            if host.name == owner and node.membership.in_cell:
                lost = [p for p in node.peers.members() if p.node_id == line["peer"] and not p.conversation]
                self.lost_links += [f"{owner} lost {peer.node_id}: {line['why']}" for peer in lost]

    def states(self) -> dict[str, int]:
        """Return how many tasks are in each state, and how many were refused."""
        counts = Counter(str(each.task.state) for each in self.submitted)
        if self.refused:
            counts["refused"] = self.refused.total()
        return dict(sorted(counts.items()))


def lay_out_files(hosts: Sequence[Host]) -> None:
    """Put the clients' files on these machines."""
    for host in hosts:
        for path, text in FILES.items():
            host.disk.make_folder(path.parent)
            host.disk.write(path, text.encode())


async def submit_for_ever(
    cell: Cell, clients: Clients, history: History, randomness: SimulatedRandomness
) -> None:
    """Submit task after task, until cancelled."""
    async with trio.open_nursery() as nursery:
        while True:
            await trio.sleep(randomness.uniform(*clients.every_s))
            nursery.start_soon(_submit, cell, clients, history, randomness)


async def _submit(cell: Cell, clients: Clients, history: History, randomness: SimulatedRandomness) -> None:
    up = list(cell.nodes())
    if not up:
        return
    host, node = up[randomness.choose(len(up))]
    text = " ".join(WORDS[randomness.choose(len(WORDS))] for _ in range(randomness.choose(MOST_WORDS)))
    named = cell.hosts[randomness.choose(len(cell.hosts))].name
    request, artifacts = {"op": "count", "text": text}, tuple[Path, ...]()
    if randomness.happens(clients.with_file):
        path = list(FILES)[randomness.choose(len(FILES))]
        request, artifacts, text = {"op": "count"}, (path,), FILES[path]
    submission = Submission(
        agent=AGENT,
        input=json.dumps(request).encode(),
        artifacts=artifacts,
        on=named if randomness.happens(NAMED_NODE) else None,
        deadline_s=randomness.uniform(*clients.deadline_s),
    )
    with running_on(host.name):  # where it sleeps, its clients do
        try:
            task = await node.tasks.submit(submission)
        except KnodeError as error:
            history.refused[error.code] += 1
            return
        except Exception as error:
            history.faults.append(f"{host.name} broke on a submission: {error!r}")
            return
        history.submitted.append(Submitted(task, host.name, right_answer(text)))
        if randomness.happens(clients.cancelled):
            await trio.sleep(randomness.uniform(0, 0.05))
            if not task.state.final:
                await node.tasks.cancel(task)


@lru_cache(maxsize=256)
def right_answer(text: str) -> dict[str, int]:
    """Return what `kExecutor:text` must count, found in another way than it does."""
    lines = text.split("\n")
    return {
        "bytes": sum(len(character.encode()) * count for character, count in Counter(text).items()),
        "characters": Counter(text).total(),
        "lines": len(lines) - (lines[-1] == ""),
        "words": len([word for line in lines for word in line.split(" ") if word]),
    }


def answer_of(task: Task) -> Any:
    """Return what a succeeded task counted."""
    assert task.output is not None
    return json.loads(task.output)["total"]
