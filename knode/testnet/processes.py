"""The command line and the daemons of a testnet, as processes of this machine (Linux)."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from knode.errors import Code, KnodeError

COMMAND_TIMEOUT_S = 90.0
END_TIMEOUT_S = 10.0


class CommandLine:
    """Runs `knode …` as users do, from several threads; what runs can be interrupted as one."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._interrupted = False

    def run(self, home: Path, *words: str, place: Sequence[str] = ()) -> Any:
        """Run one command on a home with --json and return its document.

        Args:
            home: the node's.
            words: the command, without `knode`.
            place: the words before a command that run it elsewhere, as in a namespace.

        Raises:
            KnodeError: the command's own error; CANCELLED when it was interrupted; TIMEOUT after 90
                seconds, INTERNAL when it gives no document.
        """
        line = [*place, sys.executable, "-m", "knode", *words, "--json", "--no-input", "--home", str(home)]
        with self._lock:
            if self._interrupted:
                raise KnodeError(Code.CANCELLED, "interrupted")
            process = subprocess.Popen(
                line,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                # Ctrl-C reaches it by `interrupt` alone, once, and not by the terminal as well.
                start_new_session=True,
            )
            self._running.add(process)
        try:
            output, complaints = process.communicate(timeout=COMMAND_TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            raise KnodeError(
                Code.TIMEOUT, f"'knode {words[0]}' took over {COMMAND_TIMEOUT_S:.0f} s for {home}"
            ) from error
        finally:
            with self._lock:
                self._running.discard(process)
            if process.poll() is None:
                process.kill()
                process.communicate()
        return _document(words[0], process.returncode, output, complaints)

    def interrupt(self) -> None:
        """Interrupt what runs, as Ctrl-C does, and let nothing else begin."""
        with self._lock:
            self._interrupted = True
            for process in self._running:
                process.send_signal(signal.SIGINT)


def daemons_of(homes: Sequence[Path]) -> dict[int, Path]:
    """Return the processes that were started as the daemon of one of these homes, by process id.

    They are told by their arguments, so that one which does not answer, or not yet, is found too.
    """
    found = {}
    wanted = {os.fsencode(home): home for home in homes}
    for pid, words in _command_lines():
        if b"knode" in words and b"up" in words and b"--home" in words:
            home = wanted.get(words[words.index(b"--home") + 1])
            if home is not None:
                found[pid] = home
    return found


def processes_with(*words: bytes) -> list[int]:
    """Return the processes that have all these words among their arguments."""
    return [pid for pid, line in _command_lines() if set(words) <= set(line)]


def end(pids: Sequence[int], sent: signal.Signals) -> list[int]:
    """Send a signal to processes, wait until they are gone, and return those that stayed 10 seconds."""
    with contextlib.ExitStack() as opened:
        handles = {}
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                handle = os.pidfd_open(pid)
                opened.callback(os.close, handle)
                handles[handle] = pid
                signal.pidfd_send_signal(handle, sent)
        deadline = time.monotonic() + END_TIMEOUT_S
        while handles and (left_s := deadline - time.monotonic()) > 0:
            for gone in select.select(list(handles), [], [], left_s)[0]:
                del handles[gone]
        return list(handles.values())


def free_ports(count: int) -> list[int]:
    """Return different ports that are free on loopback, for TCP and UDP, at this moment."""
    ports: list[int] = []
    with contextlib.ExitStack() as held:
        while len(ports) < count:
            tcp = held.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
            tcp.bind(("127.0.0.1", 0))
            port: int = tcp.getsockname()[1]
            udp = held.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            with contextlib.suppress(OSError):
                udp.bind(("127.0.0.1", port))
                ports.append(port)
    return ports


def _command_lines() -> Iterator[tuple[int, list[bytes]]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                yield int(entry.name), (entry / "cmdline").read_bytes().split(b"\0")


def _document(command: str, code: int, output: bytes, complaints: bytes) -> Any:
    try:
        document = json.loads(output)
    except ValueError as error:
        if code == -signal.SIGINT or code == 130:
            raise KnodeError(Code.CANCELLED, "interrupted") from error
        said = (complaints or output).decode(errors="replace").strip()[-2000:]
        raise KnodeError(Code.INTERNAL, f"'knode {command}' ended with {code}: {said}") from error
    if isinstance(document, dict) and "error" in document and code != 0:
        failed = document["error"]
        raise KnodeError(Code(failed["code"]), failed["message"], failed["next"])
    return document
