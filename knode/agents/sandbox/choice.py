"""Which sandbox holds on this machine: each is tried by a program that tries to break out of it."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from knode.agents.limits import Limits
from knode.agents.sandbox.bubblewrap import Bubblewrap
from knode.agents.sandbox.sandbox import Command, Ended, Sandbox
from knode.agents.sandbox.sandlock import Sandlock
from knode.agents.sandbox.surroundings import python_program
from knode.errors import Code, KnodeError
from knode.world import World

SANDBOXES: dict[str, Callable[[], Sandbox]] = {"bubblewrap": Bubblewrap, "sandlock": Sandlock}
"""All that there are, the first choice first. Constructing one that cannot be here raises NO_SANDBOX."""

_PROBE_LIMITS = Limits(wall_seconds=10, cpu_seconds=5)
_PROBE = """
import json, os, socket, sys
home, port, parent = json.load(sys.stdin)
def tries(what):
    try:
        what()
    except OSError:
        return False
    return True
print(json.dumps({
    "work": tries(lambda: open("made", "w")) and open("made").read() == "",
    "read a file of the node's home": tries(lambda: open(home + "/secret").read()),
    "write into the node's home": tries(lambda: open(home + "/secret", "w")),
    "connect to a port of the machine": tries(lambda: socket.create_connection(("127.0.0.1", port), 2)),
    "read the node's environment": tries(lambda: open(f"/proc/{parent}/environ").read()),
    "signal the node": tries(lambda: os.kill(parent, 0)),
    "change the mode of a file of the node's home": tries(lambda: os.chmod(home + "/secret", 0o777)),
    "become another user": tries(lambda: os.setuid(12345)),
}))
"""


@dataclass(frozen=True, slots=True)
class Choice:
    """The sandbox in force, and what was wrong with those before it."""

    sandbox: Sandbox | None
    """None when none holds: untrusted code is refused then."""
    problems: tuple[str, ...] = ()
    """One sentence for each sandbox that was passed over."""


async def choose_sandbox(world: World, scratch: Path, prefer: Sequence[str] = tuple(SANDBOXES)) -> Choice:
    """Return the first sandbox of `prefer` that can be started here and holds.

    Each is tried for at most 10 seconds, usually a tenth of one. The answer holds until the next boot.

    Args:
        scratch: a folder inside the node's home, where a file is made that no agent may read. It is
            made and removed.
        prefer: names of sandboxes, first choice first.
    """
    problems: list[str] = []
    for name in prefer:
        make = SANDBOXES.get(name)
        if make is None:
            problems.append(f"{name}: there is no such sandbox, only {', '.join(SANDBOXES)}")
            continue
        try:
            sandbox = make()
            leaks = await probe(world, sandbox, scratch)
        except KnodeError as error:
            problems.append(f"{name}: {error.message}")
            continue
        if not leaks:
            return Choice(sandbox, tuple(problems))
        problems.append(f"{name}: a program in it could {', '.join(leaks)}")
    return Choice(None, tuple(problems))


async def probe(world: World, sandbox: Sandbox, scratch: Path) -> list[str]:
    """Return what a program in `sandbox` could do and must not; empty when the sandbox holds.

    Raises:
        KnodeError: NO_SANDBOX when the program did not come to its end.
    """
    attempt = scratch / "attempt"
    try:
        world.disk.make_folder(attempt)
        world.disk.write(scratch / "secret", world.randomness.token(16).hex().encode())
        with socket.create_server(("127.0.0.1", 0)) as listener:
            question = [os.fspath(scratch), listener.getsockname()[1], os.getpid()]
            outcome = await sandbox.run(
                Command(
                    argv=[os.fspath(python_program()), "-I", "-c", _PROBE],
                    folder=attempt,
                    stdin=msgspec.json.encode(question),
                ),
                _PROBE_LIMITS,
                lambda fraction, text: None,
            )
    finally:
        world.disk.remove(scratch)
    if outcome.ended is not Ended.EXITED or outcome.exit_code != 0:
        words = outcome.stderr.decode("utf-8", "replace").strip()[-300:]
        raise KnodeError(Code.NO_SANDBOX, f"a harmless program did not run in it: {words or outcome.ended}")
    done = msgspec.json.decode(outcome.stdout, type=dict[str, bool])
    if not done.pop("work"):
        raise KnodeError(Code.NO_SANDBOX, "a harmless program could not write into its own folder")
    return [what for what, succeeded in done.items() if succeeded]
