"""What a replica holds on its disk: its log, states that are on their way, and the state machine."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import trio

from knode.consensus.configuration import founded
from knode.consensus.installation import Installation
from knode.consensus.journal import Journal
from knode.consensus.messages import Configuration, Entry, HardState, Index, Kind, Snapshot, Term
from knode.consensus.ready import Recovered
from knode.consensus.standing import Standing
from knode.consensus.state_machine import StateMachine
from knode.errors import Code, KnodeError
from knode.mesh.incarnations import Incarnation
from knode.mesh.statements import BeginIncarnation
from knode.world import World

APPLIED_AT_ONCE = 1024


class Holdings:
    """The disk of one replica. Nothing here runs while a driver does."""

    def __init__(
        self,
        world: World,
        folder: Path,
        state_machine: StateMachine,
        first_command: Callable[[Incarnation], bytes],
    ) -> None:
        self.files = folder / "snapshots"
        self.mark = folder / "fit"
        """Where `Standing` has its mark."""
        self._world = world
        self._folder = folder
        self._log = folder / "log"
        self._state_machine = state_machine
        self._first_command = first_command

    async def open(self, standing: Standing) -> tuple[Journal, Installation, Recovered]:
        """Open the log and see that it is whole; a replica that founds the cell begins it.

        Raises:
            KnodeError: HOME_DAMAGED, HOME_TOO_NEW, DISK_FULL, DISK_READ_ONLY.
        """
        run = self._world.blocking.run
        journal, installation, recovered = await self._open(standing)
        try:
            if standing.founds and not standing.begun and recovered == Recovered():
                command = self._first_command(standing.incarnation)
                recovered = founded(Configuration(voters=(standing.replica_id,)), command)
                await run(partial(journal.append, recovered.hard_state, recovered.entries, sync=True))
            await standing.begin()
        except BaseException:
            await self._close(journal)
            raise
        return journal, installation, recovered

    async def end(self, standing: Standing) -> tuple[Term, Index]:
        """Return term and index of the last entry that is durable here; both 0 for an empty log.

        Raises as `open`.
        """
        journal, _, recovered = await self._open(standing)
        await self._close(journal)
        last: Entry | Snapshot = recovered.entries[-1] if recovered.entries else recovered.snapshot
        return last.term, last.index

    async def remove(self) -> None:
        """Remove everything, durably. Stopped in between, it is to be called again.

        Raises:
            KnodeError: DISK_READ_ONLY and the like.
        """
        disk, run = self._world.disk, self._world.blocking.run
        await run(partial(disk.remove, self._folder))
        await run(partial(disk.sync_folder, self._folder.parent))
        await self._state_machine.clear()

    async def survive(self, standing: Standing, incarnation: Incarnation, begun: BeginIncarnation) -> None:
        """Let `incarnation` begin: what the log has up to the index that `begun` names is committed, the rest
        is void, the first command follows, and this replica is the only voter. Stopped in between, it is to
        be called again.

        Raises:
            KnodeError: HOME_DAMAGED when the log does not hold what the statement names; or as `open`.
        """
        run = self._world.blocking.run
        journal, _, recovered = await self._open(standing)
        try:
            entries = [entry for entry in recovered.entries if entry.index <= begun.index]
            last: Entry | Snapshot = entries[-1] if entries else recovered.snapshot
            if (last.term, last.index) != (begun.term, begun.index):
                raise KnodeError(
                    Code.HOME_DAMAGED,
                    f"the log here ends at {last.index}, and the cell's ledger was begun anew with what this "
                    f"node had up to {begun.index}",
                )
            lacking = [entry for entry in entries if entry.index > self._state_machine.applied]
            for begin in range(0, len(lacking), APPLIED_AT_ONCE):
                await self._state_machine.apply(lacking[begin : begin + APPLIED_AT_ONCE])
            await self._state_machine.sync()
            alone = Snapshot(begun.index, begun.term, Configuration(voters=(standing.replica_id,)))
            term = max(recovered.hard_state.term, begun.term) + 1
            await run(partial(journal.reset, alone, HardState(term, b"", begun.index)))
            command = self._first_command(incarnation)
            if command:
                first = Entry(term, begun.index + 1, Kind.COMMAND, command)
                state = HardState(term, b"", begun.index + 1)
                await run(partial(journal.append, state, (first,), sync=True))
        finally:
            await self._close(journal)
        await standing.survive(incarnation)

    async def _open(self, standing: Standing) -> tuple[Journal, Installation, Recovered]:
        run, disk = self._world.blocking.run, self._world.disk
        if standing.begun and not await run(partial(disk.list_folder, self._log)):
            raise KnodeError(Code.HOME_DAMAGED, f"the cell's log in {self._log} is gone")
        await run(partial(disk.make_folder, self.files))
        journal, recovered = await run(partial(Journal.open, disk, self._log))
        try:
            installation = Installation(self._world, self.files, self._state_machine, journal)
            recovered = await installation.settle(recovered)
            applied = self._state_machine.applied
            if not recovered.snapshot.index <= applied <= recovered.snapshot.index + len(recovered.entries):
                why = f"the ledger, at {applied}, and the log do not belong together"
                raise KnodeError(Code.HOME_DAMAGED, why)
        except BaseException:
            await self._close(journal)
            raise
        return journal, installation, recovered

    async def _close(self, journal: Journal) -> None:
        with trio.CancelScope(shield=True):
            await self._world.blocking.run(journal.close)
