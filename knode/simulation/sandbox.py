"""A sandbox for simulated machines: it knows a few commands, and takes virtual time for them."""

from __future__ import annotations

import json

import trio

from knode.agents.limits import Limits
from knode.agents.sandbox.sandbox import Command, Ended, OnProgress, Outcome
from knode.world import World

EFFECTS_FILE = "effects.jsonl"
NO_SUCH_COMMAND = 127
COMMAND_S = (0.01, 2.0)
"""What a command takes: long enough for its machine to die meanwhile."""


class SimulatedSandbox:
    """Runs the commands of `kExecutor:command` that clients of a simulation give.

    - `note TEXT`: leaves one operation, which says TEXT and whose task it is, and prints `noted`.
    - `fail N`: exits with N.

    Args:
        world: of the machine; files go to its disk, and chance says how long a command takes.
    """

    name = "simulated"

    def __init__(self, world: World) -> None:
        self._world = world

    async def run(self, command: Command, limits: Limits, on_progress: OnProgress) -> Outcome:
        """Run a command; see `Sandbox.run`."""
        on_progress(0.0, "begun")
        await trio.sleep(self._world.randomness.uniform(*COMMAND_S))
        match command.argv:
            case ["note", text]:
                operation = {"text": text, "task": command.environment["KNODE_TASK_TOKEN"]}
                effects = json.dumps({"operation": operation}).encode() + b"\n"
                with self._world.disk.create(command.folder / EFFECTS_FILE) as file:
                    file.write(effects)
                return Outcome(Ended.EXITED, 0, b"noted", b"")
            case ["fail", code]:
                return Outcome(Ended.EXITED, int(code), b"", b"failed, as it was told")
            case _:
                return Outcome(Ended.EXITED, NO_SUCH_COMMAND, b"", b"not found")
