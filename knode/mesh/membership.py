"""The roster and the invitations on disk, and every change to them.

Each change is durable before it is told to anyone. Nothing here touches a link.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import apsw
import trio

from knode.errors import Code, KnodeError
from knode.identity import KeyPair, PublicKey
from knode.klp.handshake import Established, Hello
from knode.mesh.contact import SignedContact, open_contact
from knode.mesh.roster import (
    MAX_STATEMENTS,
    Add,
    Genesis,
    Member,
    Revoke,
    Role,
    Roster,
    SetRole,
    SignedStatement,
    open_statement,
    resolve,
    sign_statement,
)
from knode.mesh.ticket import LIFETIME_MS, MAX_ADDRESSES, SECRET_BYTES, Ticket
from knode.storage import Database
from knode.world import World

MAX_OPEN_TICKETS = 64
ASK_FOR_NEW = "ask the inviter for a new one: 'knode invite'"

SCHEMA = """
CREATE TABLE cell (id BLOB NOT NULL);
CREATE TABLE statement (id BLOB PRIMARY KEY, data BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE contact (key BLOB PRIMARY KEY, issued INTEGER NOT NULL, data BLOB NOT NULL) WITHOUT ROWID;
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


class Membership:
    """What this node knows of its cell. One writer: the node's own tasks."""

    def __init__(self, world: World, database: Database, key: KeyPair, owner_key: KeyPair | None) -> None:
        self.key = key
        self.contacts: dict[bytes, SignedContact] = {}
        self.changed: list[Callable[[list[SignedStatement]], None]] = []
        """Called, after a change of the roster is durable, with the statements that are new."""
        self._owner_key = owner_key
        self._world = world
        self._database = database
        self._roster: Roster | None = None
        self._invitations: dict[bytes, Invitation] = {}
        self._change = trio.Lock()
        self._next_change = trio.Event()

    async def load(self) -> None:
        """Read what is on disk; statements are verified again, as anything that arrives."""

        def read(connection: apsw.Connection) -> tuple[list[Any], ...]:
            queries = (
                "SELECT id FROM cell",
                "SELECT data FROM statement ORDER BY id",
                "SELECT data FROM contact ORDER BY key",
                "SELECT public_key, role, expires, used_by, words FROM ticket ORDER BY expires",
            )
            return tuple(connection.execute(query).fetchall() for query in queries)

        cells, statements, contacts, tickets = await self._database.read(read)
        for [cell_id] in cells:
            self._roster = resolve(cell_id, [open_statement(data) for [data] in statements])
        self.contacts = {c.body.key: c for c in (open_contact(data) for [data] in contacts)}
        self._invitations = {
            public_key: Invitation(Role(role), expires, used_by, tuple((words or "").split()))
            for public_key, role, expires, used_by, words in tickets
        }

    @property
    def in_cell(self) -> bool:
        """Whether this node belongs to a cell."""
        return self._roster is not None

    @property
    def roster(self) -> Roster:
        """The roster now.

        Raises:
            KnodeError: UNAVAILABLE when this node belongs to no cell yet.
        """
        if self._roster is None:
            raise KnodeError(
                Code.UNAVAILABLE, "this node belongs to no cell yet", "join one: 'knode join TICKET'"
            )
        return self._roster

    @property
    def own(self) -> Member:
        """This node, as a member; KEY_REVOKED or UNKNOWN_PEER when it is none (any more)."""
        return self.roster.admit(self.key.public.raw)

    async def found(self, *, recovery: PublicKey, name: str) -> None:
        """Found a cell with this node as its first member, an admin."""
        if self._owner_key is None or self.in_cell:
            raise KnodeError(Code.HOME_EXISTS, "this node belongs to a cell already")
        owner, now = self._owner_key, self._world.clock.wall()
        genesis = sign_statement(
            owner, Genesis(owner.public.raw, recovery.raw, self._world.randomness.token(16), now)
        )
        add = Add(owner.public.raw, genesis.id, self.key.public.raw, name, Role.ADMIN, now)
        await self.adopt(genesis.id, [genesis, sign_statement(owner, add)])

    async def adopt(self, cell_id: bytes, statements: list[SignedStatement]) -> None:
        """Belong to this cell from now on: its first statements, which must name this node a member."""
        roster = resolve(cell_id, statements)
        roster.admit(self.key.public.raw)

        def write(connection: apsw.Connection) -> None:
            connection.execute("INSERT INTO cell VALUES (?)", (cell_id,))
            _insert(connection, roster.statements.values())

        await self._database.write(write)
        self._become(roster, list(roster.statements.values()))

    async def add(self, statements: Iterable[SignedStatement]) -> list[SignedStatement]:
        """Merge statements into the roster; return those that were new and count.

        Raises:
            KnodeError: RATE_LIMITED when the roster would hold too many.
        """
        async with self._change:
            known = self.roster.statements
            roster = resolve(self.roster.cell_id, {**known, **{s.id: s for s in statements}}.values())
            new = [s for i, s in roster.statements.items() if i not in known]
            if len(roster.statements) > MAX_STATEMENTS:
                raise KnodeError(Code.RATE_LIMITED, f"a roster holds at most {MAX_STATEMENTS} statements")
            if new:
                await self._database.write(lambda connection: _insert(connection, new))
                self._become(roster, new)
        return new

    async def add_contacts(self, contacts: Iterable[SignedContact]) -> list[SignedContact]:
        """Keep the contacts of members that are newer than ours; return those."""
        newer = [
            c
            for c in contacts
            if c.body.key in self.roster.members
            and (c.body.key not in self.contacts or c.body.issued > self.contacts[c.body.key].body.issued)
        ]
        if newer:
            rows = [(c.body.key, c.body.issued, c.data) for c in newer]
            await self._database.write(
                lambda connection: connection.executemany(
                    "INSERT OR REPLACE INTO contact VALUES (?, ?, ?)", rows
                )
            )
            self.contacts.update({c.body.key: c for c in newer})
        return newer

    async def issue_ticket(self, role: Role, addresses: tuple[str, ...]) -> tuple[Ticket, int]:
        """Make a one-use ticket; return it and when it expires (wall time, milliseconds).

        Raises:
            KnodeError: NOT_ALLOWED when this node may not invite, RATE_LIMITED, UNAVAILABLE without address.
        """
        self._signer("invite", role)
        if not addresses:
            raise KnodeError(
                Code.UNAVAILABLE, "this node has no address that others could dial", "set node.advertise"
            )
        ticket = Ticket(
            1,
            self.key.public.raw,
            self.roster.cell_id,
            self._world.randomness.token(SECRET_BYTES),
            addresses[:MAX_ADDRESSES],
        )
        now = self._world.clock.wall()
        invitation = Invitation(role, now + LIFETIME_MS)
        async with self._change:
            if (
                sum(i.used_by is None and i.expires > now for i in self._invitations.values())
                >= MAX_OPEN_TICKETS
            ):
                raise KnodeError(
                    Code.RATE_LIMITED, f"{MAX_OPEN_TICKETS} tickets wait to be used", "wait ten minutes"
                )
            row = (ticket.key.public.raw, role.value, invitation.expires)
            await self._database.write(
                lambda connection: connection.execute(
                    "INSERT INTO ticket (public_key, role, expires) VALUES (?, ?, ?)", row
                )
            )
            self._invitations[row[0]] = invitation
        return ticket, invitation.expires

    def invitation(self, public_key: bytes) -> Invitation:
        """Return what is known of a ticket, by its public key; TICKET_INVALID when nothing is."""
        found = self._invitations.get(public_key)
        if found is None:
            raise KnodeError(Code.TICKET_INVALID, "the inviter does not know this ticket", ASK_FOR_NEW)
        return found

    def check_ticket(self, public_key: bytes, joiner: bytes) -> Invitation:
        """Return the invitation of a ticket that the node with the key `joiner` may use now.

        The node that used a ticket may show it again: its join may have been cut off half-way.

        Raises:
            KnodeError: TICKET_INVALID, TICKET_USED or TICKET_EXPIRED.
        """
        invitation, now = self.invitation(public_key), self._world.clock.wall()
        if invitation.used_by not in (None, joiner):
            raise KnodeError(Code.TICKET_USED, "another node has used this ticket", ASK_FOR_NEW)
        if invitation.expires <= now:
            minutes = (now - invitation.expires) // 60_000
            raise KnodeError(Code.TICKET_EXPIRED, f"the ticket expired {minutes} minutes ago", ASK_FOR_NEW)
        return invitation

    async def redeem(self, public_key: bytes, joiner: PublicKey, name: str, words: tuple[str, ...]) -> Member:
        """Use a ticket: the joiner becomes a member, in the same transaction.

        Raises:
            KnodeError: as `check_ticket`; KEY_REVOKED; NOT_ALLOWED when this node may not invite any more.
        """
        async with self._change:
            invitation, roster = self.check_ticket(public_key, joiner.raw), self.roster
            if joiner.raw in roster.members:
                return roster.members[joiner.raw]
            if joiner.raw in roster.revoked:
                raise KnodeError(Code.KEY_REVOKED, "this node was revoked", "make a new home on that machine")
            signer = self._signer("add a member", invitation.role)
            issued = roster.next_issue_time(joiner.raw, self._world.clock.wall())
            add = Add(
                signer.public.raw, roster.cell_id, joiner.raw, roster.free_name(name), invitation.role, issued
            )
            statement = sign_statement(signer, add)

            def write(connection: apsw.Connection) -> None:
                used = "UPDATE ticket SET used_by = ?, words = ? WHERE public_key = ?"
                connection.execute(used, (joiner.raw, " ".join(words), public_key))
                _insert(connection, [statement])

            await self._database.write(write)
            self._invitations[public_key] = replace(invitation, used_by=joiner.raw, words=words)
            self._become(resolve(roster.cell_id, [*roster.statements.values(), statement]), [statement])
        return self.roster.admit(joiner.raw)

    def next_change(self) -> trio.Event:
        """Return an event that is set with the next change of the roster."""
        return self._next_change

    def words(self) -> dict[bytes, tuple[str, ...]]:
        """Return the four words of each join that this node granted, by the member's raw key."""
        return {i.used_by: i.words for i in self._invitations.values() if i.used_by is not None}

    async def set_role(self, member: Member, role: Role) -> Member:
        """Give a member another role.

        Raises:
            KnodeError: NOT_ALLOWED when this node may not.
        """
        signer, roster = self._signer("change a role", role), self.roster
        if member.role is Role.ADMIN and signer.public != roster.owner:
            raise KnodeError(
                Code.NOT_ALLOWED, "only the owner changes an admin's role", "run it on the owner's node"
            )
        body = SetRole(
            signer.public.raw,
            roster.cell_id,
            member.key.raw,
            role,
            roster.in_force_by(member.key.raw),
            roster.next_issue_time(member.key.raw, self._world.clock.wall()),
        )
        await self.add([sign_statement(signer, body)])
        return self.roster.admit(member.key.raw)

    async def revoke(self, member: Member) -> None:
        """Revoke a member for ever. What it signed as an admin until now stays valid.

        Raises:
            KnodeError: NOT_ALLOWED without the owner's key, or for this node itself.
        """
        roster = self.roster
        if self._owner_key is None:
            raise KnodeError(
                Code.NOT_ALLOWED, "only the cell's owner revokes members", "run it where 'knode init' was run"
            )
        if member.key == self.key.public:
            raise KnodeError(Code.NOT_ALLOWED, "the owner's own node cannot revoke itself")
        body = Revoke(
            self._owner_key.public.raw,
            roster.cell_id,
            member.key.raw,
            roster.in_force_by(member.key.raw),
            roster.next_issue_time(member.key.raw, self._world.clock.wall()),
        )
        await self.add([sign_statement(self._owner_key, body)])

    def admit(self, peer: Hello | Established) -> None:
        """Check that whoever holds this key may speak at all: the gate before any signature.

        A member may; so may a node with a living ticket, to join and for nothing else.

        Raises:
            KnodeError: UNKNOWN_PEER, KEY_REVOKED, TICKET_INVALID, TICKET_USED or TICKET_EXPIRED.
        """
        raw_key = peer.key if isinstance(peer, Hello) else peer.peer.raw
        if peer.ticket:
            self.check_ticket(peer.ticket, raw_key)
        else:
            self.roster.admit(raw_key)

    def _signer(self, what: str, role: Role) -> KeyPair:
        """Return the key with which this node may make someone a member with `role`."""
        if self._owner_key is not None and self._owner_key.public == self.roster.owner:
            return self._owner_key
        if not self.roster.may_sign_members(self.key.public):
            admins = [m.name for m in self.roster.members.values() if m.role is Role.ADMIN]
            raise KnodeError(
                Code.NOT_ALLOWED,
                f"this node may not {what}: it is no admin",
                f"run it on {' or '.join(admins) or 'the owner'}",
            )
        if role is Role.ADMIN:
            raise KnodeError(
                Code.NOT_ALLOWED, "only the owner makes admins", "run it where 'knode init' was run"
            )
        return self.key

    def _become(self, roster: Roster, new: list[SignedStatement]) -> None:
        self._roster = roster
        for tell in self.changed:
            tell(new)
        self._next_change.set()
        self._next_change = trio.Event()


def _insert(connection: apsw.Connection, statements: Iterable[SignedStatement]) -> None:
    connection.executemany(
        "INSERT OR IGNORE INTO statement VALUES (?, ?)", [(s.id, s.data) for s in statements]
    )
