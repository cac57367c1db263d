"""The chunks that go with a request: read from a file, and written to one where they arrive."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from functools import partial
from pathlib import Path

from knode.errors import Code, KnodeError
from knode.world import World, WritableFile

READ_BYTES = 256 * 1024
WRITE_BYTES = 1024 * 1024
"""How much is gathered before it goes to the disk."""


async def read_chunks(world: World, path: Path, size: int) -> AsyncGenerator[bytes, None]:
    """Give the first `size` bytes of a file.

    Raises:
        KnodeError: NOT_FOUND when it is gone, INVALID_ARGUMENT when it is shorter.
    """
    offset = 0
    while offset < size:
        length = min(READ_BYTES, size - offset)
        chunk = await world.blocking.run(partial(world.disk.read_at, path, offset, length))
        if not chunk:
            raise KnodeError(
                Code.INVALID_ARGUMENT,
                f"{path} became smaller while it was sent",
                "see that nothing changes it, then send it again",
            )
        offset += len(chunk)
        yield chunk


async def write_chunks(
    world: World,
    file: WritableFile,
    chunks: AsyncIterator[bytes],
    *,
    name: str,
    size: int,
    update: Callable[[bytes], None] = lambda piece: None,
) -> None:
    """Write what arrives. It is not synced.

    Args:
        world: whose disk it is.
        file: open; with an error it is to be thrown away.
        chunks: of any lengths; they are written in larger pieces.
        name: of the file, for errors.
        size: how many bytes were announced.
        update: given each piece in turn, where the disk is waited for: to hash it.

    Raises:
        KnodeError: INVALID_ARGUMENT when it is more or less than was announced, DISK_FULL, DISK_READ_ONLY.
    """

    def write(piece: bytes) -> None:
        update(piece)
        file.write(piece)

    async with aclosing(_gather(chunks, name, size)) as pieces:
        async for piece in pieces:
            await world.blocking.run(partial(write, piece))


async def _gather(chunks: AsyncIterator[bytes], name: str, size: int) -> AsyncGenerator[bytes, None]:
    """Give exactly `size` bytes in pieces that are worth a write."""
    waiting, left = bytearray(), size
    async for chunk in chunks:
        left -= len(chunk)
        if left < 0:
            break
        waiting += chunk
        if len(waiting) >= WRITE_BYTES:
            yield bytes(waiting)
            waiting.clear()
    if left:
        compared = "more" if left < 0 else "fewer"
        raise KnodeError(
            Code.INVALID_ARGUMENT,
            f"{name} has {compared} bytes than the {size} that were announced",
            "see that nothing changes it, then send it again",
        )
    yield bytes(waiting)
