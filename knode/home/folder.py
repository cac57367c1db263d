"""The home folder on disk: made whole or not at all, and checked before use."""

from __future__ import annotations

import json
from typing import Annotated

import msgspec

from knode.errors import Code, KnodeError
from knode.home.layout import Home
from knode.world import WallTime, World

FORMAT = 1
"""The home format that this knode writes, and the newest that it reads."""

NAME_PATTERN = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\Z"
"""A node's name: a label as in DNS, 1 to 63 lower-case letters, digits and inner hyphens."""

NodeName = Annotated[str, msgspec.Meta(pattern=NAME_PATTERN, max_length=63)]
_LIMIT_BYTES = 64 * 1024


class HomeFormat(msgspec.Struct, frozen=True):
    """What `home.json` says: the format, the node's first name, and when the home was made."""

    format: int
    node: NodeName
    created: WallTime


class _Version(msgspec.Struct):
    format: int


def prepare_home(world: World, home: Home) -> None:
    """Make the folders of a new home and mark it as unfinished; `complete_home` makes it a node's.

    Between the two the caller makes keys and certificate. What an earlier, interrupted attempt left is
    removed, but for the configuration. A folder with anything that knode did not make is refused.

    Raises:
        KnodeError: HOME_EXISTS when it already is a node's home or is in use for something else,
            DISK_FULL, DISK_READ_ONLY.
    """
    disk = world.disk
    if disk.exists(home.format_file):
        raise KnodeError(
            Code.HOME_EXISTS, f"{home.path} already holds a node", "choose another folder with --home"
        )
    # Deployments may put the configuration there first; a temporary file is a mark that was being written.
    names = [
        name
        for name in disk.list_folder(home.path)
        if name != home.config.name and not name.startswith(f".{home.unfinished_file.name}.")
    ]
    if disk.exists(home.unfinished_file):
        for folder in (home.identity, home.state, home.log, home.run):
            disk.remove(folder)
    elif names:
        raise KnodeError(
            Code.HOME_EXISTS,
            f"{home.path} holds other files ({', '.join(names[:3])}) and no node",
            "choose an empty or new folder with --home",
        )
    disk.make_folder(home.path)
    disk.write(home.unfinished_file, b"this home is being made; 'knode init' or 'knode join' starts over\n")
    for folder in home.folders:
        disk.make_folder(folder)


def complete_home(world: World, home: Home, *, name: str) -> HomeFormat:
    """Make a prepared home a node's home. This is the last step of its making.

    Raises:
        KnodeError: INVALID_ARGUMENT for a name that is none, DISK_FULL, DISK_READ_ONLY.
    """
    content = HomeFormat(format=FORMAT, node=check_name(name), created=world.clock.wall())
    text = json.dumps(msgspec.to_builtins(content), indent=2) + "\n"
    world.disk.write(home.format_file, text.encode())
    world.disk.remove(home.unfinished_file)
    return content


def create_home(world: World, home: Home, *, name: str) -> HomeFormat:
    """Make a home that needs nothing between `prepare_home` and `complete_home`."""
    check_name(name)
    prepare_home(world, home)
    return complete_home(world, home, name=name)


def open_home(world: World, home: Home) -> HomeFormat:
    """Check that `home` is a whole home of a format that this knode reads; return what it says.

    Raises:
        KnodeError: HOME_MISSING, HOME_TOO_NEW or HOME_DAMAGED, each with what to do.
    """
    try:
        data = world.disk.read(home.format_file, limit_bytes=_LIMIT_BYTES)
        version = msgspec.json.decode(data, type=_Version).format
        if version > FORMAT:
            raise KnodeError(
                Code.HOME_TOO_NEW,
                f"{home.path} has format {version}, and this knode reads formats up to {FORMAT}",
                "install the newer knode that wrote it, or choose another folder with --home",
            )
        content = msgspec.json.decode(data, type=HomeFormat)
    except msgspec.MsgspecError as error:
        raise _damaged(home, f"is damaged ({error})") from error
    except UnicodeDecodeError as error:
        raise _damaged(home, "is damaged (not UTF-8)") from error
    except KnodeError as error:
        match error.code:
            case Code.NOT_FOUND:
                raise _missing(world, home) from error
            case Code.TOO_LARGE:
                raise _damaged(home, "is damaged (too large)") from error
        raise
    for folder in home.folders:
        world.disk.make_folder(folder)
    return content


def check_name(name: str) -> str:
    """Return `name` when it can name a node.

    Raises:
        KnodeError: INVALID_ARGUMENT.
    """
    try:
        return msgspec.convert(name, NodeName)
    except msgspec.ValidationError as error:
        raise KnodeError(
            Code.INVALID_ARGUMENT,
            f"{name[:80]!r} is no name for a node",
            "use 1 to 63 lower-case letters, digits and inner hyphens",
        ) from error


def _missing(world: World, home: Home) -> KnodeError:
    if world.disk.exists(home.node_key) and not world.disk.exists(home.unfinished_file):
        return _damaged(home, "is missing, and the folder holds a node's key")
    return KnodeError(
        Code.HOME_MISSING,
        f"{home.path} holds no node",
        "start a new cell with 'knode init', or join one with 'knode join TICKET'",
    )


def _damaged(home: Home, state: str) -> KnodeError:
    return KnodeError(
        Code.HOME_DAMAGED, f"{home.format_file} {state}", "restore it from a backup, or use another --home"
    )
