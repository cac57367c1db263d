"""The daemon's process, as the command line starts and stops it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from knode.control.client import Client, command_for
from knode.errors import Code, KnodeError
from knode.home.folder import open_home
from knode.home.layout import Home
from knode.world.real import named_disk_errors, real_world

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 30.0

_POLL_S = 0.05
_SHOWN_LINES = 12
_SAID_BYTES = 64 * 1024


def answering(home: Home) -> Client | None:
    """Return a connection to the home's daemon, or None when none runs."""
    try:
        return Client.connect(home)
    except KnodeError as error:
        if error.code is Code.NOT_RUNNING:
            return None
        raise


def start_detached(home: Home, flags: Mapping[str, str]) -> int:
    """Start the home's daemon in a session of its own and return its process id once it answers.

    When another program is starting one at the same moment, one of the two daemons wins, and both callers
    get its process id. What a daemon says beside its log, as it starts or when it crashes, is kept in
    `log/start-up.txt` of the home.

    Args:
        home: a whole home.
        flags: configuration values as text by their full key.

    Raises:
        KnodeError: HOME_MISSING, HOME_DAMAGED or HOME_TOO_NEW before anything is started; the daemon's
            own error when it ends instead of answering, INTERNAL with its last lines when it gave none;
            TIMEOUT when it does not answer within 30 seconds (it is stopped then).

    An interruption stops what was started.
    """
    open_home(real_world(), home)
    said = home.log / "start-up.txt"
    options = [word for key, text in flags.items() for word in (f"--{key.removeprefix('node.')}", text)]
    words = ["up", "--background", "--json", *options, "--home", str(home.path)]
    os.umask(0o077)  # what the daemon makes, and what it says, is its user's alone
    with named_disk_errors(said):
        # Appended to, since two may be starting it at once; begun anew when it has grown.
        is_large = said.exists() and said.stat().st_size > _SAID_BYTES
        output = said.open("wb" if is_large else "ab")
    with output:
        begin = output.tell()
        process = subprocess.Popen(
            [sys.executable, "-m", "knode", *words],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd="/",
            start_new_session=True,
        )
    pid = None
    try:
        pid = _await_answer(home, process, said, begin)
    finally:
        if pid != process.pid:
            process.terminate()
            _reap(process)
    process.returncode = 0  # it outlives this program on purpose, and nobody waits for it
    return pid


def await_restart(home: Home, uptime_s: float) -> None:
    """Return once a daemon that restarts answers again.

    Args:
        home: the daemon's.
        uptime_s: for how long it ran, before it was told to.

    Raises:
        KnodeError: TIMEOUT when it does not within 30 seconds.
    """
    begun = time.monotonic()
    while (passed_s := time.monotonic() - begun) < START_TIMEOUT_S:
        with contextlib.suppress(KnodeError), Client.connect(home) as client:
            if client.call("status", silence_s=START_TIMEOUT_S)["uptime_s"] < uptime_s + passed_s:
                return
        time.sleep(_POLL_S)
    raise KnodeError(
        Code.TIMEOUT,
        f"the daemon did not answer within {START_TIMEOUT_S:.0f} s of its restart",
        command_for(home, "up", "--detach"),
    )


def stop(home: Home) -> int:
    """Ask the home's daemon to stop, wait until its process is gone, and return its process id.

    Raises:
        KnodeError: NOT_RUNNING when there is none, TIMEOUT when it still runs after 30 seconds.
    """
    with Client.connect(home) as client:
        pid = client.daemon_pid
        process = _handle_of(pid)
        try:
            client.call("stop", silence_s=STOP_TIMEOUT_S)
        except KnodeError as error:
            if error.code is not Code.UNAVAILABLE:  # it may end before its answer is out
                raise
    if process is not None and not _ended(process, STOP_TIMEOUT_S):
        raise KnodeError(
            Code.TIMEOUT,
            f"the daemon (process {pid}) still runs after {STOP_TIMEOUT_S:.0f} s",
            f"kill -9 {pid}",
        )
    return pid


def _await_answer(home: Home, process: subprocess.Popen[bytes], said: Path, begin: int) -> int:
    """Return the process id of the daemon that answers; another's, when one was being started already."""
    failure = KnodeError(
        Code.TIMEOUT,
        f"the daemon did not answer within {START_TIMEOUT_S:.0f} s of its start",
        f"look at {home.log_file}, or run it in the foreground: {command_for(home, 'up')}",
    )
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            failure = _why_it_ended(process.returncode, said, begin)
            if failure.code is not Code.LOCKED:
                raise failure
        client = answering(home)
        if client is not None:
            with client:
                client.call("status", silence_s=START_TIMEOUT_S)
                return client.daemon_pid
        time.sleep(_POLL_S)
    raise failure


def _why_it_ended(returncode: int, said: Path, begin: int) -> KnodeError:
    text = said.read_bytes()[begin:].decode(errors="replace")
    lines = [line for line in text.splitlines() if line.strip()]
    for line in reversed(lines):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            error = json.loads(line)["error"]
            return KnodeError(Code(error["code"]), error["message"], error["next"])
    with named_disk_errors(said), said.open("ab", buffering=0) as output:
        output.write(b"\n")  # on a full disk it could not say anything
    last = "\n".join(lines[-_SHOWN_LINES:]) or "it said nothing"
    return KnodeError(
        Code.INTERNAL, f"the daemon ended as it started (exit code {returncode}):\n{last}", f"look at {said}"
    )


def _reap(process: subprocess.Popen[Any]) -> None:
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _handle_of(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None


def _ended(process: int, timeout_s: float) -> bool:
    try:
        return bool(select.select([process], [], [], timeout_s)[0])
    finally:
        os.close(process)
