"""`python -m benchmarks.soak --minutes 60`: a cell of real nodes at work for long, one restarted each minute.

Every node submits direct tasks to the others all along: text, files, sandboxed Python. The nodes but the
first are restarted in turn: killed, stopped in order, or frozen for twenty seconds. Each minute every node
tells what its process takes. At the end stand a table and a verdict: exit code 1 when a process grew beyond
its bound (a leak), when an answer was lost, or when one failed that no restart excuses.
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles
from typing import Any

from benchmarks.report import aligned
from knode.control.client import Client
from knode.errors import Code, KnodeError
from knode.home.layout import Home
from knode.testnet import Testnet

NODES = 5
FROZEN_S = 20.0
PAUSE_S = 0.2
"""Between the answer of one task and the next, for each node."""
DEADLINE_S = 15.0
ANSWER_WITHIN_S = DEADLINE_S + 10.0
"""An answer that comes later is lost, unless the node that was asked for it was itself disturbed."""
PATIENCE_S = ANSWER_WITHIN_S + FROZEN_S + 30.0
EXCUSED_BEFORE_S = 1.0
EXCUSED_AFTER_S = 20.0
"""A restart excuses what was under way this long before it until this long after it."""
FILE_BYTES = 300_000
WARM_UP_MINUTES = 10.0
BOUNDS = {"resident_bytes": 8 * 2**20, "descriptors": 8, "threads": 4, "tasks": 12}
"""How far the lowest of the last samples may lie above the lowest of those after the warm-up."""
WINDOW = 5
"""Samples at either end whose lowest is compared: what is under way comes and goes, a leak stays."""

SHOWN_FAULTS = 20

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Sample:
    """What one node's process took at one moment, in seconds since the start."""

    at_s: float
    pid: int
    values: dict[str, int]


@dataclass(frozen=True, slots=True)
class Disturbance:
    """A restart of a node, as seen from outside; `end_s` is when it answered again."""

    node: str
    begin_s: float
    end_s: float

    def excuses(self, nodes: Sequence[str], begin_s: float, end_s: float) -> bool:
        """Whether a task of these nodes, which took from `begin_s` to `end_s`, may have suffered from it."""
        early, late = self.begin_s - EXCUSED_BEFORE_S, self.end_s + EXCUSED_AFTER_S
        return self.node in nodes and begin_s <= late and end_s >= early


@dataclass(frozen=True, slots=True)
class Answer:
    """How one submitted task ended."""

    submitter: str
    worker: str
    begin_s: float
    end_s: float
    outcome: str
    """`succeeded`, `lost`, `wrong`, or an error's code."""


@dataclass(slots=True)
class Record:
    """All that was seen. Threads only append."""

    samples: dict[str, list[Sample]] = field(default_factory=dict)
    disturbances: list[Disturbance] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """What else went wrong, one sentence each."""

    def excused(self, answer: Answer) -> bool:
        """Whether a restart excuses that an answer is no success; nothing excuses a lost or a wrong one."""
        if answer.outcome in ("lost", "wrong"):
            return False
        nodes = (answer.submitter, answer.worker)
        return any(d.excuses(nodes, answer.begin_s, answer.end_s) for d in self.disturbances)

    def growth(self, node: str, name: str, warm_up_s: float) -> int:
        """Return by how much the floor of a value rose since the warm-up; 0 with too few samples."""
        values = [s.values[name] for s in self.samples.get(node, []) if s.at_s >= warm_up_s]
        window = min(WINDOW, len(values) // 2)
        return min(values[-window:]) - min(values[:window]) if window else 0

    def faults(self, warm_up_s: float) -> list[str]:
        """Return what is wrong, one sentence each; empty when the run was good."""
        found = [
            f"{node}: {name} rose by {grown:,}, more than {bound:,}"
            for node in sorted(self.samples)
            for name, bound in BOUNDS.items()
            if (grown := self.growth(node, name, warm_up_s)) > bound
        ]
        bad = [a for a in self.answers if a.outcome != "succeeded" and not self.excused(a)]
        found += [
            f"{a.outcome}: {a.submitter} to {a.worker}, from {a.begin_s:.1f} s to {a.end_s:.1f} s"
            for a in bad
        ]
        return found + self.problems


class Soak:
    """One run on a testnet that is up."""

    def __init__(self, net: Testnet, file: Path, tell: Tell) -> None:
        self.record = Record()
        self._net = net
        self._file = file
        self._tell = tell
        self._begun = time.monotonic()
        self._over = threading.Event()

    def run(self, minutes: float, every_s: float) -> None:
        """Submit, restart and sample for so long; then let what is under way end, and sample once more."""
        submitters = [threading.Thread(target=self._submit_all, args=(n.name,)) for n in self._net.nodes]
        for thread in submitters:
            thread.start()
        try:
            self._disturb(minutes * 60, every_s)
        except KnodeError as error:
            self.record.problems.append(f"after {self._now():.0f} s: {error}")
        finally:
            self._over.set()
            for thread in submitters:
                thread.join()
        try:
            self._sample()
        except KnodeError as error:
            self.record.problems.append(f"at the end: {error}")
        self._look_for_leftovers()

    def _now(self) -> float:
        return time.monotonic() - self._begun

    def _client(self, name: str) -> Client:
        return Client.connect(Home(self._net.node(name).home))

    # Restarts and samples, in the main thread.

    def _disturb(self, seconds: float, every_s: float) -> None:
        ways = itertools.cycle((self._kill, self._stop_in_order, self._freeze))
        nodes = itertools.cycle(node.name for node in self._net.nodes[1:])
        for round_ in itertools.count(1):
            self._wait_until(min(round_ * every_s, seconds))
            self._sample()
            if self._now() >= seconds - every_s / 2:  # the last one has time to come back
                break
            way, name = next(ways), next(nodes)
            begin_s = self._now()
            way(name)
            self._await_seen(name)
            self.record.disturbances.append(Disturbance(name, begin_s, self._now()))
            self._tell_progress(f"{name} {way.__name__.strip('_').replace('_', ' ')}")
        self._wait_until(seconds)

    def _wait_until(self, at_s: float) -> None:
        while (left_s := at_s - self._now()) > 0:
            time.sleep(min(left_s, 0.5))

    def _kill(self, name: str) -> None:
        self._net.kill(name)
        self._net.restart(name)

    def _stop_in_order(self, name: str) -> None:
        self._net.restart(name)

    def _freeze(self, name: str) -> None:
        with self._client(name) as client:
            pid = client.daemon_pid
        os.kill(pid, signal.SIGSTOP)
        try:
            time.sleep(FROZEN_S)
        finally:
            os.kill(pid, signal.SIGCONT)

    def _await_seen(self, name: str) -> None:
        """Wait until the first node sees this one alive; that it never comes back is a fault of its own."""
        deadline = time.monotonic() + 60
        with self._client(self._net.nodes[0].name) as client:
            while time.monotonic() < deadline:
                members = client.call("status", silence_s=30)["members"]
                if any(m["name"] == name and m["state"] == "alive" for m in members):
                    return
                time.sleep(0.2)
        raise KnodeError(Code.TIMEOUT, f"{name} has not come back within a minute")

    def _sample(self) -> None:
        for node in self._net.nodes:
            with self._client(node.name) as client:
                values = client.call("status", silence_s=30)["process"]
                sample = Sample(self._now(), client.daemon_pid, values)
            self.record.samples.setdefault(node.name, []).append(sample)

    def _look_for_leftovers(self) -> None:
        for node in self._net.nodes:
            left = [path.name for path in Home(node.home).attempts.iterdir()]
            if left:
                self.record.problems.append(f"{node.name}: {len(left)} attempts were left on the disk")

    def _tell_progress(self, happened: str) -> None:
        outcomes = Counter(answer.outcome for answer in list(self.record.answers))
        first = self.record.samples[self._net.nodes[0].name][-1].values
        self._tell(
            f"{self._now() / 60:5.1f} min  {happened}; {dict(outcomes)}; "
            f"node1 {first['resident_bytes'] / 2**20:.1f} MiB, {first['descriptors']} descriptors, "
            f"{first['tasks']} tasks"
        )

    # Tasks, in a thread for each node.

    def _submit_all(self, name: str) -> None:
        others = itertools.cycle(node.name for node in self._net.nodes if node.name != name)
        client: Client | None = None
        for number in itertools.count():
            if self._over.wait(PAUSE_S):
                break
            if client is None:
                with suppress(KnodeError):  # it is being restarted
                    client = self._client(name)
                if client is None:
                    continue
            answer = self._submit(client, name, next(others), number)
            self.record.answers.append(answer)
            if answer.outcome in ("lost", Code.UNAVAILABLE):
                client.close()
                client = None
        if client is not None:
            client.close()

    def _submit(self, client: Client, submitter: str, worker: str, number: int) -> Answer:
        params, expected = _task(number, self._file)
        begin_s = self._now()
        asked = {**params, "on": worker, "direct": True, "wait": True, "deadline_s": DEADLINE_S}
        try:
            task = client.call("task.submit", asked, silence_s=PATIENCE_S)
        except KnodeError as error:
            outcome = "lost" if error.code is Code.TIMEOUT else str(error.code)
        else:
            outcome = _outcome(task, expected)
        answer = Answer(submitter, worker, begin_s, self._now(), outcome)
        late = answer.end_s - begin_s > ANSWER_WITHIN_S and not self.record.excused(answer)
        return Answer(submitter, worker, begin_s, answer.end_s, "lost") if late else answer


def _task(number: int, file: Path) -> tuple[dict[str, Any], str | dict[str, int]]:
    """Return what to submit as the task of this number, and its result: the text, or what is counted."""
    if number % 25 == 7:
        return {"agent": "kExecutor:python", "input": f"print({number} * 2)"}, f"{number * 2}\n"
    if number % 10 == 3:
        counted = {"bytes": FILE_BYTES}
        return {"agent": "kExecutor:text", "input": '{"op":"count"}', "artifacts": [str(file)]}, counted
    words = number % 50 + 1
    return {"agent": "kExecutor:text", "input": "word " * words}, {"words": words}


def _outcome(task: dict[str, Any], expected: str | dict[str, int]) -> str:
    if task["state"] != "succeeded":
        return str(task["error"]["code"])
    result = task["result"]
    is_right = (
        result == expected if isinstance(expected, str) else expected.items() <= result["total"].items()
    )
    return "succeeded" if is_right else "wrong"


def table_of(record: Record, warm_up_s: float) -> str:
    """Return what each process took, and how far its floor rose after the warm-up."""
    headings = ["node", "lives", "value", "first", "greatest", "last", "rose by", "bound"]
    lines = []
    for node, samples in sorted(record.samples.items()):
        for name, bound in BOUNDS.items():
            values = [sample.values[name] for sample in samples]
            numbers = (values[0], max(values), values[-1], record.growth(node, name, warm_up_s), bound)
            lives = len({sample.pid for sample in samples})
            lines.append([node, str(lives), name, *(_shown(name, number) for number in numbers)])
    return aligned([headings, *lines])


def _shown(name: str, number: int) -> str:
    return f"{number / 2**20:.1f} MiB" if name == "resident_bytes" else str(number)


def summary_of(record: Record) -> str:
    """Return the answers by outcome, and how long successes took."""
    outcomes = Counter(answer.outcome for answer in record.answers)
    excused = Counter(a.outcome for a in record.answers if a.outcome != "succeeded" and record.excused(a))
    lines = [
        [outcome, str(count), str(excused[outcome]) if outcome != "succeeded" else "-"]
        for outcome, count in outcomes.most_common()
    ]
    took = sorted(a.end_s - a.begin_s for a in record.answers if a.outcome == "succeeded")
    text = aligned([["answer", "count", "excused by a restart"], *lines])
    if len(took) > 1:
        cut = quantiles(took, n=100)
        text += (
            f"\n\nsuccesses took {cut[49] * 1000:.0f} ms at the median, {cut[98] * 1000:.0f} ms at the 99th"
        )
        text += f" percentile, {took[-1] * 1000:.0f} ms at most"
    return text


@contextmanager
def _testnet(nodes: int, tell: Tell) -> Iterator[tuple[Testnet, Path]]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "file.txt")
        file.write_bytes(b"x" * FILE_BYTES)
        net = Testnet.up(Path(folder, "net"), nodes=nodes, tell=tell)
        try:
            yield net, file
        finally:
            net.down()


def main(words: Sequence[str]) -> int:
    """Run the soak; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--nodes", type=int, default=NODES)
    parser.add_argument("--every", type=float, default=60.0, help="seconds between restarts")
    options = parser.parse_args(words)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # nothing stays behind

    def tell(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    with _testnet(options.nodes, tell) as (net, file):
        soak = Soak(net, file, tell)
        soak.run(options.minutes, options.every)
    warm_up_s = 60 * min(WARM_UP_MINUTES, options.minutes / 3)
    faults = soak.record.faults(warm_up_s)
    print(f"{options.nodes} nodes, {options.minutes:g} minutes, {len(soak.record.disturbances)} restarts\n")
    print(table_of(soak.record, warm_up_s), summary_of(soak.record), sep="\n\n")
    more = [f"and {len(faults) - SHOWN_FAULTS} more"] if len(faults) > SHOWN_FAULTS else []
    print("\nverdict: " + ("\n  ".join(["BAD", *faults[:SHOWN_FAULTS], *more]) if faults else "good"))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
