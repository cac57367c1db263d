"""The node's databases: one of its own, with the tables of several rooms, and the ledger of its cell."""

from __future__ import annotations

from knode.consensus import standing
from knode.errors import Code, KnodeError
from knode.home.layout import Home
from knode.mesh import membership
from knode.mesh.membership import stored_members
from knode.storage import Database
from knode.tasks import outbox
from knode.tasks.store import LedgerStore
from knode.world import Log, World

# In the order in which they came to be; what is new goes to the end, whichever room it is of.
MIGRATIONS = (
    *membership.MIGRATIONS,
    *standing.MIGRATIONS,
    *outbox.MIGRATIONS,
    *standing.LATER_MIGRATIONS,
)


async def open_ledger(world: World, home: Home, database: Database, log: Log) -> LedgerStore:
    """Open the cell's ledger, as far as this node has applied it.

    One that is damaged is removed when the cell has other members: it comes again from the log here or,
    with the log, from them. In a cell of one it is left, for whoever may mend it.

    Raises:
        KnodeError: as `LedgerStore.open`.
    """
    try:
        return await LedgerStore.open(world, home.ledger, log)
    except KnodeError as error:
        if error.code is not Code.HOME_DAMAGED or await stored_members(database) < 2:
            raise
        log.warning("the ledger is damaged, and made anew", why=str(error))
    return await LedgerStore.open_anew(world, home.ledger, log)


async def open_database(world: World, home: Home) -> Database:
    """Open the node's database, bringing it up to date. Raises as `Database.open`."""
    return await Database.open(world, home.database, MIGRATIONS)
