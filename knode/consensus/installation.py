"""Taking over a whole state, so that a crash at any point leaves the old one or the new one.

The state's file is durable before the core hears of it. When the core accepts it, `pending` names it,
durably; then the state machine takes it over, then the log begins anew behind it, then `pending` goes.
`settle` finishes at the next start what a crash has left.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import msgspec
import trio

from knode.consensus.journal import Journal
from knode.consensus.messages import HardState, InstallSnapshot, Snapshot
from knode.consensus.ready import Recovered
from knode.consensus.state_machine import StateMachine
from knode.errors import Code, KnodeError
from knode.klp.codec import Decoder, encode
from knode.world import World

DISK_TAKES_NOTHING = (Code.DISK_FULL, Code.DISK_READ_ONLY)
"""What a disk answers that may take it later."""
NO_STATE = (Code.BAD_FRAME, Code.NON_CANONICAL, Code.NOT_FOUND, Code.TOO_LARGE)
"""What a file is answered by that holds no state."""
_LIMIT_BYTES = 64 * 1024


class _Pending(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    snapshot: Snapshot
    hard_state: HardState
    file: str


_decoder: Decoder[_Pending] = Decoder(_Pending)


@dataclass(eq=False, slots=True)
class Received:
    """A state that has arrived whole."""

    message: InstallSnapshot
    path: Path
    is_considered: bool = False
    is_accepted: bool = False
    settled: trio.Event = field(default_factory=trio.Event)
    """Set when it is in use, or is not wanted."""


class Installation:
    """Installs states that lie in `folder`."""

    def __init__(self, world: World, folder: Path, state_machine: StateMachine, journal: Journal) -> None:
        self._world = world
        self._folder = folder
        self._pending = folder / "pending"
        self._state_machine = state_machine
        self._journal = journal

    async def install(self, received: Received, hard_state: HardState) -> None:
        """Let state and log begin anew. Asked again after an error, or a crash, it goes on.

        Raises:
            KnodeError: DISK_FULL, DISK_READ_ONLY; BAD_FRAME, HOME_TOO_NEW: nothing has changed; SyncFailed.
        """
        pending = _Pending(received.message.snapshot, hard_state, received.path.name)
        disk, run = self._world.disk, self._world.blocking.run
        await run(partial(disk.write, self._pending, encode(pending)))
        try:
            await self._finish(pending)
        except KnodeError as error:
            if error.code in NO_STATE:
                await run(partial(disk.remove, self._pending))
            raise

    async def settle(self, recovered: Recovered) -> Recovered:
        """Finish what a crash has left, and remove every file that is of no use; return what the log is now.

        Raises:
            KnodeError: as `install`; HOME_DAMAGED.
        """
        disk, run = self._world.disk, self._world.blocking.run
        if await run(partial(disk.exists, self._pending)):
            try:
                data = await run(partial(disk.read, self._pending, limit_bytes=_LIMIT_BYTES))
                pending = _decoder.decode(data)
                if recovered.snapshot.index < pending.snapshot.index:
                    recovered = await self._finish(pending)
            except KnodeError as error:
                if error.code not in NO_STATE:
                    raise
                why = f"a ledger that was being installed cannot be read any more: {error.message}"
                raise KnodeError(Code.HOME_DAMAGED, why) from error
        for name in await run(partial(disk.list_folder, self._folder)):
            await run(partial(disk.remove, self._folder / name))
        return recovered

    async def _finish(self, pending: _Pending) -> Recovered:
        disk, run = self._world.disk, self._world.blocking.run
        index = await self._state_machine.restore(self._folder / pending.file)
        if index != pending.snapshot.index:
            why = f"the ledger that was sent is of {index}, and was said to be of {pending.snapshot.index}"
            raise KnodeError(Code.HOME_DAMAGED, why)
        await run(partial(self._journal.reset, pending.snapshot, pending.hard_state))
        await run(partial(disk.remove, self._pending))
        await run(partial(disk.remove, self._folder / pending.file))
        return Recovered(pending.hard_state, pending.snapshot, ())
