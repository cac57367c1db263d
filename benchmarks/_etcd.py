"""etcd as the peer beside which durable tasks are measured: three members on loopback, when it is installed.

Debian's `etcd-server`. Each put is committed by a majority and synced, as a durable task is.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

MEMBERS = 3
READY_WITHIN_S = 30.0
REQUEST_S = 0.5
"""How long one request is waited for, so that a dead member is noticed."""


def is_installed() -> bool:
    """Tell whether there is an etcd on this machine."""
    return shutil.which("etcd") is not None


class Member:
    """One member, and a connection to it."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], port: int) -> None:
        self.name = name
        self.process = process
        self._port = port
        self._connection: http.client.HTTPConnection | None = None

    def put(self, key: str, value: str) -> None:
        """Put a value; OSError or HTTPException when it is not acknowledged."""
        self._ask("/v3/kv/put", {"key": _base64(key), "value": _base64(value)})

    def is_leader(self) -> bool:
        """Tell whether it leads."""
        answer = self._ask("/v3/maintenance/status", {})
        return bool(answer["leader"] == answer["header"]["member_id"])

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _ask(self, path: str, body: dict[str, str]) -> Any:
        if self._connection is None:
            self._connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=REQUEST_S)
            self._connection.connect()
            self._connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            self._connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            response = self._connection.getresponse()
            answer = response.read()
        except BaseException:
            self.close()
            raise
        if response.status != http.HTTPStatus.OK:
            raise http.client.HTTPException(f"{response.status}: {answer.decode(errors='replace')}")
        return json.loads(answer)


@contextmanager
def cluster(folder: Path) -> Iterator[list[Member]]:
    """Run three members with their data below `folder`; give them once each takes a put."""
    ports = _free_ports(2 * MEMBERS)
    clients, peers = ports[:MEMBERS], ports[MEMBERS:]
    names = [f"m{number}" for number in range(MEMBERS)]
    initial = ",".join(f"{n}=http://127.0.0.1:{port}" for n, port in zip(names, peers, strict=True))
    with ExitStack() as stack:
        members = []
        for name, client, peer in zip(names, clients, peers, strict=True):
            process = subprocess.Popen(
                [
                    "etcd",
                    *("--name", name),
                    *("--data-dir", os.fspath(folder / name)),
                    *("--listen-client-urls", f"http://127.0.0.1:{client}"),
                    *("--advertise-client-urls", f"http://127.0.0.1:{client}"),
                    *("--listen-peer-urls", f"http://127.0.0.1:{peer}"),
                    *("--initial-advertise-peer-urls", f"http://127.0.0.1:{peer}"),
                    *("--initial-cluster", initial),
                    *("--log-level", "error"),
                ],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            stack.callback(_end, process)
            members.append(Member(name, process, client))
        for member in members:
            stack.callback(member.close)
            _await_put(member)
        yield members


def _await_put(member: Member) -> None:
    until = time.monotonic() + READY_WITHIN_S
    while True:
        try:
            member.put("ready", member.name)
        except (OSError, http.client.HTTPException):
            if time.monotonic() > until:
                raise
            time.sleep(0.1)
        else:
            return


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()
