"""Runs attempts: the agent is found and checked, its input handed over, its end turned into a result."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from knode.agents import text
from knode.agents.effects import NO_EFFECTS, Effects, read_effects
from knode.agents.inputs import parse_line, parse_source
from knode.agents.limits import MAX_RESULT_BYTES, Limits
from knode.agents.manifest import Capability, Runtime
from knode.agents.registry import AgentEntry, Registry
from knode.agents.sandbox import Command, Ended, Outcome, Sandbox
from knode.agents.sandbox.surroundings import python_program
from knode.errors import Code, KnodeError
from knode.world import Monotonic, World

MAX_INPUT_FILE_BYTES = 64 * 1024 * 1024
MAX_STDERR_CHARACTERS = 2000
INLINE_BYTES = 4 * 1024
"""A built-in agent does up to this much in place: a thread would cost more than the work."""
TRY_AGAIN = 75
"""The exit code of an agent that may do better another time: EX_TEMPFAIL of sysexits(3)."""
_PROGRAM_NAME = ".program.py"


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try of a task on this node."""

    folder: str
    """Name of its folder."""
    input: bytes
    token: str
    """The same for every attempt of a task; an agent passes it to the world outside."""
    number: int
    """Which attempt of its task it is, from 1."""
    deadline: Monotonic
    """The task's."""
    files: tuple[Path, ...] = ()
    """Files that lie in the attempt's `input/` already."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far an attempt is."""

    fraction: float | None
    """From 0 to 1; None when the agent does not know."""
    text: str
    """At most 200 printable characters."""


@dataclass(frozen=True, slots=True)
class AgentResult:
    """What an agent gave back."""

    output: bytes
    """Text or JSON, at most 192 KiB."""
    effects: Effects = NO_EFFECTS


class TryAgain(KnodeError):
    """The agent failed (AGENT_FAILED) and says that another attempt may do better: it exited with 75."""


class Runner:
    """Runs attempts of this node's agents.

    Args:
        sandbox: None when no sandbox holds on this machine: then built-in agents alone are run.
        attempts: where each attempt has its folder. The caller makes it, with the task's
            files in `input/`, and removes it.
    """

    def __init__(self, world: World, registry: Registry, sandbox: Sandbox | None, attempts: Path) -> None:
        self._world = world
        self._registry = registry
        self._sandbox = sandbox
        self._attempts = attempts

    @property
    def sandbox(self) -> Sandbox | None:
        """The sandbox in force."""
        return self._sandbox

    def check(self, agent_id: str) -> None:
        """Check that an attempt of `agent_id` would be begun now.

        Raises:
            KnodeError: NO_AGENT, MANIFEST_INVALID, NO_SANDBOX.
        """
        if self._registry.find(agent_id).runtime is not Runtime.BUILTIN:
            self._sandbox_for(agent_id)

    def can_run(self, agent_id: str) -> bool:
        """Tell whether an attempt of `agent_id` would be begun now."""
        try:
            self.check(agent_id)
        except KnodeError:
            return False
        return True

    def is_builtin(self, agent_id: str) -> bool:
        """Tell whether an agent runs in this process, so that an attempt without files needs no folder."""
        try:
            return self._registry.find(agent_id).runtime is Runtime.BUILTIN
        except KnodeError:
            return False

    async def run(self, agent_id: str, attempt: Attempt, progress: Callable[[Progress], None]) -> AgentResult:
        """Run one attempt to its end and return its result.

        Raises:
            KnodeError: NO_AGENT, MANIFEST_INVALID or NO_SANDBOX when it was not begun; AGENT_FAILED with
                the agent's own words, or naming the limit that it passed; TOO_LARGE for its effects;
                TIMEOUT when the task's deadline came before the agent's end.

        When it returns, raises or is cancelled, nothing of the attempt runs any more.
        """
        entry = self._registry.find(agent_id)
        if attempt.files and Capability.INPUT_FILES not in entry.manifest.capabilities:
            raise KnodeError(
                Code.AGENT_FAILED,
                f"{agent_id} takes no files: its manifest does not ask for {Capability.INPUT_FILES}",
            )
        if attempt.deadline <= self._world.clock.monotonic():
            raise self._timed_out(agent_id)
        if entry.runtime is Runtime.BUILTIN:
            return await self._run_builtin(entry, attempt)
        sandbox = self._sandbox_for(agent_id)
        await self._world.blocking.run(lambda: self._registry.verify(entry))
        return await self._run_sandboxed(sandbox, entry, attempt, progress)

    def _sandbox_for(self, agent_id: str) -> Sandbox:
        if self._sandbox is None:
            raise KnodeError(
                Code.NO_SANDBOX,
                f"{agent_id} needs a sandbox, and none holds on this machine",
                "install bubblewrap and restart the node; 'knode status' says why none holds",
            )
        return self._sandbox

    async def _run_builtin(self, entry: AgentEntry, attempt: Attempt) -> AgentResult:
        limit = min(entry.manifest.limits.output_bytes, MAX_RESULT_BYTES)

        def work() -> bytes:
            request = text.parse_request(attempt.input)
            return text.answer(request, self._read_files(attempt), limit)

        try:
            if not attempt.files and len(attempt.input) <= INLINE_BYTES:
                return AgentResult(work())
            return AgentResult(await self._world.blocking.run(work))
        except ValueError as error:
            raise KnodeError(Code.AGENT_FAILED, f"{entry.manifest.id}: {error}") from error

    def _read_files(self, attempt: Attempt) -> dict[str, bytes]:
        files, room = {}, MAX_INPUT_FILE_BYTES
        for path in sorted(attempt.files):
            data = self._world.disk.read(path, limit_bytes=room)
            room -= len(data)
            files[path.name] = data
        return files

    async def _run_sandboxed(
        self,
        sandbox: Sandbox,
        entry: AgentEntry,
        attempt: Attempt,
        progress: Callable[[Progress], None],
    ) -> AgentResult:
        agent_id, limits = entry.manifest.id, entry.manifest.limits
        remaining_s = attempt.deadline - self._world.clock.monotonic()
        hurried = remaining_s < limits.wall_seconds
        if hurried:
            limits = msgspec.structs.replace(limits, wall_seconds=max(1, math.ceil(remaining_s)))
        folder = self._attempts / attempt.folder
        argv, stdin = self._program_of(entry, attempt, folder)
        command = Command(
            argv=argv,
            folder=folder,
            stdin=stdin,
            read_only=[entry.code] if entry.code is not None else [],
            environment={"KNODE_TASK_TOKEN": attempt.token, "KNODE_TASK_ATTEMPT": str(attempt.number)},
        )
        outcome = await sandbox.run(
            command, limits, lambda fraction, words: progress(Progress(fraction, words))
        )
        if outcome.ended is Ended.WALL and hurried:
            raise self._timed_out(agent_id)
        if outcome.ended is not Ended.EXITED:
            raise KnodeError(
                Code.AGENT_FAILED,
                f"{agent_id} {_describe_limit(outcome.ended, limits)}{_last_words(outcome)}",
            )
        if outcome.exit_code != 0:
            failure = TryAgain if outcome.exit_code == TRY_AGAIN else KnodeError
            raise failure(
                Code.AGENT_FAILED, f"{agent_id} {_describe_exit(outcome.exit_code)}{_last_words(outcome)}"
            )
        return AgentResult(outcome.stdout, await read_effects(self._world, folder))

    def _program_of(self, entry: AgentEntry, attempt: Attempt, folder: Path) -> tuple[list[str], bytes]:
        manifest = entry.manifest
        if entry.code is not None and manifest.runtime is Runtime.PYTHON:
            program = entry.code / manifest.entry[0]
            return [os.fspath(python_program()), "-I", os.fspath(program)], attempt.input
        if entry.code is not None:
            return self._command_of(entry.code, manifest.entry), attempt.input
        if manifest.runtime is Runtime.PYTHON:
            source = parse_source(attempt.input)
            program = folder / _PROGRAM_NAME
            with self._world.disk.create(program) as file:
                file.write(source.code.encode("utf-8", "replace"))
            return [os.fspath(python_program()), "-I", os.fspath(program)], source.stdin.encode()
        line = parse_line(attempt.input)
        return list(line.argv), line.stdin.encode()

    def _command_of(self, code: Path, argv: tuple[str, ...]) -> list[str]:
        """Return the command with a program of the agent's own folder, `./name`, at its full path."""
        program, *arguments = argv
        if program.startswith("./"):
            program = os.fspath(code / program)
        return [program, *arguments]

    @staticmethod
    def _timed_out(agent_id: str) -> KnodeError:
        return KnodeError(
            Code.TIMEOUT,
            f"the task's deadline came before {agent_id} was done",
            "submit it again with a longer --deadline",
        )


def _describe_limit(ended: Ended, limits: Limits) -> str:
    what = {
        Ended.MEMORY: f"used more memory than its {limits.memory_bytes} bytes",
        Ended.CPU: f"used more than its {limits.cpu_seconds} s of processor time",
        Ended.WALL: f"ran longer than its {limits.wall_seconds} s",
        Ended.OUTPUT: f"wrote more output than its {limits.output_bytes} bytes",
        Ended.PROCESSES: f"had more than its {limits.processes} processes and threads",
        Ended.FILES: f"made more than its {limits.files} files or {limits.file_bytes} bytes of them",
    }
    return f"was stopped: it {what[ended]}"


def _describe_exit(exit_code: int) -> str:
    try:
        return f"exited with {exit_code} ({signal.Signals(exit_code - 128).name})"
    except ValueError:
        return f"exited with {exit_code}"


def _last_words(outcome: Outcome) -> str:
    """Return the end of standard error, fit to be shown in a terminal."""
    words = outcome.stderr.decode("utf-8", "replace")
    printable = "".join(c for c in words if c.isprintable() or c in "\n\t").strip()
    return f": {printable[-MAX_STDERR_CHARACTERS:]}" if printable else ""
