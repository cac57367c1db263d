"""The tickets that this node has issued: what it keeps of each, and who used it.

A ticket's secret is not kept: its public key is what a joining node proves (docs/klp.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import apsw
import trio

from knode.errors import Code, KnodeError
from knode.mesh.statements import Role
from knode.mesh.ticket import LIFETIME_MS
from knode.storage import Database
from knode.world import Clock

MAX_OPEN_TICKETS = 64
FORGOTTEN_AFTER_MS = 24 * 60 * 60 * 1000
"""How long after it expired an unused ticket is still known, to say TICKET_EXPIRED."""
ASK_FOR_NEW = "ask the inviter for a new one: 'knode invite'"

SCHEMA = """
CREATE TABLE ticket (
    public_key BLOB PRIMARY KEY,  -- of the key pair that the secret derives: the secret itself is not kept
    role TEXT NOT NULL,
    expires INTEGER NOT NULL,     -- wall time, milliseconds
    used_by BLOB,
    words TEXT
) WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True)
class Invitation:
    """What the inviter keeps of a ticket."""

    role: Role
    expires: int
    """Wall time, milliseconds."""
    used_by: bytes | None = None
    """Raw key of the node that joined with it."""
    words: tuple[str, ...] = ()
    """The four words of that join."""


class Invitations:
    """The invitations of one node, by the public key of their tickets."""

    def __init__(self, clock: Clock, database: Database) -> None:
        self._clock = clock
        self._database = database
        self._known: dict[bytes, Invitation] = {}
        self._keeping = trio.Lock()

    async def load(self) -> None:
        """Read what is on disk."""
        query = "SELECT public_key, role, expires, used_by, words FROM ticket ORDER BY expires"

        def read(connection: apsw.Connection) -> list[Any]:
            return connection.execute(query).fetchall()

        self._known = {
            public_key: Invitation(Role(role), expires, used_by, tuple((words or "").split()))
            for public_key, role, expires, used_by, words in await self._database.read(read)
        }

    async def keep(self, public_key: bytes, role: Role) -> int:
        """Keep a new ticket's public key; return when it expires (wall time, milliseconds).

        Raises:
            KnodeError: RATE_LIMITED when too many wait to be used.
        """
        now = self._clock.wall()
        invitation = Invitation(role, now + LIFETIME_MS)
        forgotten_before = now - FORGOTTEN_AFTER_MS

        def write(connection: apsw.Connection) -> None:
            connection.execute(
                "DELETE FROM ticket WHERE used_by IS NULL AND expires < ?", (forgotten_before,)
            )
            row = (public_key, role.value, invitation.expires)
            connection.execute("INSERT INTO ticket (public_key, role, expires) VALUES (?, ?, ?)", row)

        async with self._keeping:
            unused = [i for i in self._known.values() if i.used_by is None and i.expires > now]
            if len(unused) >= MAX_OPEN_TICKETS:
                raise KnodeError(
                    Code.RATE_LIMITED, f"{MAX_OPEN_TICKETS} tickets wait to be used", "wait ten minutes"
                )
            await self._database.write(write)
            self._known = {
                key: i
                for key, i in self._known.items()
                if i.used_by is not None or i.expires >= forgotten_before
            } | {public_key: invitation}
        return invitation.expires

    def find(self, public_key: bytes) -> Invitation:
        """Return what is known of a ticket; TICKET_INVALID when nothing is."""
        found = self._known.get(public_key)
        if found is None:
            raise KnodeError(Code.TICKET_INVALID, "the inviter does not know this ticket", ASK_FOR_NEW)
        return found

    def check(self, public_key: bytes, joiner: bytes) -> Invitation:
        """Return the invitation of a ticket that the node with the key `joiner` may use now.

        The node that used a ticket may show it again: its join may have been cut off half-way.

        Raises:
            KnodeError: TICKET_INVALID, TICKET_USED or TICKET_EXPIRED.
        """
        invitation, now = self.find(public_key), self._clock.wall()
        if invitation.used_by not in (None, joiner):
            raise KnodeError(Code.TICKET_USED, "another node has used this ticket", ASK_FOR_NEW)
        if invitation.expires <= now:
            minutes = (now - invitation.expires) // 60_000
            raise KnodeError(Code.TICKET_EXPIRED, f"the ticket expired {minutes} minutes ago", ASK_FOR_NEW)
        return invitation

    @staticmethod
    def write_used(connection: apsw.Connection, public_key: bytes, used: Invitation) -> None:
        """Write who used a ticket, in the transaction that makes that node a member."""
        row = (used.used_by, " ".join(used.words), public_key)
        connection.execute("UPDATE ticket SET used_by = ?, words = ? WHERE public_key = ?", row)

    def note_used(self, public_key: bytes, used: Invitation) -> None:
        """Know who used a ticket, once that is durable."""
        self._known[public_key] = used

    def words(self) -> dict[bytes, tuple[str, ...]]:
        """Return the four words of each join that this node granted, by the member's raw key."""
        return {i.used_by: i.words for i in self._known.values() if i.used_by is not None}
