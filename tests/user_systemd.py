"""A real systemd of a user, in namespaces of its own: it sees no other process or service (Linux, root)."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from real_processes import Process

_SYSTEMD = "/lib/systemd/systemd"
_CGROUPS = Path("/sys/fs/cgroup")
_START_S = 20.0
# Private mounts: of /run, for systemd wants to find itself booted and the user's folder there; of the
# control groups, of which it sees those below its own alone.
_SET_UP = """
set -e
mount --make-rprivate /
mount -t tmpfs tmpfs /run
mkdir -p /run/systemd/system /run/user/0
chmod 700 /run/user/0
if [ -e /sys/fs/cgroup/cgroup.controllers ]; then
    umount -l /sys/fs/cgroup
    mount -t cgroup2 cgroup2 /sys/fs/cgroup
else
    umount -l /sys/fs/cgroup
    mount -t tmpfs tmpfs /sys/fs/cgroup
    mkdir /sys/fs/cgroup/systemd
    mount -t cgroup -o none,name=systemd cgroup /sys/fs/cgroup/systemd
fi
exec sleep infinity
"""


class UserSystemd:
    """The systemd of one user, and a way to run programs beside it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        parent = _CGROUPS if (_CGROUPS / "cgroup.controllers").exists() else _CGROUPS / "systemd"
        self._cgroup = parent / f"knode-test-{os.getpid()}"
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> UserSystemd:
        with self._stack:
            self._start()
            self._stack = self._stack.pop_all()
        return self

    def _start(self) -> None:
        self._cgroup.mkdir()
        self._stack.callback(self._remove_cgroup)
        namespaces = ["unshare", "-m", "-p", "-f", "-C", "--mount-proc", "--kill-child"]
        shell = self._stack.enter_context(
            Process(self._in_cgroup(*namespaces, "sh", "-c", _SET_UP), stderr=subprocess.DEVNULL)
        )
        self._first = self._child_of(shell)
        self.boot()

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def boot(self) -> None:
        """Start systemd, as a login or a boot with lingering does; wait until it answers."""
        self._systemd = self._stack.enter_context(
            Process(self.beside(_SYSTEMD, "--user"), env=self.environment(), stderr=subprocess.DEVNULL)
        )
        deadline = time.monotonic() + _START_S
        while self.run("systemctl", "--user", "is-system-running").stdout.strip() not in (
            "running",
            "degraded",
        ):
            if time.monotonic() > deadline or self._systemd.poll() is not None:
                pytest.skip("a systemd of a user cannot be run here")
            time.sleep(0.05)

    def shut_down(self) -> None:
        """End systemd and all its services, as a shutdown does."""
        self.run("systemctl", "--user", "exit")
        self._systemd.wait(60)

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a program as this user, to its end."""
        return subprocess.run(
            self.beside(*words),
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def beside(self, *words: str) -> list[str]:
        """Return the command line that runs `words` where systemd runs."""
        return self._in_cgroup("nsenter", "-t", str(self._first), "-m", "-p", "-C", *words)

    def _in_cgroup(self, *words: str) -> list[str]:
        return ["sh", "-c", f'echo $$ > {self._cgroup}/cgroup.procs && exec "$@"', "sh", *words]

    def environment(self) -> dict[str, str]:
        """Return the environment of a login shell of this user."""
        kept = {"PATH": os.environ["PATH"], "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
        return kept | {"HOME": str(self.home), "XDG_RUNTIME_DIR": "/run/user/0", "LANG": "C.UTF-8"}

    @staticmethod
    def _child_of(parent: Process) -> int:
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline and parent.poll() is None:
            found: Sequence[str] = children.read_text().split()
            if found and Path(f"/proc/{found[0]}/comm").read_text().strip() == "sleep":
                return int(found[0])
            time.sleep(0.02)
        pytest.skip("namespaces for a systemd of a user cannot be made here")

    def _remove_cgroup(self) -> None:
        deadline = time.monotonic() + _START_S
        while self._cgroup.exists():
            for folder, _, _ in os.walk(self._cgroup, topdown=False):
                with contextlib.suppress(OSError):  # its processes are ending
                    os.rmdir(folder)
            assert time.monotonic() < deadline, f"{self._cgroup} cannot be removed"


@contextlib.contextmanager
def user_systemd(home: Path) -> Iterator[UserSystemd]:
    """Run a systemd for a user with this home folder; the test is skipped where that cannot be."""
    if os.getuid() != 0 or not Path(_SYSTEMD).exists() or shutil.which("nsenter") is None:
        pytest.skip("a systemd of a user cannot be run here: it takes root, systemd and nsenter")
    if not os.access(_CGROUPS, os.W_OK):
        pytest.skip("a systemd of a user cannot be run here: the control groups are read-only")
    with UserSystemd(home) as running:
        yield running
