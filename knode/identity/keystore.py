"""A private key on disk: one line, `knode-ed25519 <64 hexadecimal digits>`, in a file of mode 0600.

Only the owner of the home folder (mode 0700) reaches it; the disk's interface hides file modes, so
they are set when the key is made and not asked again.
"""

from __future__ import annotations

from pathlib import Path

from knode.errors import Code, KnodeError
from knode.identity.keys import KEY_BYTES, KeyPair
from knode.world import World

_FORM = "knode-ed25519"
_LIMIT_BYTES = 1024


def create_key(world: World, path: Path) -> KeyPair:
    """Make a new key and keep it at `path`, durably; a key that is there is never overwritten.

    Raises:
        KnodeError: HOME_EXISTS when there is a file at `path`, DISK_FULL, DISK_READ_ONLY.
    """
    if world.disk.exists(path):
        raise KnodeError(Code.HOME_EXISTS, f"{path} already holds a key", "choose another folder with --home")
    key = KeyPair(world.randomness.token(KEY_BYTES))
    world.disk.write(path, f"{_FORM} {key.seed.hex()}\n".encode(), mode=0o600)
    return key


def load_key(world: World, path: Path) -> KeyPair:
    """Return the key at `path`.

    Raises:
        KnodeError: HOME_DAMAGED when it is missing or is not one whole key.
    """
    try:
        line = world.disk.read(path, limit_bytes=_LIMIT_BYTES).decode("ascii")
        form, _, digits = line.removesuffix("\n").partition(" ")
        seed = bytes.fromhex(digits)
        if form != _FORM or line != f"{_FORM} {seed.hex()}\n" or len(seed) != KEY_BYTES:
            raise _damaged(path, "is damaged")
    except KnodeError as error:
        if error.code is Code.NOT_FOUND:
            raise _damaged(path, "is missing") from error
        if error.code is Code.TOO_LARGE:
            raise _damaged(path, "is damaged") from error
        raise
    except ValueError:
        # The cause is left out: its text could quote the key.
        raise _damaged(path, "is damaged") from None
    return KeyPair(seed)


def _damaged(path: Path, state: str) -> KnodeError:
    return KnodeError(
        Code.HOME_DAMAGED,
        f"the key file {path} {state}",
        "restore it from a backup; without one this node must join again from a new home folder",
    )
