"""Where everything lies in a home folder."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

SOCKET_PATH_BYTES = 100
"""A Unix socket's name fits in 108 bytes on Linux and 104 on macOS."""


def _runtime_folder(environment: Mapping[str, str]) -> Path | None:
    folder = environment.get("XDG_RUNTIME_DIR", "")
    return Path(folder) if folder.startswith("/") else None


@dataclass(frozen=True, slots=True)
class Home:
    """A home folder by its absolute path. Nothing here touches the disk.

    `runtime_folder` is the user's `$XDG_RUNTIME_DIR`, where the socket goes when the home's own path
    is too long for one.
    """

    path: Path
    runtime_folder: Path | None = field(default_factory=lambda: _runtime_folder(os.environ))

    @property
    def format_file(self) -> Path:
        """Says that this is a node's home, whole, and of which format."""
        return self.path / "home.json"

    @property
    def unfinished_file(self) -> Path:
        """There while the home is being made."""
        return self.path / "unfinished"

    @property
    def config(self) -> Path:
        """The folder of the configuration files."""
        return self.path / "config"

    @property
    def config_system(self) -> Path:
        """Configuration from whoever runs the machine."""
        return self.config / "system_config.json"

    @property
    def config_user(self) -> Path:
        """Configuration from the user; `knode config set` writes it."""
        return self.config / "user_config.json"

    @property
    def identity(self) -> Path:
        """The folder of keys and certificate."""
        return self.path / "identity"

    @property
    def node_key(self) -> Path:
        """The node's private key."""
        return self.identity / "node.key"

    @property
    def owner_key(self) -> Path:
        """The cell owner's private key; only where the cell was founded."""
        return self.identity / "owner.key"

    @property
    def certificate(self) -> Path:
        """The TLS certificate and its key."""
        return self.identity / "tls.pem"

    @property
    def state(self) -> Path:
        """The folder of what the node knows."""
        return self.path / "state"

    @property
    def database(self) -> Path:
        """The node's database."""
        return self.state / "node.db"

    @property
    def ledger(self) -> Path:
        """The cell's tasks, as far as this node has applied them."""
        return self.state / "ledger.db"

    @property
    def raft(self) -> Path:
        """The folder of the cell's log. In no backup: an old copy of it is worth nothing."""
        return self.state / "raft"

    @property
    def agents(self) -> Path:
        """The folder of installed agents."""
        return self.state / "agents"

    @property
    def attempts(self) -> Path:
        """The folder of the attempts that run; emptied at each start."""
        return self.state / "attempts"

    @property
    def work(self) -> Path:
        """The database of the attempts that this node has accepted."""
        return self.state / "work.db"

    @property
    def inputs(self) -> Path:
        """The folder of the files of durable tasks."""
        return self.state / "inputs"

    @property
    def log(self) -> Path:
        """The folder of the log files."""
        return self.path / "log"

    @property
    def log_file(self) -> Path:
        """The log that is written now; older ones end in .1, .2, …"""
        return self.log / "knode.jsonl"

    @property
    def run(self) -> Path:
        """The folder of what lives only as long as the daemon."""
        return self.path / "run"

    @property
    def lock_file(self) -> Path:
        """Locked by the daemon while it runs; holds its process id."""
        return self.run / "lock"

    @property
    def socket(self) -> Path:
        """The daemon's socket, at most SOCKET_PATH_BYTES long.

        `run/knode.sock`; when that is too long, a name made from the home's path in the runtime folder
        or else in a folder of this user below the temporary folder.
        """
        digest = hashlib.sha256(os.fsencode(self.path)).hexdigest()[:16]
        last = Path("/tmp") / f"knode-{os.getuid()}" / f"{digest}.sock"
        candidates = [self.run / "knode.sock"]
        if self.runtime_folder is not None:
            candidates.append(self.runtime_folder / f"knode-{digest}.sock")
        return next((path for path in candidates if len(os.fsencode(path)) <= SOCKET_PATH_BYTES), last)

    @property
    def folders(self) -> tuple[Path, ...]:
        """Every folder of the home, parents first."""
        return (
            self.path,
            self.config,
            self.identity,
            self.state,
            self.agents,
            self.attempts,
            self.inputs,
            self.log,
            self.run,
        )


def locate_home(explicit: str | None, environment: Mapping[str, str]) -> Home:
    """Return the home that is meant: `--home`, else `KNODE_HOME`, else `~/.local/share/knode`."""
    chosen = explicit or environment.get("KNODE_HOME") or "~/.local/share/knode"
    if chosen == "~" or chosen.startswith("~/"):
        chosen = environment.get("HOME", str(Path.home())) + chosen[1:]
    return Home(Path(chosen).resolve(), _runtime_folder(environment))
