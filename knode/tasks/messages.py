"""What nodes say to each other about direct tasks: the bodies of requests and events."""

from __future__ import annotations

from typing import Annotated

import msgspec

MAX_FILES = 256
MAX_INPUT_BYTES = 192 * 1024
NO_FRACTION = 1001

TaskId = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
# A plain name: no folder, no control character, not `.` or `..`.
FileName = Annotated[str, msgspec.Meta(pattern=r"^(?!\.{1,2}\Z)[^/\x00-\x1f\x7f]+\Z", max_length=200)]
Size = Annotated[int, msgspec.Meta(ge=0, lt=2**40)]
AgentId = Annotated[str, msgspec.Meta(pattern=r"^k[A-Z][a-z]+:[a-z][a-z0-9-]*\Z", max_length=64)]


class Stage(msgspec.Struct, frozen=True, array_like=True):
    """Keep the file that comes on this request's stream, for the task's attempt."""

    task: TaskId
    name: FileName
    size: Size


class Run(msgspec.Struct, frozen=True, array_like=True):
    """Run an agent over the input and the files staged before, and answer with its output."""

    task: TaskId
    agent: AgentId
    input: Annotated[bytes, msgspec.Meta(max_length=MAX_INPUT_BYTES)]
    files: Annotated[tuple[FileName, ...], msgspec.Meta(max_length=MAX_FILES)]
    deadline_ms: Annotated[int, msgspec.Meta(ge=1, le=300_000)]


class Ran(msgspec.Struct, frozen=True, array_like=True):
    """The agent's output."""

    output: bytes


class Report(msgspec.Struct, frozen=True, array_like=True):
    """How far an attempt is: thousandths, or NO_FRACTION, and a line of text."""

    permille: Annotated[int, msgspec.Meta(ge=0, le=NO_FRACTION)]
    text: Annotated[str, msgspec.Meta(max_length=200)]


class Offer(msgspec.Struct, frozen=True, array_like=True):
    """The agents that a node has running, announced to every member."""

    agents: Annotated[
        tuple[tuple[AgentId, Annotated[str, msgspec.Meta(max_length=32)]], ...], msgspec.Meta(max_length=1024)
    ]
