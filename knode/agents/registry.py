"""The agents of this node: the shipped ones and the installed ones, kept durably.

An installed agent is a record (`<class>-<name>.agent`) and its code (`code/<hash>/`). The record names
the code and replaces its predecessor in one atomic write, so a crash leaves the old agent or the new.
Whatever does not verify when it is read is listed as refused, and never run.
"""

from __future__ import annotations

import importlib.resources
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import msgspec

from knode.agents.code import MAX_FILES, copy_code, list_code, verify_code
from knode.agents.manifest import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    MAX_SIGNED_BYTES,
    SIGNED_NAME,
    FileDigest,
    Manifest,
    Runtime,
    SignedManifest,
    hash_code,
    open_manifest,
    parse_manifest,
    sign_manifest,
)
from knode.errors import Code, KnodeError
from knode.identity import KeyPair, PublicKey
from knode.klp.codec import Decoder, encode
from knode.world import World

MAX_AGENTS = 200
_SUFFIX = ".agent"
_MAX_RECORD_BYTES = 2 * 1024 * 1024
_RECORD_FORMAT = 1


class State(StrEnum):
    """Whether a node runs tasks for an agent."""

    RUNNING = "running"
    STOPPED = "stopped"
    REFUSED = "refused"
    """Its record, signature, publisher or code does not verify."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentEntry:
    """One agent of this node."""

    manifest: Manifest
    publisher: PublicKey
    state: State
    code: Path | None = None
    """Where its code is; None for a shipped agent."""
    files: tuple[FileDigest, ...] = ()
    problem: str = ""
    """Why it is refused; else empty."""

    @property
    def runtime(self) -> Runtime:
        """How it is run."""
        return self.manifest.runtime


class _Record(msgspec.Struct, frozen=True, array_like=True):
    format: Annotated[int, msgspec.Meta(ge=_RECORD_FORMAT, le=_RECORD_FORMAT)]
    stopped: bool
    signed: Annotated[bytes, msgspec.Meta(max_length=MAX_SIGNED_BYTES)]
    """Empty for a shipped agent, of which only `stopped` is kept."""
    files: Annotated[tuple[FileDigest, ...], msgspec.Meta(max_length=MAX_FILES)]


_record_decoder: Decoder[_Record] = Decoder(_Record)


def _read_shipped() -> tuple[Manifest, ...]:
    folder = importlib.resources.files("knode.agents") / "shipped"
    texts = sorted(item.read_text("utf-8") for item in folder.iterdir() if item.name.endswith(".toml"))
    return tuple(parse_manifest(text) for text in texts)


SHIPPED = _read_shipped()
"""The agents that come with knode. Read once, when the module is: they are part of the program."""


class Registry:
    """The agents of one node.

    Args:
        folder: the node's `state/agents`; made when it is not there.
        key: the node's own key, which signs what its owner installs unsigned.
        is_publisher_trusted: whether a key other than the node's own may publish agents here.

    Calls block on the disk, for up to 64 MiB of code: run `load`, `install` and `verify` through
    `World.blocking`. Changes wait for one another; what is read meanwhile is the state before.
    """

    def __init__(
        self,
        world: World,
        folder: Path,
        key: KeyPair,
        is_publisher_trusted: Callable[[PublicKey], bool],
    ) -> None:
        self._world = world
        self._folder = folder
        self._key = key
        self._is_publisher_trusted = is_publisher_trusted
        self._entries: dict[str, AgentEntry] = {}
        self._changing = threading.Lock()

    def load(self) -> None:
        """Read and verify every agent, and remove code that no record names."""
        self._world.disk.make_folder(self._folder / "code")
        self._entries = {manifest.id: self._shipped_entry(manifest) for manifest in SHIPPED}
        of_shipped = {self._record_path(manifest.id) for manifest in SHIPPED}
        for name in self._world.disk.list_folder(self._folder):
            path = self._folder / name
            if name.endswith(_SUFFIX) and not name.startswith(".") and path not in of_shipped:
                entry = self._load_installed(path)
                self._entries[entry.manifest.id] = entry
        self._remove_orphans()

    def install(self, folder: Path) -> Manifest:
        """Install the agent in `folder`, or another version of it; it is running when this returns.

        With an `agent.signed` the folder must be what that says, from a trusted publisher; without
        one, this node signs it. A stopped agent stays stopped when it is installed again.

        Raises:
            KnodeError: MANIFEST_INVALID, NOT_FOUND, RATE_LIMITED over 200 agents, or the disk's errors;
                nothing is changed then.
        """
        with self._changing:
            return self._install(folder)

    def _install(self, folder: Path) -> Manifest:
        disk = self._world.disk
        paths = list_code(folder)
        if MANIFEST_NAME not in paths:
            raise KnodeError(
                Code.MANIFEST_INVALID, f"{folder} holds no {MANIFEST_NAME}", "see docs/guides/agents.md"
            )
        text = disk.read(folder / MANIFEST_NAME, limit_bytes=MAX_MANIFEST_BYTES)
        manifest = parse_manifest(text.decode("utf-8", "replace"))
        self._check_installable(manifest, paths)
        files = copy_code(disk, folder, paths, None)
        if disk.exists(folder / SIGNED_NAME):
            signed = disk.read(folder / SIGNED_NAME, limit_bytes=MAX_SIGNED_BYTES)
        else:
            signed = sign_manifest(self._key, manifest, hash_code(files))
        publisher = self._verify(signed, files)
        if open_manifest(signed).manifest != manifest:
            _refuse(manifest.id, f"{SIGNED_NAME} signs another {MANIFEST_NAME}")
        target = self._keep_code(folder, files)
        before = self._entries.get(manifest.id)
        stopped = before is not None and before.state is State.STOPPED
        self._write(manifest.id, _Record(_RECORD_FORMAT, stopped, signed, files))
        self._entries[manifest.id] = AgentEntry(
            manifest=manifest,
            publisher=publisher,
            state=State.STOPPED if stopped else State.RUNNING,
            code=target,
            files=files,
        )
        return manifest

    def list(self) -> tuple[AgentEntry, ...]:
        """Return all agents, refused ones too, by id."""
        return tuple(self._entries[agent_id] for agent_id in sorted(self._entries))

    def show(self, agent_id: str) -> AgentEntry:
        """Return an agent in whatever state; NO_AGENT when there is none."""
        entry = self._entries.get(agent_id)
        if entry is None:
            raise KnodeError(
                Code.NO_AGENT, f"this node has no agent {agent_id[:80]!r}", "see 'knode agent list'"
            )
        return entry

    def find(self, agent_id: str) -> AgentEntry:
        """Return an agent that runs tasks.

        Raises:
            KnodeError: NO_AGENT when there is none or it is stopped, MANIFEST_INVALID when it is refused.
        """
        entry = self.show(agent_id)
        if entry.state is State.REFUSED:
            raise self._refused(entry)
        if entry.state is State.STOPPED:
            raise KnodeError(
                Code.NO_AGENT, f"{agent_id} is stopped on this node", f"run 'knode agent start {agent_id}'"
            )
        return entry

    def start(self, agent_id: str) -> None:
        """Run tasks for an agent, durably; no error when it does already."""
        with self._changing:
            self._set_stopped(agent_id, stopped=False)

    def stop(self, agent_id: str) -> None:
        """Take no more tasks for an agent, durably; attempts that run go on."""
        with self._changing:
            self._set_stopped(agent_id, stopped=True)

    def verify(self, entry: AgentEntry) -> None:
        """Check an agent's code once more, right before it is run.

        Raises:
            KnodeError: MANIFEST_INVALID when a file was changed since; the agent is refused from then on.
        """
        if entry.code is None:
            return
        try:
            verify_code(self._world.disk, entry.code, entry.files)
        except KnodeError as error:
            with self._changing:
                if self._entries.get(entry.manifest.id) is entry:
                    refused = replace(entry, state=State.REFUSED, problem=error.message)
                    self._entries[entry.manifest.id] = refused
            raise

    def _keep_code(self, source: Path, files: tuple[FileDigest, ...]) -> Path:
        """Copy an agent's code to where it stays; code that is there already is left as it is."""
        target = self._code_folder(files)
        if self._world.disk.exists(target):
            try:
                verify_code(self._world.disk, target, files)
                return target
            except KnodeError:
                self._world.disk.remove(target)
        try:
            if copy_code(self._world.disk, source, [file.path for file in files], target) != files:
                raise KnodeError(
                    Code.MANIFEST_INVALID, f"{source} changed while it was read", "install it again"
                )
        except BaseException:
            self._world.disk.remove(target)
            raise
        return target

    def _shipped_entry(self, manifest: Manifest) -> AgentEntry:
        path = self._record_path(manifest.id)
        entry = AgentEntry(manifest=manifest, publisher=self._key.public, state=State.RUNNING)
        try:
            if self._world.disk.exists(path) and self._read(path).stopped:
                return replace(entry, state=State.STOPPED)
        except KnodeError as error:
            return replace(entry, state=State.REFUSED, problem=f"{path} is damaged: {error.message}")
        return entry

    def _load_installed(self, path: Path) -> AgentEntry:
        try:
            record = self._read(path)
            claimed = open_manifest(record.signed)
            if path != self._record_path(claimed.manifest.id):
                _refuse(claimed.manifest.id, f"{path.name} is not the name of its record")
        except KnodeError as error:
            return self._unreadable_entry(path, error.message)
        entry = AgentEntry(
            manifest=claimed.manifest,
            publisher=PublicKey(claimed.publisher),
            state=State.STOPPED if record.stopped else State.RUNNING,
            code=self._code_folder(record.files),
            files=record.files,
        )
        try:
            self._check_installable(entry.manifest, [file.path for file in entry.files])
            self._verify(record.signed, entry.files)
            verify_code(self._world.disk, self._code_folder(entry.files), entry.files)
        except KnodeError as error:
            return replace(entry, state=State.REFUSED, problem=error.message)
        return entry

    def _unreadable_entry(self, path: Path, problem: str) -> AgentEntry:
        agent_id = path.name.removesuffix(_SUFFIX).replace("-", ":", 1)
        return AgentEntry(
            manifest=Manifest(id=agent_id, version="0.0.0", runtime=Runtime.COMMAND),
            publisher=self._key.public,
            state=State.REFUSED,
            problem=f"its record {path.name} is damaged: {problem}",
        )

    def _verify(self, signed: bytes, files: tuple[FileDigest, ...]) -> PublicKey:
        claimed: SignedManifest = open_manifest(signed)
        agent_id = claimed.manifest.id
        if claimed.code_hash != hash_code(files):
            _refuse(agent_id, "its code is not what was signed")
        publisher = PublicKey(claimed.publisher)
        if publisher != self._key.public and not self._is_publisher_trusted(publisher):
            _refuse(agent_id, f"its publisher {publisher.node_id} is not trusted here")
        return publisher

    def _check_installable(self, manifest: Manifest, paths: Sequence[str]) -> None:
        if manifest.runtime is Runtime.BUILTIN:
            _refuse(manifest.id, "`runtime` of an installed agent is python or command")
        if any(manifest.id == shipped.id for shipped in SHIPPED):
            _refuse(manifest.id, "`id` is that of an agent that comes with knode")
        if not manifest.entry:
            _refuse(manifest.id, "`entry` is missing")
        if manifest.runtime is Runtime.PYTHON and manifest.entry[0] not in paths:
            _refuse(manifest.id, f"`entry` names {manifest.entry[0]!r}, which is not in the folder")
        if manifest.id not in self._entries and len(self._entries) >= MAX_AGENTS:
            raise KnodeError(Code.RATE_LIMITED, f"this node has {MAX_AGENTS} agents, which is the most")

    def _set_stopped(self, agent_id: str, *, stopped: bool) -> None:
        entry = self.show(agent_id)
        if any(agent_id == shipped.id for shipped in SHIPPED):
            record = _Record(_RECORD_FORMAT, stopped, b"", ())
        elif entry.state is State.REFUSED:
            raise self._refused(entry)
        else:
            record = msgspec.structs.replace(self._read(self._record_path(agent_id)), stopped=stopped)
        self._write(agent_id, record)
        state = State.STOPPED if stopped else State.RUNNING
        self._entries[agent_id] = replace(entry, state=state, problem="")

    @staticmethod
    def _refused(entry: AgentEntry) -> KnodeError:
        return KnodeError(
            Code.MANIFEST_INVALID,
            f"{entry.manifest.id} is refused: {entry.problem}",
            "install it again with 'knode agent install FOLDER'",
        )

    def _read(self, path: Path) -> _Record:
        return _record_decoder.decode(self._world.disk.read(path, limit_bytes=_MAX_RECORD_BYTES))

    def _write(self, agent_id: str, record: _Record) -> None:
        self._world.disk.make_folder(self._folder)
        self._world.disk.write(self._record_path(agent_id), encode(record))

    def _record_path(self, agent_id: str) -> Path:
        return self._folder / (agent_id.replace(":", "-") + _SUFFIX)

    def _code_folder(self, files: tuple[FileDigest, ...]) -> Path:
        return self._folder / "code" / hash_code(files).hex()

    def _remove_orphans(self) -> None:
        """Remove code that no record names, unless a record could not be read: it may name some."""
        shipped = {manifest.id for manifest in SHIPPED}
        installed = [entry for agent_id, entry in self._entries.items() if agent_id not in shipped]
        if any(entry.code is None for entry in installed):
            return
        kept = {entry.code.name for entry in installed if entry.code is not None}
        for name in self._world.disk.list_folder(self._folder / "code"):
            if name not in kept:
                self._world.disk.remove(self._folder / "code" / name)


def _refuse(agent_id: str, why: str) -> NoReturn:
    raise KnodeError(
        Code.MANIFEST_INVALID, f"{agent_id}: {why}", "see docs/guides/agents.md for what an agent needs"
    )
