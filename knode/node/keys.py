"""The private keys of a home, and how one takes another's place.

The new key lies beside the old one while the statement that names it is made durable; then it takes its
place. What was begun when the node was stopped is settled at its next start by what is in its roster, so it
is never without a key that others were told, and never has one that they were not.
"""

from __future__ import annotations

from pathlib import Path

from knode.home.layout import Home
from knode.identity import KeyPair
from knode.identity.keystore import create_key, load_key
from knode.mesh.membership import stored_statements
from knode.mesh.statements import Recover, Rotate
from knode.node.database import open_database
from knode.world import World

_LIMIT_BYTES = 1024


def next_key_file(path: Path) -> Path:
    """Return where the key waits that is to take the place of the one at `path`."""
    return path.with_suffix(".next")


def make_next_key(world: World, path: Path) -> KeyPair:
    """Make a key, durably, that is to take the place of the one at `path`; an earlier attempt's is removed.

    Raises:
        KnodeError: DISK_FULL, DISK_READ_ONLY.
    """
    world.disk.remove(next_key_file(path))
    return create_key(world, next_key_file(path))


def install_next_key(world: World, path: Path) -> None:
    """Let the key that waits take its place, durably. Raises as `make_next_key`."""
    waiting = next_key_file(path)
    world.disk.write(path, world.disk.read(waiting, limit_bytes=_LIMIT_BYTES), mode=0o600)
    world.disk.remove(waiting)


async def settle_keys(world: World, home: Home) -> None:
    """Finish or undo what a node began and was stopped in. Before the home's keys are read.

    Raises:
        KnodeError: HOME_DAMAGED, HOME_TOO_NEW, LOCKED, DISK_FULL, DISK_READ_ONLY.
    """
    begun = [path for path in (home.node_key, home.owner_key) if world.disk.exists(next_key_file(path))]
    if not begun:
        return
    database = await open_database(world, home)
    try:
        bodies = [statement.body for statement in await stored_statements(database)]
    finally:
        await database.aclose()
    named = {b.key for b in bodies if isinstance(b, Rotate)} | {
        b.owner for b in bodies if isinstance(b, Recover)
    }
    for path in begun:
        if load_key(world, next_key_file(path)).public.raw in named:
            install_next_key(world, path)
        else:
            world.disk.remove(next_key_file(path))
