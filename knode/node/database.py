"""The node's one database: the tables of several rooms, in one file with one history of schemas."""

from __future__ import annotations

from knode.consensus import standing
from knode.home.layout import Home
from knode.mesh import membership
from knode.storage import Database
from knode.tasks import outbox
from knode.world import World

# In the order in which they came to be; what is new goes to the end, whichever room it is of.
MIGRATIONS = (*membership.MIGRATIONS, *standing.MIGRATIONS, *outbox.MIGRATIONS)


async def open_database(world: World, home: Home) -> Database:
    """Open the node's database, bringing it up to date. Raises as `Database.open`."""
    return await Database.open(world, home.database, MIGRATIONS)
