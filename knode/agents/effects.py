"""What an agent leaves besides its result: lines of JSON in a file of its folder, read after its end.

`{"operation": …}` is kept by the cell as it stands; `{"task": {"agent": …, "input": …}}` is done next. All of
them take effect together with the result, once, or none does.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec

from knode.agents.limits import MAX_JSON_DEPTH, is_too_deep
from knode.errors import Code, KnodeError
from knode.world import World

EFFECTS_NAME = "effects.jsonl"
MAX_EFFECTS_BYTES = 1024 * 1024
"""Of the file. What it says is bounded more narrowly by whoever takes it."""
MAX_LINES = 1000


@dataclass(frozen=True, slots=True)
class FollowUp:
    """A task that is to be done next."""

    agent: str
    input: bytes


@dataclass(frozen=True, slots=True)
class Effects:
    """What an agent left, in its order."""

    operations: tuple[bytes, ...] = ()
    """Each a JSON value, as it was written."""
    follow_ups: tuple[FollowUp, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.operations or self.follow_ups)


NO_EFFECTS = Effects()


class _Task(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    agent: str
    input: msgspec.Raw = msgspec.Raw(b'""')


class _Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    operation: msgspec.Raw = msgspec.Raw()
    task: _Task | None = None


_line = msgspec.json.Decoder(_Line)


async def read_effects(world: World, folder: Path) -> Effects:
    """Return what the agent that worked in `folder` left there; nothing of it runs any more.

    Raises:
        KnodeError: AGENT_FAILED for what is no plain file or no line of effects, TOO_LARGE.
    """
    data = await world.blocking.run(partial(_read, world, folder / EFFECTS_NAME))
    return parse_effects(data)


def parse_effects(data: bytes) -> Effects:
    """Return the effects in `data`.

    Raises:
        KnodeError: AGENT_FAILED, naming the line; TOO_LARGE for more than MAX_LINES.
    """
    lines = [(number, line) for number, line in enumerate(data.split(b"\n"), 1) if line.strip()]
    if len(lines) > MAX_LINES:
        raise _too_large(f"{MAX_LINES} lines")
    operations: list[bytes] = []
    follow_ups: list[FollowUp] = []
    for number, line in lines:
        try:
            effect = _line.decode(line.decode())
            operation = bytes(effect.operation)
            if bool(operation) == (effect.task is not None):
                raise ValueError('either "operation" or "task"')
            if effect.task is None:
                _check_json(operation)
                operations.append(operation)
            else:
                follow_ups.append(FollowUp(effect.task.agent, _input_of(bytes(effect.task.input))))
        except (ValueError, RecursionError, msgspec.MsgspecError) as error:
            raise KnodeError(
                Code.AGENT_FAILED, f"line {number} of {EFFECTS_NAME}, which the agent left: {error}"
            ) from error
    return Effects(tuple(operations), tuple(follow_ups))


def _input_of(value: bytes) -> bytes:
    """Return a task's input: a string's text, or another value's JSON as it was written."""
    _check_json(value)
    return msgspec.json.decode(value, type=str).encode() if value.startswith(b'"') else value


def _check_json(value: bytes) -> None:
    # What is not looked into was only skipped so far.
    if is_too_deep(msgspec.json.decode(value)):
        raise ValueError(f"arrays and objects in each other, more than {MAX_JSON_DEPTH} deep")


def _read(world: World, path: Path) -> bytes:
    disk = world.disk
    try:
        if not disk.is_plain(path):
            raise KnodeError(Code.AGENT_FAILED, f"{EFFECTS_NAME}, which the agent left, is no plain file")
        return disk.read(path, limit_bytes=MAX_EFFECTS_BYTES)
    except KnodeError as error:
        if error.code is Code.NOT_FOUND:
            return b""
        if error.code is Code.TOO_LARGE:
            raise _too_large(f"{MAX_EFFECTS_BYTES} bytes") from error
        raise


def _too_large(limit: str) -> KnodeError:
    return KnodeError(Code.TOO_LARGE, f"{EFFECTS_NAME}, which the agent left, has more than {limit}")
