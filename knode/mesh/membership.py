"""The roster and the members' contacts on disk, and every change to them.

Each change is durable before it is told to anyone. Nothing here touches a link.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import apsw
import trio

from knode.errors import Code, KnodeError
from knode.identity import KeyPair, PublicKey
from knode.klp.handshake import Established, Hello
from knode.mesh.contact import SignedContact, open_contact
from knode.mesh.invitations import SCHEMA as TICKET_SCHEMA
from knode.mesh.invitations import Invitations
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
from knode.mesh.ticket import MAX_ADDRESSES, SECRET_BYTES, VERSION, Ticket
from knode.mesh.ways import fitting
from knode.storage import Database
from knode.world import World

SCHEMA = (
    """
CREATE TABLE cell (id BLOB NOT NULL);
CREATE TABLE statement (id BLOB PRIMARY KEY, data BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE contact (key BLOB PRIMARY KEY, issued INTEGER NOT NULL, data BLOB NOT NULL) WITHOUT ROWID;
"""
    + TICKET_SCHEMA
)


class Membership:
    """What this node knows of its cell. One writer: the node's own tasks."""

    def __init__(self, world: World, database: Database, key: KeyPair, owner_key: KeyPair | None) -> None:
        self.key = key
        self.invitations = Invitations(world.clock, database)
        self.contacts: Mapping[bytes, SignedContact] = {}
        """Where each member can be reached, by its raw key."""
        self.changed: list[Callable[[list[SignedStatement]], None]] = []
        """Called with the statements that are new, once a change of the roster is durable; must not raise."""
        self._owner_key = owner_key
        self._world = world
        self._database = database
        self._roster: Roster | None = None
        self._change = trio.Lock()
        self._next_change = trio.Event()

    async def load(self) -> None:
        """Read what is on disk; statements are verified again, as anything that arrives."""

        def read(connection: apsw.Connection) -> tuple[list[Any], ...]:
            queries = (
                "SELECT id FROM cell",
                "SELECT data FROM statement ORDER BY id",
                "SELECT data FROM contact ORDER BY key",
            )
            return tuple(connection.execute(query).fetchall() for query in queries)

        cells, statements, contacts = await self._database.read(read)
        for [cell_id] in cells:
            self._roster = resolve(cell_id, [open_statement(data) for [data] in statements])
        self.contacts = {c.body.key: c for c in (open_contact(data) for [data] in contacts)}
        await self.invitations.load()

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

    async def adopt(
        self, cell_id: bytes, statements: Iterable[SignedStatement], contacts: Iterable[SignedContact] = ()
    ) -> None:
        """Belong to this cell from now on.

        Args:
            cell_id: id of its genesis.
            statements: its roster as far as it is known; it must name this node a member.
            contacts: where other members can be reached.

        Raises:
            KnodeError: HOME_EXISTS when this node belongs to a cell already, WRONG_NETWORK, UNKNOWN_PEER
                or KEY_REVOKED when the statements make it no member; then nothing has changed.
        """
        roster = resolve(cell_id, statements)
        roster.admit(self.key.public.raw)
        async with self._change:
            if self.in_cell:
                raise KnodeError(Code.HOME_EXISTS, "this node belongs to a cell already")
            known = _newest(contacts, roster, {})

            def write(connection: apsw.Connection) -> None:
                connection.execute("INSERT INTO cell VALUES (?)", (cell_id,))
                _keep_contacts(connection, known)

            await self._become(roster, known, write)

    async def add(self, statements: Iterable[SignedStatement]) -> list[SignedStatement]:
        """Merge statements into the roster; return those that were new and count.

        Raises:
            KnodeError: RATE_LIMITED when the roster would hold too many, UNAVAILABLE without a cell,
                DISK_FULL, DISK_READ_ONLY; then nothing has changed.
        """
        async with self._change:
            known = self.roster.statements
            roster = resolve(self.roster.cell_id, [*known.values(), *statements])
            if roster.digest == self.roster.digest:
                return []
            return await self._become(roster, self.contacts)

    async def add_contacts(self, contacts: Iterable[SignedContact]) -> list[SignedContact]:
        """Keep the contacts of members that are newer than ours; return those."""
        async with self._change:
            newer = _newest(contacts, self.roster, self.contacts)
            if newer:
                await self._database.write(lambda connection: _keep_contacts(connection, newer))
                self.contacts = {**self.contacts, **newer}
        return list(newer.values())

    async def issue_ticket(self, role: Role, addresses: tuple[str, ...]) -> tuple[Ticket, int]:
        """Make a one-use ticket; return it and when it expires (wall time, milliseconds).

        Raises:
            KnodeError: NOT_ALLOWED when this node may not invite, UNAVAILABLE without address, RATE_LIMITED.
        """
        self._signer("invite", role)
        if not addresses:
            raise KnodeError(
                Code.UNAVAILABLE, "this node has no address that others could dial", "set node.advertise"
            )
        ticket = Ticket(
            VERSION,
            self.key.public.raw,
            self.roster.cell_id,
            self._world.randomness.token(SECRET_BYTES),
            fitting(addresses, MAX_ADDRESSES),
        )
        return ticket, await self.invitations.keep(ticket.key.public.raw, role)

    async def redeem(self, public_key: bytes, joiner: PublicKey, name: str, words: tuple[str, ...]) -> Member:
        """Use a ticket: the joiner becomes a member, in the same transaction.

        A node that is a member already, since its join was cut off, stays what it is.

        Raises:
            KnodeError: as `Invitations.check`; KEY_REVOKED; NOT_ALLOWED when this node may not invite any
                more; RATE_LIMITED when it has signed as many statements as an admin may.
        """
        async with self._change:
            invitation, roster = self.invitations.check(public_key, joiner.raw), self.roster
            used = replace(invitation, used_by=joiner.raw, words=words)

            def write(connection: apsw.Connection) -> None:
                self.invitations.write_used(connection, public_key, used)

            if joiner.raw in roster.revoked:
                raise KnodeError(Code.KEY_REVOKED, "this node was revoked", "make a new home on that machine")
            if joiner.raw in roster.members:
                await self._database.write(write)
            else:
                add = self._sign_add(joiner.raw, name, invitation.role)
                after = resolve(roster.cell_id, [*roster.statements.values(), add])
                if add.id not in after.statements:
                    raise KnodeError(
                        Code.RATE_LIMITED, "this admin has signed too many statements", "invite from another"
                    )
                await self._become(after, self.contacts, write)
            self.invitations.note_used(public_key, used)
        return self.roster.admit(joiner.raw)

    def next_change(self) -> trio.Event:
        """Return an event that is set with the next change of the roster."""
        return self._next_change

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
            raise KnodeError(
                Code.NOT_ALLOWED,
                "the owner's own node cannot revoke itself",
                "'knode member list' shows the others",
            )
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
            self.invitations.check(peer.ticket, raw_key)
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

    def _sign_add(self, member: bytes, name: str, role: Role) -> SignedStatement:
        signer, roster = self._signer("add a member", role), self.roster
        issued = roster.next_issue_time(member, self._world.clock.wall())
        add = Add(signer.public.raw, roster.cell_id, member, roster.free_name(name), role, issued)
        return sign_statement(signer, add)

    async def _become(
        self,
        roster: Roster,
        contacts: Mapping[bytes, SignedContact],
        also: Callable[[apsw.Connection], None] = lambda connection: None,
    ) -> list[SignedStatement]:
        """Make `roster` durable, and whatever `also` writes; then use it, and tell who listens.

        The caller holds `_change`.

        Args:
            roster: what follows from the present one.
            contacts: those of its members that stay are kept.
            also: runs in the same transaction.

        Returns:
            The statements that are new.
        """
        known = self._roster.statements if self._roster is not None else {}
        if len(roster.statements) > max(MAX_STATEMENTS, len(known)):
            raise KnodeError(Code.RATE_LIMITED, f"a roster holds at most {MAX_STATEMENTS} statements")
        new = [s for i, s in roster.statements.items() if i not in known]
        rows = [(s.id, s.data) for s in new]
        void = [(i,) for i in known if i not in roster.statements]
        gone = [(key,) for key in self.contacts if key not in roster.members]

        def write(connection: apsw.Connection) -> None:
            connection.executemany("INSERT OR IGNORE INTO statement VALUES (?, ?)", rows)
            connection.executemany("DELETE FROM statement WHERE id = ?", void)
            connection.executemany("DELETE FROM contact WHERE key = ?", gone)
            also(connection)

        await self._database.write(write)
        self._roster = roster
        self.contacts = {key: c for key, c in contacts.items() if key in roster.members}
        for tell in self.changed:
            tell(new)
        self._next_change.set()
        self._next_change = trio.Event()
        return new


def _newest(
    contacts: Iterable[SignedContact], roster: Roster, known: Mapping[bytes, SignedContact]
) -> dict[bytes, SignedContact]:
    """Return, for each member, the newest of `contacts` that is newer than what is known."""
    newest: dict[bytes, SignedContact] = {}
    for contact in sorted(contacts, key=lambda c: c.body.issued):
        key = contact.body.key
        if key in roster.members and (key not in known or contact.body.issued > known[key].body.issued):
            newest[key] = contact
    return newest


def _keep_contacts(connection: apsw.Connection, contacts: Mapping[bytes, SignedContact]) -> None:
    rows = [(key, c.body.issued, c.data) for key, c in contacts.items()]
    connection.executemany("INSERT OR REPLACE INTO contact VALUES (?, ?, ?)", rows)
