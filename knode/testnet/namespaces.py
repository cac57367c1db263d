"""A testnet's network in namespaces of this machine (Linux), and how to get into them.

As root, or in a user namespace where those are allowed. The namespaces belong to one process
(`knode.testnet.network`), which is found again by its arguments.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from knode.errors import Code, KnodeError
from knode.testnet.processes import end, processes_with
from knode.testnet.topology import IPAddress, Topology

PROGRAMS = {
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "mount": "mount",
    "ip": "iproute2",
    "nft": "nftables",
}
"""What is run, and the packages of Debian that bring it."""

NAMES = Path("/run/netns")
"""Where `ip netns` keeps its names: below a file system that the network's process alone sees."""
READY = "ready"
"""What that process says when all is built; else why it is not."""

_MODULE = "knode.testnet.network"
_WAYS_IN = (
    ("unshare", "--net", "--mount"),
    ("unshare", "--user", "--map-root-user", "--net", "--mount"),
)
_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
"""Other users than root seldom have the folders of what manages networks in theirs."""
_PROBE_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Namespaces:
    """A network at work; `pid` is its process."""

    pid: int

    @classmethod
    def start(cls, folder: Path, topology: Topology) -> Namespaces:
        """Build the network of a testnet, in place of one that was left behind.

        A failure leaves nothing: the namespaces end with the process that was making them.

        Raises:
            KnodeError: UNAVAILABLE where namespaces or one of the programs are not to be had.
        """
        cls.stop(folder)
        process = subprocess.Popen(
            [*_way_in(), sys.executable, "-m", _MODULE, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PATH": _PATH},
            cwd="/",
            start_new_session=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        said = b""
        try:
            with process.stdin, process.stdout:
                process.stdin.write(msgspec.json.encode(topology))
                process.stdin.close()
                said = process.stdout.readline()
        finally:
            if said.strip() != json.dumps(READY).encode():
                process.kill()
                process.wait()
        if process.returncode is not None:
            raise KnodeError(
                Code.UNAVAILABLE,
                f"the network cannot be built: {said.decode(errors='replace').strip() or 'it ended'}",
                "leave out --netns and --topology: the nodes then share loopback",
            )
        process.returncode = 0  # it outlives this program on purpose, and nobody waits for it
        return cls(process.pid)

    @classmethod
    def find(cls, folder: Path) -> Namespaces | None:
        """Return the network of a testnet; None when it does not run."""
        found = _pids(folder)
        return cls(found[0]) if found else None

    def enter(self, node: str) -> list[str]:
        """Return the words before a command that is to run where a node is."""
        names = f"/proc/{self.pid}/root{NAMES}"
        return [_program("nsenter"), *self._user, f"--net={names}/{node}", "--"]

    def bar(self, node: str, addresses: Sequence[IPAddress]) -> None:
        """Let nothing in to a node from these addresses, and from all others everything."""
        lines = ["flush set inet knode cut4", "flush set inet knode cut6"]
        lines += [f"add element inet knode cut{each.version} {{ {each} }}" for each in addresses]
        subprocess.run(
            [*self.enter(node), _program("nft"), "-f", "-"],
            input="\n".join(lines).encode(),
            check=True,
            capture_output=True,
        )

    @classmethod
    def stop(cls, folder: Path) -> None:
        """End the network of a testnet, if there is one; what is still in it is cut off from everything."""
        end(end(_pids(folder), signal.SIGTERM), signal.SIGKILL)

    @property
    def _user(self) -> list[str]:
        own, theirs = (os.readlink(f"/proc/{pid}/ns/user") for pid in ("self", self.pid))
        return [] if own == theirs else ["--user", "--preserve-credentials", f"--target={self.pid}"]


def _pids(folder: Path) -> list[int]:
    return processes_with(_MODULE.encode(), os.fsencode(folder))


def _program(name: str) -> str:
    found = shutil.which(name, path=_PATH)
    if found is None:
        raise KnodeError(
            Code.UNAVAILABLE,
            f"the program {name!r} is not installed, and namespaces need it",
            f"install {PROGRAMS[name]}, or leave out --netns and --topology",
        )
    return found


def _way_in() -> list[str]:
    """Return the command that makes namespaces here, having tried it."""
    for name in PROGRAMS:
        _program(name)
    said = ""
    for words in _WAYS_IN:
        line = [_program(words[0]), *words[1:]]
        tried = subprocess.run(
            [*line, "true"], capture_output=True, text=True, timeout=_PROBE_TIMEOUT_S, check=False
        )
        if tried.returncode == 0:
            return line
        said = tried.stderr.strip()
    raise KnodeError(
        Code.UNAVAILABLE,
        f"namespaces cannot be made here ({said})",
        "run it as root of a whole machine, or leave out --netns and --topology",
    )
