"""Making a home: keys, certificate, first configuration, and with `initialise` a cell of one."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from typing import Any

import trio

from knode.errors import Code, KnodeError
from knode.home import folder
from knode.home.configuration import set_value
from knode.home.layout import Home
from knode.identity import KeyPair
from knode.identity.keystore import create_key
from knode.mesh.membership import Membership
from knode.node.database import open_database
from knode.transport.certificate import make_certificate
from knode.world import World
from knode.world.real import real_world

RECOVERY_PREFIX = "knode-recovery-"
_RECOVERY_KEY = re.compile(rf"(?:{RECOVERY_PREFIX})?([0-9a-f]{{64}})")


def machine_name() -> str:
    """Return a node name made from the machine's."""
    words = re.findall(r"[a-z0-9]+", socket.gethostname().split(".")[0].lower())
    return "-".join(words)[:63].strip("-") or "node"


def prepare_home(home: Home, *, name: str | None, flags: Mapping[str, str]) -> dict[str, Any]:
    """Make the home of a node that belongs to no cell yet.

    Args:
        home: an empty or absent folder.
        name: the node's name; None: the machine's.
        flags: configuration values to keep, by their full key.

    Raises:
        KnodeError: HOME_EXISTS, INVALID_ARGUMENT, CONFIG_INVALID, DISK_FULL, DISK_READ_ONLY. What was
            begun is taken up or removed by the next attempt, and never taken for a node.
    """
    world = real_world()
    chosen = folder.check_name(name or machine_name())
    key = _make(world, home, flags)
    folder.complete_home(world, home, name=chosen)
    return {"node_id": key.node_id, "did": key.public.did, "name": chosen, "home": str(home.path)}


def initialise(home: Home, *, name: str | None, flags: Mapping[str, str]) -> dict[str, Any]:
    """Make a home and found a cell with this node as its first member.

    The recovery key is in the answer and nowhere else: whoever loses it cannot replace a lost owner key.

    Raises:
        KnodeError: as `prepare_home`.
    """
    world = real_world()
    chosen = folder.check_name(name or machine_name())
    key = _make(world, home, flags)
    owner = create_key(world, home.owner_key)
    recovery = KeyPair(world.randomness.token(32))

    async def found() -> str:
        database = await open_database(world, home)
        try:
            membership = Membership(world, database, key, owner)
            await membership.load()
            await membership.found(recovery=recovery.public, name=chosen)
            return membership.roster.cell_id.hex()
        finally:
            await database.aclose()

    cell_id = trio.run(found)
    folder.complete_home(world, home, name=chosen)
    return {
        "node_id": key.node_id,
        "did": key.public.did,
        "name": chosen,
        "cell_id": cell_id,
        "home": str(home.path),
        "recovery_key": RECOVERY_PREFIX + recovery.seed.hex(),
    }


def parse_recovery_key(text: str) -> KeyPair:
    """Return the recovery key that `initialise` told, as somebody typed it: spaces and case do not matter.

    Raises:
        KnodeError: INVALID_ARGUMENT. Its text does not repeat what was given.
    """
    found = _RECOVERY_KEY.fullmatch("".join(text.lower().split()))
    if found is None:
        raise KnodeError(
            Code.INVALID_ARGUMENT,
            "this is no recovery key",
            f"type the line that 'knode init' showed: {RECOVERY_PREFIX} and 64 digits and letters a to f",
        )
    return KeyPair(bytes.fromhex(found[1]))


def _make(world: World, home: Home, flags: Mapping[str, str]) -> KeyPair:
    folder.prepare_home(world, home)
    for setting, value in flags.items():
        set_value(world, home, setting, value)
    world.disk.write(home.certificate, make_certificate(world.clock.wall()))
    return create_key(world, home.node_key)
