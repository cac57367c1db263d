"""The files that go with a task, on the node that submits it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec

from knode.errors import Code, KnodeError
from knode.tasks.values import MAX_FILES, FileName
from knode.world import World


@dataclass(frozen=True, slots=True)
class Artifact:
    """A file as it was when the task was submitted."""

    path: Path
    name: str
    """What the agent finds it as."""
    size: int


async def open_artifacts(world: World, paths: Sequence[Path]) -> tuple[Artifact, ...]:
    """Check that each file can be read and sent.

    Raises:
        KnodeError: NOT_FOUND, DISK_READ_ONLY when it may not be read, INVALID_ARGUMENT when it is no file,
            its name cannot travel or two have the same, TOO_LARGE for too many.
    """
    if len(paths) > MAX_FILES:
        raise KnodeError(Code.TOO_LARGE, f"a task takes at most {MAX_FILES} files", "pack them into one")
    artifacts: dict[str, Artifact] = {}
    for path in paths:
        name = _checked_name(path)
        if name in artifacts:
            raise KnodeError(Code.INVALID_ARGUMENT, f"two files are called {name!r}", "rename one")
        await world.blocking.run(partial(world.disk.read_at, path, 0, 1))
        size = await world.blocking.run(partial(world.disk.size, path))
        artifacts[name] = Artifact(path, name, size)
    return tuple(artifacts.values())


def _checked_name(path: Path) -> str:
    try:
        return msgspec.convert(path.name, FileName)
    except msgspec.ValidationError as error:
        raise KnodeError(
            Code.INVALID_ARGUMENT,
            f"the name of {str(path)!r} cannot travel",
            "rename it: at most 200 characters, none of them a control character",
        ) from error
