"""`knode doctor`: what keeps this machine's node from working well, and what mends it.

Real only: it asks the operating system. What needs the daemon is asked of it (`knode.node.health`), and
said to be skipped when none runs. No check changes anything; each that fails says what to do.
"""

from __future__ import annotations

import errno
import importlib.metadata
import os
import re
import shutil
import socket
import stat
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import msgspec
import trio

from knode import __version__
from knode.agents.sandbox.choice import SANDBOXES, choose_sandbox
from knode.control import service
from knode.control.client import Client, command_for
from knode.errors import Code, KnodeError
from knode.home.configuration import Settings, load_configuration
from knode.home.folder import HomeFormat, open_home
from knode.home.layout import Home
from knode.node.health import Finding, Grade, no_sandbox
from knode.world import WallTime, World
from knode.world.real import named_disk_errors, real_world

PYTHONS = ((3, 11), (3, 13))
"""The first and the last that knode is made for."""
SPACE_WARN_BYTES = 1024**3
SPACE_FAIL_BYTES = 64 * 1024**2
DAEMON_S = 30.0
"""How long the daemon may take for its part."""
RELEASED_MS = 1_767_225_600_000
"""2026-01-01: no right clock is before this version of knode."""

_REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9._-]+)(?P<versions>[^;]*)(?:;(?P<marker>.*))?")
_NEEDS_HOME = ("permissions", "disk", "clock", "daemon", "ports", "sandbox", "service")
_NEEDS_DAEMON = ("cell", "mdns", "clock of others", "reachability")


def examine(home: Home, environment: Mapping[str, str]) -> list[Finding]:
    """Return every finding, in the order in which one would mend them.

    Takes a moment, and up to 15 seconds when members are asked to dial this node.
    """
    world = real_world()
    findings = [_python(), *_dependencies()]
    format_, whole = _home(world, home)
    findings.append(whole)
    settings, configured = _configuration(world, home, environment)
    findings.append(configured)
    if format_ is None:
        return findings + [Finding(check, Grade.SKIP, "needs a home") for check in _NEEDS_HOME]
    findings += [_permissions(home), _disk(world, home), _clock(world.clock.wall(), format_)]
    said = _daemon(home)
    if isinstance(said, KnodeError):
        why = said.message if said.code is Code.NOT_RUNNING else str(said)
        grade = Grade.WARN if said.code is Code.NOT_RUNNING else Grade.FAIL
        findings.append(Finding("daemon", grade, why, said.next_step))
        findings += [*_ports(settings), _sandbox(world, home, settings)]
        findings += [Finding(check, Grade.SKIP, "needs the daemon") for check in _NEEDS_DAEMON]
    else:
        findings += said
    return [*findings, _service()]


def _python() -> Finding:
    version = sys.version_info[:2]
    name = f"{'.'.join(map(str, sys.version_info[:3]))} at {sys.executable}"
    if PYTHONS[0] <= version <= PYTHONS[1]:
        return Finding("python", Grade.PASS, name)
    wanted = " to ".join(f"{major}.{minor}" for major, minor in PYTHONS)
    return Finding("python", Grade.FAIL, name, f"install Python {wanted}, then: make setup")


def _dependencies() -> Iterator[Finding]:
    """Compare what is installed with what this version of knode asks for."""
    try:
        requirements = importlib.metadata.requires("knode") or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding("dependencies", Grade.WARN, "knode itself is not installed as a package", "make setup")
        return
    wrong, right = [], 0
    for requirement in requirements:
        parsed = _REQUIREMENT.match(requirement)
        assert parsed is not None
        marker = parsed["marker"] or ""
        if "extra" in marker or ("sys_platform" in marker and sys.platform not in marker):
            continue
        try:
            installed = importlib.metadata.version(parsed["name"])
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{parsed['name']} is missing")
            continue
        if not _is_within(installed, parsed["versions"]):
            wrong.append(f"{parsed['name']} is {installed}, not {parsed['versions'].strip()}")
        right += 1
    if wrong:
        yield Finding("dependencies", Grade.FAIL, "; ".join(wrong), "make setup")
    else:
        yield Finding("dependencies", Grade.PASS, f"all {right} are installed")


def _is_within(installed: str, versions: str) -> bool:
    """Tell whether a version fits `>=1.3,<2`; those are the only comparisons that knode asks for."""

    def numbers(text: str) -> tuple[int, ...]:
        return tuple(int(number) for number in re.findall(r"\d+", text)[:3])

    for part in filter(None, (part.strip() for part in versions.split(","))):
        if part.startswith(">=") and numbers(installed) < numbers(part):
            return False
        if part.startswith("<") and numbers(installed) >= numbers(part):
            return False
    return True


def _home(world: World, home: Home) -> tuple[HomeFormat | None, Finding]:
    try:
        found = open_home(world, home)
    except KnodeError as error:
        return None, Finding("home", Grade.FAIL, error.message, error.next_step)
    return found, Finding("home", Grade.PASS, f"{home.path} is whole (format {found.format})")


def _configuration(world: World, home: Home, environment: Mapping[str, str]) -> tuple[Settings, Finding]:
    try:
        found = load_configuration(world, home, environment, {})
    except KnodeError as error:
        return Settings(), Finding("configuration", Grade.FAIL, error.message, error.next_step)
    changed = sum(source != "default" for source in found.sources.values())
    return found.values, Finding("configuration", Grade.PASS, f"{changed} values differ from the defaults")


def _permissions(home: Home) -> Finding:
    """Keys are their user's alone: nobody else may even enter the home."""
    problems, fixes = [], []
    try:
        with named_disk_errors(home.identity):
            private = [home.path, home.identity, *sorted(home.identity.iterdir())]
    except KnodeError as error:
        return Finding("permissions", Grade.FAIL, error.message, error.next_step)
    for path in private:
        status = path.stat()
        mode = stat.S_IMODE(status.st_mode)
        if status.st_uid != os.geteuid():
            problems.append(f"{path} belongs to another user ({status.st_uid})")
            fixes.append(f"chown {os.geteuid()} {path}")
        elif mode & 0o077:
            wanted = 0o700 if path.is_dir() else 0o600
            problems.append(f"others may use {path} (mode {mode:o})")
            fixes.append(f"chmod {wanted:o} {path}")
    if problems:
        return Finding("permissions", Grade.FAIL, "; ".join(problems), "; ".join(fixes))
    return Finding("permissions", Grade.PASS, "the home and its keys are this user's alone")


def _disk(world: World, home: Home) -> Finding:
    probe = home.run / "doctor"
    try:
        world.disk.write(probe, bytes(4096))  # and synced
        world.disk.remove(probe)
    except KnodeError as error:
        return Finding("disk", Grade.FAIL, error.message, error.next_step)
    free = shutil.disk_usage(home.path).free
    found = f"written and synced; {free / 1024**2:,.0f} MiB are free"
    grade = Grade.FAIL if free < SPACE_FAIL_BYTES else Grade.WARN if free < SPACE_WARN_BYTES else Grade.PASS
    return Finding(
        "disk", grade, found, "" if grade is Grade.PASS else f"make room on the disk of {home.path}"
    )


def _clock(now: WallTime, format_: HomeFormat) -> Finding:
    shown = datetime.fromtimestamp(now / 1000, UTC).isoformat(timespec="seconds")
    fix = "set it by the network: timedatectl set-ntp true"
    if now < max(RELEASED_MS, format_.created):
        return Finding("clock", Grade.FAIL, f"it says {shown}, before this home was made", fix)
    return Finding("clock", Grade.PASS, f"it says {shown}")


def _daemon(home: Home) -> list[Finding] | KnodeError:
    """Return what the daemon finds, and what it says of itself; or why it does not."""
    try:
        with Client.connect(home) as client:
            status = client.call("status", silence_s=DAEMON_S)
            found = client.call("doctor", silence_s=DAEMON_S)
            pid = client.daemon_pid
    except KnodeError as error:
        return error
    running = f"process {pid} has run for {status['uptime_s']:.0f} s"
    daemon = Finding("daemon", Grade.PASS, running)
    if status["version"] != __version__:
        mend = f"{command_for(home, 'down')}, then {command_for(home, 'up', '--detach')}"
        daemon = Finding("daemon", Grade.WARN, f"{running}, and is knode {status['version']}", mend)
    addresses = ", ".join(status["addresses"]) or "nowhere"
    return [
        daemon,
        Finding("ports", Grade.PASS, f"the daemon listens; others are told {addresses}"),
        *msgspec.convert(found, list[Finding]),
    ]


def _ports(settings: Settings) -> Iterator[Finding]:
    """Bind what the daemon would."""
    host, discovery = settings.node.host, settings.discovery
    wanted = [("TCP", "node.port", settings.node.port), ("UDP", "node.port", settings.node.port)]
    if discovery.libp2p:
        wanted.append(("TCP", "discovery.libp2p_port", discovery.libp2p_port))
    for name, key, port in wanted:
        if port == 0:
            yield Finding("ports", Grade.PASS, f"the daemon takes any free {name} port ({key} is 0)")
            continue
        problem = _why_not_bound(host, port, socket.SOCK_STREAM if name == "TCP" else socket.SOCK_DGRAM)
        if problem is None:
            yield Finding("ports", Grade.PASS, f"{name} port {port} is free on {host}")
        else:
            fix = f"end what holds it ('ss -lnp sport = :{port}' shows it), or: knode config set {key} PORT"
            yield Finding("ports", Grade.FAIL, f"{name} port {port} on {host}: {problem}", fix)


def _why_not_bound(host: str, port: int, kind: socket.SocketKind) -> str | None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, kind) as probe:
            if kind is socket.SOCK_STREAM:
                # As the daemon does: what remains of old connections is in nobody's way.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        return "another program holds it" if error.errno == errno.EADDRINUSE else str(error.strerror or error)
    return None


def _sandbox(world: World, home: Home, settings: Settings) -> Finding:
    """Try them as the daemon does when it starts."""
    prefer = settings.sandbox.prefer
    if prefer == "none":
        fix = "knode config set sandbox.prefer auto"
        return Finding(
            "sandbox", Grade.WARN, "sandbox.prefer is none, so agents that take code are refused", fix
        )
    names = tuple(SANDBOXES) if prefer == "auto" else (prefer,)
    try:
        choice = trio.run(partial(choose_sandbox, world, home.run / "sandbox-doctor", names))
    except KnodeError as error:
        return Finding("sandbox", Grade.FAIL, error.message, error.next_step)
    if choice.sandbox is None:
        return no_sandbox("; ".join(choice.problems))
    return Finding("sandbox", Grade.PASS, f"{choice.sandbox.name} holds")


def _service() -> Finding:
    try:
        state = service.state()
    except KnodeError as error:
        return Finding("service", Grade.SKIP, error.message)
    if not (state.installed and state.enabled):
        return Finding("service", Grade.WARN, "the daemon is not started at boot", "knode service install")
    if state.lingering is False:
        fix = "loginctl enable-linger"
        return Finding("service", Grade.WARN, "after a reboot the daemon waits for your login", fix)
    return Finding("service", Grade.PASS, f"{Path(state.unit).name} starts the daemon at boot")
