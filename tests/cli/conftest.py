"""A daemon for the tests of the command line: the real server, answering as the test says."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio
from real_processes import Process

from knode.cli import main as program
from knode.control.protocol import PROTOCOL
from knode.control.server import Handler, Notify, serve
from knode.errors import KnodeError
from knode.home.layout import Home


@dataclass
class Answers:
    """What the daemon answers by method, and what it was asked."""

    results: dict[str, Any] = field(default_factory=dict)
    steps: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    asked: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    cancelled: threading.Event = field(default_factory=threading.Event)
    waiting: threading.Event = field(default_factory=threading.Event)

    def handler(self, method: str) -> Handler:
        async def answer(params: dict[str, Any], notify: Notify) -> Any:
            self.asked.append((method, params))
            for step in self.steps.get(method, []):
                notify(step)
            result = self.results[method]
            if isinstance(result, KnodeError):
                raise result
            if result is ...:
                self.waiting.set()
                try:
                    await trio.sleep_forever()
                finally:
                    self.cancelled.set()
            return result

        return answer


METHODS = [
    *("status", "stop", "invite", "invite.wait", "join", "peer.list", "peer.show", "peer.ping", "doctor"),
    *("member.list", "member.role", "member.revoke", "member.rotate", "member.recover", "logs.tail"),
    *("member.survey", "member.survive", "member.ledger", "member.keep"),
    *("agent.list", "agent.show", "agent.install", "agent.start", "agent.stop"),
    *("task.submit", "task.list", "task.show", "task.watch", "task.cancel"),
    *("task.explain", "task.effects"),
]


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


@pytest.fixture
def daemon(home: Home) -> Iterator[Answers]:
    """Serve on the home's socket from another thread until the test ends."""
    answers = Answers()
    home.path.mkdir(mode=0o700)
    ready = threading.Event()
    stop: list[Any] = []

    async def main() -> None:
        async with trio.open_nursery() as nursery:

            async def start(task_status: trio.TaskStatus[None]) -> None:
                await serve(
                    home.socket,
                    {method: answers.handler(method) for method in METHODS},
                    hello={"protocol": PROTOCOL, "version": "test"},
                    on_fault=lambda method, error: None,
                    task_status=task_status,
                )

            await nursery.start(start)
            stop.append((trio.lowlevel.current_trio_token(), nursery.cancel_scope))
            ready.set()

    thread = threading.Thread(target=trio.run, args=(main,), daemon=True)
    thread.start()
    assert ready.wait(60)
    yield answers
    token, scope = stop[0]
    token.run_sync_soon(scope.cancel)
    thread.join(60)
    assert not thread.is_alive()


@dataclass(frozen=True)
class Run:
    """How a command ended and what it wrote."""

    code: int
    out: str
    err: str


@pytest.fixture
def knode(home: Home, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the command line in this process: `knode("task", "list")`."""

    def run(*words: str) -> Run:
        monkeypatch.setattr(sys, "argv", ["knode", "--home", str(home.path), *words])
        capsys.readouterr()
        code = program.main()
        captured = capsys.readouterr()
        return Run(code, captured.out, captured.err)

    return run


@pytest.fixture
def process(home: Home) -> Any:
    """Start the command line as a process of its own."""

    def start(*words: str, **options: Any) -> Process:
        environment = {**os.environ, **options.pop("environment", {})}
        return Process(
            [sys.executable, "-m", "knode", *words, "--home", str(home.path)],
            stdin=options.pop("stdin", subprocess.PIPE),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            **options,
        )

    return start
